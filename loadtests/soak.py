"""Constant open-loop load over a long time: finds growth of memory or latency."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx

from loadtests.steady import TimedRequest, add_load, photos_of, prepare, schedule, send_on_schedule, show, summarise
from loadtests.support.calls import open_client, run_to_end
from loadtests.support.gauges import Gauges, growth, read_gauges
from loadtests.support.picture import draw_soak
from loadtests.support.report import Goal, compare_to_targets, environment, format_verdicts, quantiles, write

GROWTH = 0.03
SLOWER = 1.5


async def watch(client: httpx.AsyncClient, every: float) -> list[tuple[float, Gauges]]:
    """Append (seconds since the start, gauges) until cancelled."""
    readings: list[tuple[float, Gauges]] = []
    begun = time.perf_counter()
    try:
        while True:
            readings.append((time.perf_counter() - begun, await read_gauges(client)))
            await asyncio.sleep(every)
    except asyncio.CancelledError:
        return readings


async def run(arguments: argparse.Namespace) -> tuple[list[TimedRequest], list[tuple[float, Gauges]]]:
    """All requests and gauge readings, without those of the warm-up."""
    calls, weights = prepare(photos_of(arguments), arguments.mix)
    moments = schedule(arguments.rate, arguments.warmup + 60 * arguments.minutes, arguments.arrivals, arguments.seed)
    async with open_client(arguments.url, timeout_s=arguments.timeout) as client:
        await read_gauges(client)  # a service that is not there ends the program here
        watching = asyncio.create_task(watch(client, arguments.every))
        samples = await send_on_schedule(client, calls, weights, moments, arguments.seed)
        watching.cancel()
        readings = await watching
    return samples, [(at, reading) for at, reading in readings if at >= arguments.warmup]


def quantiles_of_fifths(samples: Sequence[TimedRequest], warmup: float) -> list[dict[str, float]]:
    """Latency quantiles of each fifth of the time after the warm-up."""
    counted = sorted(
        (sample for sample in samples if sample.due >= warmup and sample.status == 200), key=lambda sample: sample.due
    )
    size = max(1, -(-len(counted) // 5))
    return [
        quantiles([s.done - s.due for s in counted[start : start + size]]) for start in range(0, len(counted), size)
    ]


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure beside its target."""
    of, parts = report["routes"]["all"], report["fifths_ms"]
    goals: list[Goal] = [
        ("failed replies", of["sent"] - of["ok"], "<=", 0),
        ("growth of resident memory", report["resident"]["growth"], "<=", GROWTH),
    ]
    if parts:
        goals.append(("p99, last fifth / first", round(parts[-1]["p99"] / parts[0]["p99"], 3), "<=", SLOWER))
    return compare_to_targets(goals)


def main() -> int:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.soak", description="Load for a long time: nothing may grow or slow down."
    )
    add_load(parser, "soak")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second, all routes together")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two readings of /metrics")
    arguments = parser.parse_args()
    samples, readings = run_to_end(run(arguments))
    report: dict[str, Any] = {
        **environment(),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
    }
    report["routes"], report["fifths_ms"] = (
        summarise(samples, arguments.warmup),
        quantiles_of_fifths(samples, arguments.warmup),
    )
    report["resident"] = growth([reading.resident for _, reading in readings])
    report["readings"] = [
        {"s": round(at, 1), "resident_mb": round(of.resident / 1e6, 1), "snapshots": of.alive} for at, of in readings
    ]
    report["targets"] = verdicts(report)
    print(show(report["routes"]))
    print(format_verdicts(report["targets"]))
    write(arguments.out, report)
    draw_soak(report, arguments.out.with_suffix(".png"))
    return 0 if all(row["reached"] for row in report["targets"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
