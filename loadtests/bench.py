"""Cost of serving beside the bare model, in one run on the same cores (`make bench`)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from loadtests.compare import figures, lifecycle
from loadtests.compare.bare_model import BareModel
from loadtests.compare.figures import BenchContext, Measured
from loadtests.support.photos import crops
from loadtests.support.picture import draw_targets
from loadtests.support.report import ROOT, compare_to_targets, environment, format_verdicts, median_and_spread, write
from loadtests.support.serving import service

MEMORY = "bench"
# candidates for the bare model; the fastest is taken
BATCHES = {"cpu": (16, 32), "cuda": (32, 64, 128, 256, 512)}
QUICK = {"model": "ViT-S-32-alt", "repeats": 1, "seconds": 6.0, "warmup": 0.5, "pairs": 2000, "labels": 20_000}
SETTINGS = (
    "only",
    "model",
    "device",
    "precision",
    "max_batch",
    "threads",
    "pairs",
    "labels",
    "repeats",
    "seconds",
    "warmup",
    "quick",
)
RUNNING: Mapping[str, Callable[[BenchContext], Measured]] = {  # these share one service
    "throughput": figures.throughput,
    "one-photo": figures.one_photo,
    "texts": figures.short_texts,
    "many-photos": figures.many_photos,
    "by-concurrency": figures.by_concurrency,
}
ALONE = ("labels", "flood", "start", "help")  # these start their own processes


def build_memory(environ: Mapping[str, str], pairs: int, fingerprint: str, dim: int) -> float:
    """Build the memory; return the seconds it took, 0 where it already exists."""
    store = environ["RECO_STORE"]
    shown = subprocess.run(
        [sys.executable, "-m", "service.cli.main", "memory", "show", MEMORY], cwd=ROOT, env=environ, capture_output=True
    )
    if shown.returncode == 0:
        return 0.0
    command = [sys.executable, "-m", "index_store.benchmarks.synthetic", store, MEMORY, "v1", "--encoder", fingerprint]
    begun = time.perf_counter()
    subprocess.run([*command, "--pairs", str(pairs), "--dim", str(dim)], cwd=ROOT, env=environ, check=True)
    return time.perf_counter() - begun


def help_seconds(repeats: int) -> dict[str, float]:
    """Seconds of `reco --help`, process start included."""
    installed = Path(sys.executable).with_name("reco")
    command = [str(installed)] if installed.exists() else [sys.executable, "-m", "service.cli.main"]
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, check=True)
        found.append(time.perf_counter() - begun)
    return median_and_spread(found)


def measure(arguments: argparse.Namespace, environ: Mapping[str, str], work: Path) -> dict[str, Any]:
    """Measure the chosen figures; their goals are under `targets`."""
    log = work / "service.log"
    bare = partial(BareModel, arguments.model, arguments.threads, arguments.device, arguments.precision)
    photos = [photo for _, photo in crops(64)]
    command = [sys.executable, "-m", "service.cli.main", "info"]
    info = json.loads(subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout)
    report: dict[str, Any] = {"model": info["model"]}
    report["memory_build_s"] = round(
        build_memory(environ, arguments.pairs, info["model"]["fingerprint"], info["model"]["dim"]), 1
    )
    environ = {**environ, "RECO_MEMORY": MEMORY}
    found: dict[str, Measured] = {}
    if chosen := [name for name in RUNNING if name in arguments.only]:
        with service(environ, log) as served, bare() as bare_model:
            batch = max(
                BATCHES[arguments.device],
                key=lambda size: bare_model.images(size, arguments.seconds / 2)["images_per_s"],
            )
            of = (arguments.repeats, arguments.seconds, arguments.warmup)
            bench = BenchContext(served.url, bare_model, batch, arguments.device, MEMORY, photos, *of)
            report |= {"service": httpx.get(f"{served.url}/info", trust_env=False).json(), "raw_batch": batch}
            for name in chosen:
                found[name] = _report(name, partial(RUNNING[name], bench))
    if "labels" in arguments.only:
        with_model = (arguments.model, arguments.device, arguments.precision, arguments.repeats)
        found["labels"] = _report("labels", partial(figures.labels, arguments.labels, *with_model, environ))
    if "flood" in arguments.only:
        found["flood"] = _report("flood", partial(lifecycle.flood, environ, log, photos, arguments.seconds))
    if "start" in arguments.only:
        found["start"] = _report("start", partial(lifecycle.cold_start, environ, log, bare, arguments.repeats))
    if "help" in arguments.only:
        report["help_s"] = help_seconds(arguments.repeats)
    goals = [goal for _, of in found.values() for goal in of]
    return {**report, **{name: measured for name, (measured, _) in found.items()}, "targets": compare_to_targets(goals)}


def _report(name: str, figure: Callable[[], Measured]) -> Measured:
    print(f"{name} …", flush=True)
    measured, goals = figure()
    print(format_verdicts(compare_to_targets(goals)), flush=True)
    return measured, goals


def _arguments() -> argparse.Namespace:
    figures_known = (*RUNNING, *ALONE)
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench", description="What serving costs beside the bare model."
    )
    parser.add_argument(
        "--only", nargs="+", choices=figures_known, default=figures_known, help="figures to measure (default: all)"
    )
    parser.add_argument(
        "--model", default="ViT-B-32", help="an open_clip model, with random weights: speed does not depend on them"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--max-batch", type=int, default=32, help="of the service")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=100_000, help="size of the memory")
    parser.add_argument("--labels", type=int, default=1_000_000, help="size of the label set")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load in each round")
    parser.add_argument("--warmup", type=float, default=3.0)
    parser.add_argument(
        "--quick", action="store_true", help="once, with a small model and little data: does the bench work?"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "var" / "bench", help="where the memory and the service's log are kept"
    )
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/bench.json"))
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK, out=ROOT / "var" / "bench" / "quick.json")
    return parser.parse_args()


def main() -> int:
    """Parse, build what is missing, measure, print, write."""
    arguments = _arguments()
    work = arguments.work / f"{arguments.model}-{arguments.pairs}"
    work.mkdir(parents=True, exist_ok=True)
    chosen = {"MODEL": arguments.model, "PRETRAINED": "random", "STORE": str(work / "store")}
    chosen |= {"DEVICE": arguments.device, "PRECISION": arguments.precision, "MAX_BATCH": str(arguments.max_batch)}
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        **{f"RECO_{name}": value for name, value in chosen.items()},
    }
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    report = {**environment(), "settings": settings, **measure(arguments, environ, work)}
    print(format_verdicts(report["targets"]))
    write(arguments.out, report)
    draw_targets(report["targets"], arguments.out.with_suffix(".png"))
    return 0 if all(row["reached"] for row in report["targets"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
