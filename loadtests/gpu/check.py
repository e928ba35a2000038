"""Check the product on a GPU, part after part, each in a process with a time limit of its own.

    python -m loadtests.gpu.check [--device cpu --quick] [--only PART...] [--out DIR]

Writes DIR/PART.json and DIR/log, and prints a page of what was found last. Exits with 1 where a
part failed or a target was missed. With --device cpu --quick it shows on any machine that the parts
work; its figures then say nothing about the product.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from loadtests.gpu.part import write_json
from loadtests.support.report import ROOT, format_verdicts

__all__ = ["PARTS", "PartSpec", "main", "run", "summarize"]

TOTAL_S = 480.0
QUICK_FACTOR = 2.0  # on the limits of parts: a processor that others use too may be slow
LEAST_S = 3.0  # a part is left out where less time is left


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One part: the module that runs, and the seconds after which it is killed."""

    name: str
    module: str
    limit_s: float


PARTS = (
    PartSpec("environment", "loadtests.gpu.environment", 20),
    PartSpec("correctness", "models.benchmarks.gpu.correctness", 100),
    PartSpec("ceilings", "models.benchmarks.gpu.ceilings", 65),
    PartSpec("pipeline", "models.benchmarks.gpu.pipeline", 100),
    PartSpec("service", "loadtests.gpu.service", 110),
    PartSpec("search", "models.benchmarks.gpu.search", 30),
    PartSpec("training", "models.benchmarks.gpu.training", 30),
    PartSpec("profile", "models.benchmarks.gpu.device_profile", 25),
)


def run(part: PartSpec, options: Sequence[str], out: Path, log: TextIO, limit_s: float) -> dict[str, Any]:
    """Run one part; return what it wrote, with its `seconds` and, where it was killed,
    `killed_after_s`.
    """
    path = out / f"{part.name}.json"
    path.unlink(missing_ok=True)
    begun = time.perf_counter()
    command = [sys.executable, "-m", part.module, *options, "--out", str(path)]
    # its own process group, so that what the part started ends with it
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    killed, status = None, None
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        killed = round(limit_s, 1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process inside a driver's call may not end
            process.wait(5)
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"failures": []}
    if killed:
        found["failures"].append(f"killed after {killed:g} s")
        found["killed_after_s"] = killed
    elif status and not found["failures"]:
        found["failures"].append(f"exit status {status}: see the log")
    found = {"part": part.name, "seconds": round(time.perf_counter() - begun, 1), **found}
    write_json(path, found)
    return found


def summarize(results: Sequence[dict[str, Any]]) -> str:
    """The page printed last: each part's time, failures and figures, then all targets."""
    lines = []
    for found in results:
        lines.append(f"{found['part']}: {found['seconds']:g} s{', FAILED' if found['failures'] else ''}")
        lines += [f"  ! {failure}" for failure in found["failures"]]
        lines += [f"  {line}" for line in found.get("summary", ())]
    targets = [row for found in results for row in found.get("targets", ())]
    return "\n".join([*lines, *(["", format_verdicts(targets)] if targets else [])])


def main() -> int:
    """Run the chosen parts, print the summary."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline, results = time.monotonic() + TOTAL_S, list[dict[str, Any]]()
    with (arguments.out / "log").open("w", encoding="utf-8") as log, tempfile.TemporaryDirectory() as work:
        options = ["--device", arguments.device, "--work", work, *(["--quick"] if arguments.quick else [])]
        for part in (part for part in PARTS if part.name in arguments.only):
            own_s = part.limit_s * (QUICK_FACTOR if arguments.quick else 1)
            limit_s = min(own_s, deadline - time.monotonic())
            if limit_s < LEAST_S:
                results.append({"part": part.name, "seconds": 0.0, "failures": ["left out: no time was left"]})
                continue
            log.write(f"==== {part.name}\n")
            log.flush()
            results.append(run(part, options, arguments.out, log, limit_s))
            state = "failed" if results[-1]["failures"] else "done"
            print(f"{part.name} {state}, {results[-1]['seconds']:g} s", flush=True)
        page = summarize(results)
        log.write(f"==== summary\n{page}\n")
    print(f"\n{page}")
    missed = any(not row["reached"] for found in results for row in found.get("targets", ()))
    return 1 if missed or any(found["failures"] for found in results) else 0


def _arguments() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu.check", description="The product on a GPU.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="little data and a tiny encoder: do the parts work?")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "var" / "gpu")))
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
