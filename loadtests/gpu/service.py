"""A service on the device: images and texts by number of callers, swaps under load."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import mean
from typing import Any

from loadtests.gpu.part import Part, run_part
from loadtests.support.calls import PreparedCall, image_call, open_client, run_to_end, text_call
from loadtests.support.closed_loop import closed_loop
from loadtests.support.gauges import samples
from loadtests.support.photos import crops
from loadtests.support.report import ROOT
from loadtests.support.serving import service

MEMORY, VERSIONS = "served", ("a", "b")
CALLERS = {"images": (1, 8, 32, 128, 512), "texts": (1, 32, 512)}
SAMPLE_MS = 200  # between two readings of the GPU's use


@contextmanager
def gpu_use() -> Iterator[dict[str, float]]:
    """Mean use of the GPU in percent and most memory of the card in MiB, filled in at the end.

    Stays empty where there is no nvidia-smi.
    """
    found = dict[str, float]()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield found
        return
    command = [
        tool,
        "--query-gpu=utilization.gpu,memory.used",
        "--format=csv,noheader,nounits",
        f"--loop-ms={SAMPLE_MS}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield found
    finally:
        process.terminate()
        lines = [line.split(",") for line in process.communicate(timeout=10)[0].splitlines()]
        rows = [(float(line[0]), float(line[1])) for line in lines if len(line) == 2]
        if rows:
            found |= {"gpu_percent": round(mean(row[0] for row in rows), 1), "card_mib": max(row[1] for row in rows)}


async def gpu_memory(url: str) -> dict[str, float]:
    """The service's own gauges of GPU memory, in bytes by kind; {} on the CPU."""
    async with open_client(url) as client:
        found = await samples(client)
    return {each.labels["kind"]: each.value for each in found if each.name == "reco_gpu_memory_bytes"}


def measure_load(part: Part, url: str, kind: str, calls: Sequence[PreparedCall], callers: int) -> dict[str, Any]:
    """One closed loop: items per second, latency, and what the processors and the GPU did."""
    with gpu_use() as use:
        found = run_to_end(closed_loop(url, calls, callers, part.choose(3.0, 1.0), part.choose(1.0, 0.2)))
    speed, latency = round(found.pop("images_per_s"), 1), found["latency_ms"]
    client = round(found.pop("client_cpu_ms_per_image") * speed / 1000, 2)  # cores
    limit = ", THE CLIENT WAS THE LIMIT" if client > 0.9 else ""
    told = f"p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms, GPU {use.get('gpu_percent', '-')} %"
    part.say(f"{kind}, {callers} callers: {speed:.0f}/s, {told}, client {client:.2f} cores{limit}")
    return {"items_per_s": speed, "client_cores": client, **use, **found}


def measure_swaps(part: Part, url: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """The report of `loadtests.swap`. SystemExit where a reply failed or mixed two versions."""
    out = part.work / "swap.json"
    command = [sys.executable, "-m", "loadtests.swap", "--url", url, "--memory", MEMORY, "--versions", *VERSIONS]
    loads = part.choose(("--swaps=10", "--pause=0.5", "--calm=5"), ("--swaps=2", "--pause=0.2", "--calm=0.5"))
    subprocess.run([*command, *loads, "--out", str(out)], cwd=ROOT, env=environ, check=False)
    report: dict[str, Any] = json.loads(out.read_text("utf-8"))
    told = f"{report['swaps']} swaps, {report['replies']} replies: {report['failed']} failed, {report['mixed']} mixed"
    part.say(told)
    if report["failed"] or report["mixed"]:
        raise SystemExit(told)
    return report


def measure(part: Part) -> None:
    """Write the memory, start the service, load it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RECO_")}
    store, max_batch = part.work / "store-service", part.choose(256, 8)
    command = [sys.executable, "-m", "models.benchmarks.gpu.subjects", str(store), MEMORY, *VERSIONS]
    pairs = part.choose(100_000, 2_000)
    subprocess.run([*command, "--model", part.model, "--pairs", str(pairs)], cwd=ROOT, env=environ, check=True)
    environ |= {"RECO_MODEL": part.model, "RECO_PRETRAINED": "random", "RECO_STORE": str(store)}
    environ |= {"RECO_DEVICE": part.device, "RECO_PRECISION": part.precision, "RECO_MAX_BATCH": str(max_batch)}
    calls = {
        "images": [image_call([photo], memory=MEMORY) for _, photo in crops(part.choose(64, 8))],
        "texts": [text_call([f"a photo of thing number {i}"], memory=MEMORY) for i in range(64)],
    }
    with service({**environ, "RECO_ACCESS_LOG": "false"}, part.work / "service.log") as served:
        part.report["ready_s"] = round(served.ready_s, 1)
        part.say(f"{pairs} pairs, batches to {max_batch}, {part.precision}: ready after {served.ready_s:.1f} s")
        for kind, by_callers in CALLERS.items():
            for callers in part.choose(by_callers, (1, 2)):
                load = partial(measure_load, part, served.url, kind, calls[kind], callers)
                part.attempt(f"{kind}, {callers} callers", load)
        part.attempt("swap", partial(measure_swaps, part, served.url, environ))
        part.attempt("gpu_memory_bytes", lambda: asyncio.run(gpu_memory(served.url)))


if __name__ == "__main__":
    raise SystemExit(run_part(measure))
