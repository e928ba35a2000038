"""A service under overload, and its cold start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from loadtests.compare.alone import profile_lone_caller
from loadtests.compare.bare_model import BareModel
from loadtests.compare.figures import Measured
from loadtests.steady import TimedRequest, schedule, send_on_schedule
from loadtests.support.calls import PreparedCall, image_call, open_client, run_to_end
from loadtests.support.closed_loop import closed_loop
from loadtests.support.report import Goal, median_and_spread, quantiles
from loadtests.support.serving import service

__all__ = ["cold_start", "flood"]

QUEUE = 32  # items that the flooded service admits
FLOOD = 10  # times the capacity
PATIENCE_S = 1.0  # after the last reply of the flood


def flood(environ: Mapping[str, str], log: Path, photos: Sequence[bytes], seconds: float) -> Measured:
    """Send ten times as many photos as the service can encode: admitted, refused, how fast, and
    steady latency afterwards.
    """
    limits = {"RECO_MAX_QUEUE": str(QUEUE), "RECO_MAX_ITEMS": str(QUEUE)}
    calls = [image_call([photo], enhance=False) for photo in photos]
    with service({**environ, **limits}, log) as served:
        capacity = run_to_end(closed_loop(served.url, calls, QUEUE // 2, seconds, warmup=2.0))["images_per_s"]
        calm = statistics.median(visit.felt for visit in run_to_end(profile_lone_caller(served.url, calls[:10])))
        moments = schedule(FLOOD * capacity, seconds, "poisson", 0)
        flooded = run_to_end(_flood_service(served.url, calls, moments))
        time.sleep(PATIENCE_S)
        again = statistics.median(visit.felt for visit in run_to_end(profile_lone_caller(served.url, calls[:10])))
    admitted = [sample.done - sample.sent for sample in flooded if sample.status == 200]
    refused = [sample.done - sample.sent for sample in flooded if sample.status == 429]
    bound = QUEUE / capacity
    found: dict[str, Any] = {
        "capacity_images_per_s": round(capacity, 2),
        "queue_bound_s": round(bound, 3),
        "sent": len(flooded),
        "admitted": len(admitted),
        "refused": len(refused),
        "admitted_ms": quantiles(admitted),
        "refused_ms": quantiles(refused),
        "client_lag_ms": quantiles([sample.sent - sample.due for sample in flooded]),
        "alone_ms": {"before": round(1000 * calm, 1), "after": round(1000 * again, 1)},
    }
    goals: list[Goal] = [
        ("flood: neither answered nor refused", len(flooded) - len(admitted) - len(refused), "<=", 0),
        ("flood: p99 of the admitted / queue bound", found["admitted_ms"]["p99"] / 1000 / bound, "<=", 2.0),
        ("flood: a refusal takes, ms (p99)", found["refused_ms"].get("p99", 0.0), "<=", 50.0),
        (f"flood: p50 alone {PATIENCE_S:g} s later / before", again / calm, "<=", 1.25),
    ]
    return found, goals


def cold_start(environ: Mapping[str, str], log: Path, bare_start: Callable[[], BareModel], repeats: int) -> Measured:
    """From the start of the process to /readyz, against importing torch and open_clip and building
    the same model.
    """
    served, bare = [], [_seconds_until_ready(bare_start)]
    for _ in range(repeats):
        with service(environ, log) as started:
            served.append(started.ready_s)
        bare.append(_seconds_until_ready(bare_start))
    ratios = [ours / statistics.mean(around) for ours, around in zip(served, pairwise(bare), strict=True)]
    found = {
        "ready_s": median_and_spread(served),
        "bare_s": median_and_spread(bare),
        "ratio": median_and_spread(ratios),
    }
    return found, [("cold start / bare load", found["ratio"]["median"], "<=", 1.2)]


async def _flood_service(url: str, calls: Sequence[PreparedCall], moments: Sequence[float]) -> list[TimedRequest]:
    async with open_client(url, timeout_s=300.0) as client:
        return await send_on_schedule(client, calls, [1.0] * len(calls), moments, seed=0)


def _seconds_until_ready(start: Callable[[], BareModel]) -> float:
    with start() as started:
        return started.ready_s
