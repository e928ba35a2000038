"""Where each millisecond goes while batches are embedded: on the device, and on the host.

Alphabet: B batch.
"""

import sys
import time
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from index_store.store import Store
from loadtests.gpu.part import Part, run_part
from loadtests.support.report import table
from models.benchmarks.gpu.subjects import build_memory, load_reco, photos, synchronize

ROWS = 15  # of each table
STAGES = ("encode", "enhance")


def profile_batches(part: Part, batch: int, calls: int) -> dict[str, Any]:
    """Milliseconds per batch of the device's kernels and of the host's operators, the most costly
    first, and the share of the time in which the device computed.
    """
    reco, store, pairs = load_reco(part, max_batch=batch), part.work / "store-profile", part.choose(100_000, 2_000)
    build_memory(store, "profiled", ["v1"], pairs, reco.encoder)
    snapshot, pixels = Store(store).open("profiled", encoder=reco.encoder.fingerprint), photos(reco.encoder, batch)

    def embed() -> None:
        with record_function(STAGES[0]):
            encoded = reco.encode(pixels, "image")
        with record_function(STAGES[1]):
            reco.enhance(encoded, "image", snapshot)

    for _ in range(3):
        embed()
    synchronize(part.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if part.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        begun = time.perf_counter()
        for _ in range(calls):
            embed()
        synchronize(part.device)
        wall_ms = 1000 * (time.perf_counter() - begun) / calls
    found = profiler.key_averages()
    per_batch = 1000 * calls  # microseconds of all calls -> milliseconds of one
    # an operator of the host also carries the time of the kernels it launched: those count once
    kernels = [each for each in found if each.device_type.name == "CUDA" and each.key not in STAGES]
    device = {each.key: each.self_device_time_total / per_batch for each in kernels}
    host = {each.key: each.self_cpu_time_total / per_batch for each in found if each.device_type.name == "CPU"}
    busy_ms = sum(device.values())  # 0 on the CPU, where the host computes
    part.say(f"batch {batch}, {pairs} pairs: {wall_ms:.2f} ms, device busy {busy_ms:.2f} ms of it")
    tables = {name: _costliest(times) for name, times in (("device_ms", device), ("host_ms", host))}
    for name, times in tables.items():
        print(table([(name, "ms per batch"), *((key, f"{value:.3f}") for key, value in times.items())]), flush=True)
        if times:
            part.say(f"{name}: " + ", ".join(f"{key[:40]} {value:.2f}" for key, value in list(times.items())[:4]))
    return {"wall_ms": wall_ms, "device_busy_ms": busy_ms, **tables}


def _costliest(times: dict[str, float]) -> dict[str, float]:
    ordered = sorted(((value, key) for key, value in times.items() if value > 0), reverse=True)
    return {key: round(value, 4) for value, key in ordered[:ROWS]}


def measure(part: Part) -> None:
    """A batch of one, and a large one."""
    for batch in part.choose((256, 1), (4,)):
        part.attempt(f"batch {batch}", partial(profile_batches, part, batch, part.choose(20, 3)))


if __name__ == "__main__":
    sys.exit(run_part(measure))
