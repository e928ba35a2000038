"""What the parts of the check on a GPU share: arguments, and results on disk as they are found."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from loadtests.support.report import Goal, compare_to_targets

__all__ = ["Part", "run_part", "write_json"]

Value = TypeVar("Value")
TINY = {  # open_clip's configuration of an encoder that a CPU runs in a millisecond
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@dataclass
class Part:
    """One part while it runs.

    device: "cuda" or "cpu".  quick: little data and a tiny encoder.  work: a folder shared by the
    parts.  out: the JSON file.  report: what was found.  lines: for the summary.
    """

    device: str
    quick: bool
    work: Path
    out: Path
    report: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The encoder: ViT-B-32, or the configuration of a tiny one; weights are random."""
        if not self.quick:
            return "ViT-B-32"
        path = self.work / "tiny.json"
        if not path.exists():
            path.write_text(json.dumps(TINY), "utf-8")
        return str(path)

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """The number format of what is timed."""
        return "bf16" if self.device == "cuda" else "fp32"

    def choose(self, full: Value, quick: Value) -> Value:
        """One of two values, by `quick`."""
        return quick if self.quick else full

    def attempt(self, name: str, measure: Callable[[], Value]) -> Value | None:
        """Call `measure` and keep its result; None where it failed, which ends nothing else."""
        begun = time.perf_counter()
        try:
            found = measure()
        except (Exception, SystemExit) as error:  # noqa: BLE001  one measurement must not lose the others
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
            found = None
        print(f"{name}: {time.perf_counter() - begun:.1f} s", flush=True)
        self.report[name] = found
        self.write()
        return found

    def say(self, line: str) -> None:
        """Add a line to the summary."""
        self.lines.append(line)
        self.write()

    def aim(self, figure: str, value: float, sign: str, target: float) -> None:
        """Compare a figure with its target."""
        self.goals.append((figure, value, sign, target))

    def write(self) -> None:
        """Write everything found so far, so that a part that is killed keeps it."""
        head = {"device": self.device, "quick": self.quick, "failures": self.failures, "summary": self.lines}
        write_json(self.out, {**head, "targets": compare_to_targets(self.goals), **self.report})


def write_json(path: Path, value: object) -> None:
    """Replace a file; whoever reads it never sees half of it."""
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(value, indent=2, default=str) + "\n", "utf-8")
    whole.replace(path)


def run_part(measure: Callable[[Part], None]) -> int:
    """Parse the arguments that `check` gives, measure, write; 1 where a measurement failed."""
    parser = argparse.ArgumentParser(description="A part of loadtests.gpu.check.")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    part = Part(**vars(parser.parse_args()))
    measure(part)
    part.write()
    return 1 if part.failures else 0
