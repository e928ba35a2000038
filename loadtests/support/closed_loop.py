"""Closed-loop load of single-photo requests: each worker sends its next request after the last
reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from loadtests.support.calls import PreparedCall, TimedReply, Unexpected, open_client, send
from loadtests.support.gauges import batches_between, image_totals, samples
from loadtests.support.report import quantiles

__all__ = ["closed_loop", "slope"]


async def closed_loop(
    url: str, calls: Sequence[PreparedCall], concurrency: int, seconds: float, warmup: float
) -> dict[str, Any]:
    """Images per second, latency, and the service's own metrics of the same time."""
    ends: list[float] = []
    spent: list[float] = []
    bad: list[TimedReply] = []

    async def work(client: httpx.AsyncClient, turn: int, until: float) -> None:
        while time.perf_counter() < until:
            begun = time.perf_counter()
            reply = await send(client, calls[turn % len(calls)])
            if reply.status != 200 or bad:
                bad.append(reply)
                return
            ends.append(time.perf_counter())
            spent.append(ends[-1] - begun)
            turn += concurrency

    async with open_client(url) as client:
        before, cpu, start = image_totals(await samples(client)), time.process_time(), time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for worker in range(concurrency):
                tasks.create_task(work(client, worker, start + warmup + seconds))
        cpu, after = time.process_time() - cpu, image_totals(await samples(client))
    if bad:
        raise Unexpected(f"{calls[0].path}: {bad[0].status} {bad[0].content[:300]!r}")
    counted = [end for end in ends if start + warmup <= end <= start + warmup + seconds]
    if len(counted) < 2 * concurrency:
        raise Unexpected(
            f"{calls[0].path}: {len(counted)} replies in {seconds:g} s are too few to measure: give more --seconds"
        )
    latency = quantiles([one for one, end in zip(spent, ends, strict=True) if start + warmup <= end])
    told = {"images_per_s": slope(counted), "latency_ms": latency, **batches_between(before, after)}
    return {**told, "client_cpu_ms_per_image": round(1000 * cpu / len(ends), 2)}


def slope(ends: Sequence[float]) -> float:
    """Replies per second by least squares, since replies come in bursts of a batch."""
    return float(np.polyfit(np.asarray(ends) - ends[0], np.arange(len(ends)), 1)[0])
