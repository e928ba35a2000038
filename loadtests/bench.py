"""What serving costs: images per second through HTTP against the bare model, in one run on the same cores (`make bench`).

    python -m loadtests.bench [--repeats 5] [--seconds 15] [--threads 2]

Each repeat measures in turn the bare image tower, the service without enhancement and the service with it; never two at
once. Ratios are taken inside a repeat, so that a machine whose speed drifts does not bend them. The first run builds a
memory of `--pairs` pairs from crops of scikit-image's photos, with that encoder and through `reco memory build`, and keeps
it in var/bench.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from loadtests.calls import Call, Reply, Unexpected, image_call, open_client, run_to_end, send
from loadtests.photos import crops
from loadtests.report import ROOT, environment, table, write

STARTER_PAIRS = 2640
# eight pairs of each photo: the search costs what the number and width of pairs cost, and the tower has to see fewer
CAPTIONS = [f"{what} of a photo, {light}" for what in ("a detail", "one part", "a corner", "the middle") for light in ("by day", "indoors")]
BATCHES = (16, 32)  # candidates for the yardstick; the faster one is taken
SAMPLES = {"reco_stage_duration_seconds_sum", "reco_stage_duration_seconds_count", "reco_batch_size_sum", "reco_batch_size_count"}


class Raw:
    """The yardstick in its own process, asleep unless asked."""

    def __init__(self, model: str, threads: int) -> None:
        command = [sys.executable, "-m", "loadtests.raw_forward", "--model", model, "--threads", str(threads)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def rate(self, batch: int, seconds: float) -> dict[str, float]:
        """Images per second, and processor time per image."""
        assert self._process.stdin
        self._process.stdin.write(f"{batch} {seconds}\n")
        self._process.stdin.flush()
        done = self._read()
        return {"images_per_s": done["images"] / done["seconds"], "cpu_ms_per_image": round(1000 * done["cpu_seconds"] / done["images"], 2)}

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("loadtests.raw_forward ended: its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def service(environ: dict[str, str], log: Path) -> Iterator[str]:
    """A real `reco serve` on a free port; yields its URL once it is ready, ends it by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)
        try:
            while not _ready(url):
                if process.poll() is not None:
                    raise SystemExit(f"the service did not start; {log} ends:\n{log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def build_memory(environ: dict[str, str], shard: Path, pairs: int) -> float:
    """Seconds it took `reco memory build` to make the memory `bench`; 0 where an earlier run has made it."""
    cli = [sys.executable, "-m", "service.cli", "memory"]
    if subprocess.run([*cli, "show", "bench"], cwd=ROOT, env=environ, capture_output=True, check=False).returncode == 0:
        return 0.0
    with tarfile.open(shard, "w") as archive:
        for number, (_, photo) in enumerate(crops(pairs // len(CAPTIONS), seed=1)):
            for suffix, content in (("jpg", photo), ("json", json.dumps({"captions": CAPTIONS}).encode())):
                member = tarfile.TarInfo(f"{number:05}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    start = time.perf_counter()
    subprocess.run([*cli, "build", "bench", str(shard), "--activate"], cwd=ROOT, env=environ, check=True)
    return time.perf_counter() - start


async def served_rate(url: str, calls: Sequence[Call], concurrency: int, seconds: float, warmup: float) -> dict[str, Any]:
    """Images per second in a closed loop of single-photo requests, and what the service says it did meanwhile."""
    ends: list[float] = []
    bad: list[Reply] = []

    async def work(client: httpx.AsyncClient, turn: int, until: float) -> None:
        while time.perf_counter() < until:
            reply = await send(client, calls[turn % len(calls)])
            if reply.status != 200 or bad:
                bad.append(reply)
                return
            ends.append(time.perf_counter())
            turn += concurrency

    async with open_client(url) as client:
        before, cpu, start = await scrape(client), time.process_time(), time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for worker in range(concurrency):
                tasks.create_task(work(client, worker, start + warmup + seconds))
        cpu, after = time.process_time() - cpu, await scrape(client)
    if bad:
        raise Unexpected(f"{calls[0].path}: {bad[0].status} {bad[0].content[:300]!r}")
    counted = [end for end in ends if start + warmup <= end <= start + warmup + seconds]
    if len(counted) < 2 * concurrency:
        raise Unexpected(f"{calls[0].path}: {len(counted)} replies in {seconds:g} s are too few to measure: give more --seconds")
    return {"images_per_s": slope(counted), **account(before, after), "client_cpu_ms_per_image": round(1000 * cpu / len(ends), 2)}


def slope(ends: Sequence[float]) -> float:
    """Replies per second by least squares: they come in bursts of a batch, and counting between two cuts would err by a burst."""
    return float(np.polyfit(np.asarray(ends) - ends[0], np.arange(len(ends)), 1)[0])


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """Sums and counts of the image stages, the batches and the process's CPU seconds."""
    text = (await client.get("/metrics")).raise_for_status().text
    found: dict[str, float] = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        if sample.name == "process_cpu_seconds_total":
            found["cpu"] = sample.value
        elif sample.name in SAMPLES and sample.labels["modality"] == "image":
            found[f"{sample.labels.get('stage', 'batch')} {sample.name.rsplit('_', 1)[1]}"] = sample.value
    return found


def account(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Mean batch size, mean milliseconds of each stage and CPU per image of one phase."""
    spent = {name: value - before.get(name, 0.0) for name, value in after.items()}
    means = {
        name[:-4]: spent[name] / spent[f"{name[:-4]} count"] for name in spent if name.endswith(" sum") and spent[f"{name[:-4]} count"]
    }
    mean_batch = means.pop("batch", 0.0)
    return {
        "mean_batch": round(mean_batch, 2),
        "stages_ms": {stage: round(1000 * mean, 3) for stage, mean in sorted(means.items())},
        "server_cpu_ms_per_image": round(1000 * spent["cpu"] / spent["batch sum"], 2) if spent.get("batch sum") else None,
    }


def help_seconds(repeats: int) -> list[float]:
    """How long `reco --help` takes, process start included."""
    installed = Path(sys.executable).with_name("reco")
    command = [str(installed)] if installed.exists() else [sys.executable, "-m", "service.cli"]
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, check=True)
        found.append(time.perf_counter() - start)
    return found


def measure(arguments: argparse.Namespace, url: str, raw: Raw) -> tuple[int, list[dict[str, Any]]]:
    """(the yardstick's batch, one entry per repeat): raw, plain and enhanced in turn."""
    photos = [photo for _, photo in crops(64)]
    calls = {"plain": [image_call([p], enhance=False) for p in photos], "enhanced": [image_call([p], memory="bench") for p in photos]}
    batch = max(BATCHES, key=lambda size: raw.rate(size, arguments.seconds / 2)["images_per_s"])
    repeats = []
    for number in range(arguments.repeats):
        entry: dict[str, Any] = {"raw": raw.rate(batch, arguments.seconds)}
        for phase, phase_calls in calls.items():
            entry[phase] = run_to_end(served_rate(url, phase_calls, arguments.concurrency, arguments.seconds, arguments.warmup))
        entry["ratios"] = {phase: entry[phase]["images_per_s"] / entry["raw"]["images_per_s"] for phase in calls}
        print(
            f"repeat {number + 1}: " + ", ".join(f"{phase} {entry[phase]['images_per_s']:.2f}/s" for phase in ("raw", *calls)), flush=True
        )
        repeats.append(entry)
    return batch, repeats


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def summarise(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Images per second of each phase, and the ratio of each served phase to the bare model."""
    rates = {phase: middle([entry[phase]["images_per_s"] for entry in repeats]) for phase in ("raw", "plain", "enhanced")}
    ratios = {phase: middle([entry["ratios"][phase] for entry in repeats]) for phase in ("plain", "enhanced")}
    return {"images_per_s": rates, "ratio_to_raw": ratios}


def show(report: dict[str, Any]) -> str:
    """The table a person reads."""
    summary = report["summary"]
    rows: list[list[object]] = [["", "images/s", "min", "max", "ratio", "min", "max"]]
    for phase, rate in summary["images_per_s"].items():
        ratio = summary["ratio_to_raw"].get(phase)
        rows.append([phase, *rate.values(), *([f"{value:.3f}" for value in ratio.values()] if ratio else ["1", "", ""])])
    return f"{table(rows)}\nraw batch {report['raw_batch']}; reco --help {report['help_s']['median']:.2f} s"


def main() -> int:
    """Parse, build what is missing, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description="Served against bare images per second.")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip model, with random weights: speed does not depend on them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=STARTER_PAIRS, help="size of the memory; the default is the starter's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each of the three phases of a repeat")
    parser.add_argument("--warmup", type=float, default=3.0)
    parser.add_argument("--work", type=Path, default=ROOT / "var" / "bench", help="where the memory and the service's log are kept")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/bench.json"))
    arguments = parser.parse_args()

    work = arguments.work / f"{arguments.model}-{arguments.pairs}"
    work.mkdir(parents=True, exist_ok=True)
    chosen = {"MODEL": arguments.model, "PRETRAINED": "random", "STORE": str(work / "store"), "DEVICE": "cpu"}
    environ = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), **{f"RECO_{name}": value for name, value in chosen.items()}}
    help_s = help_seconds(5)
    build_s = build_memory(environ, work / "photos.tar", arguments.pairs)
    with service({**environ, "RECO_MEMORY": "bench"}, work / "service.log") as url, Raw(arguments.model, arguments.threads) as raw:
        info = httpx.get(f"{url}/info", trust_env=False).json()
        batch, repeats = measure(arguments, url, raw)
    settings = {name: getattr(arguments, name) for name in ("model", "threads", "concurrency", "pairs", "repeats", "seconds", "warmup")}
    measured = {
        "help_s": middle(help_s),
        "memory_build_s": round(build_s, 1),
        "raw_batch": batch,
        "summary": summarise(repeats),
        "repeats": repeats,
    }
    report = {**environment(), "settings": settings, "service": info, **measured}
    print(show(report))
    write(arguments.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
