"""Open-loop load: requests are sent on a schedule that does not wait for replies, as with
independent users.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests.support.calls import PreparedCall, classify_call, image_call, open_client, run_to_end, send, text_call
from loadtests.support.photos import crops, read_photos
from loadtests.support.picture import draw_quantiles
from loadtests.support.report import environment, quantiles, table, write

LABELS = ("a cat", "a person", "a cup of coffee", "a rocket", "a galaxy", "an eye", "some coins", "a lawn")
TEXTS = (
    "a photo of a cat",
    "a portrait of an astronaut",
    "a cup of coffee on a wooden table",
    "a rocket before its launch",
)


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """The times and status of one request.

    due, sent, done: seconds since the start; stages: the service's own account of it.
    """

    route: str
    due: float
    sent: float
    done: float
    status: int
    stages: dict[str, float]


def prepare(photos: Sequence[bytes], mix: str) -> tuple[list[PreparedCall], list[float]]:
    """(calls, weights) of a mix like `embed/image=8,embed/text=1`; a route's weight is shared by
    its calls.
    """
    kinds = {
        "embed/image": [image_call([photo]) for photo in photos],
        "embed/text": [text_call([text]) for text in TEXTS],
        "classify": [classify_call(photo, LABELS) for photo in photos],
    }
    calls: list[PreparedCall] = []
    weights: list[float] = []
    for entry in mix.split(","):
        route, _, weight = entry.partition("=")
        if route not in kinds:
            raise SystemExit(f"--mix {entry}: the routes are {', '.join(kinds)}")
        calls += kinds[route]
        weights += [float(weight or 1) / len(kinds[route])] * len(kinds[route])
    return calls, weights


def schedule(rate: float, seconds: float, arrivals: str, seed: int) -> list[float]:
    """When each request is due, in seconds.

    poisson: many independent users; constant: one metronome.
    """
    chance = random.Random(seed)
    due, moments = 0.0, []
    while due < seconds:
        moments.append(due)
        due += chance.expovariate(rate) if arrivals == "poisson" else 1 / rate
    return moments


async def send_on_schedule(
    client: httpx.AsyncClient,
    calls: Sequence[PreparedCall],
    weights: Sequence[float],
    moments: Sequence[float],
    seed: int,
) -> list[TimedRequest]:
    """Send one call at each moment, whether or not earlier calls are answered."""
    chance = random.Random(seed)
    samples: list[TimedRequest] = []
    start = time.perf_counter()

    async def fire(call: PreparedCall, due: float) -> None:
        sent = time.perf_counter() - start
        reply = await send(client, call)
        samples.append(TimedRequest(call.route, due, sent, time.perf_counter() - start, reply.status, reply.stages))

    async with asyncio.TaskGroup() as tasks:
        for due in moments:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.create_task(fire(chance.choices(calls, weights)[0], due))
    return samples


def summarise(samples: Sequence[TimedRequest], warmup: float) -> dict[str, Any]:
    """Per route and for all: counts, failures by status, latency from the due time, stages.

    Requests due in the warm-up do not count.
    """
    counted = [sample for sample in samples if sample.due >= warmup]
    routes = sorted({sample.route for sample in counted})
    return {route: _summarise_requests([s for s in counted if route in ("all", s.route)]) for route in ["all", *routes]}


def _summarise_requests(samples: Sequence[TimedRequest]) -> dict[str, Any]:
    good = [s for s in samples if s.status == 200]
    span = max((s.done for s in samples), default=0.0) - min((s.due for s in samples), default=0.0)
    names = {name for s in good for name in s.stages}
    return {
        "sent": len(samples),
        "ok": len(good),
        "failed": {str(status): n for status, n in Counter(s.status for s in samples if s.status != 200).items()},
        "answered_per_s": round(len(good) / span, 3) if span else 0.0,
        "latency_ms": quantiles([s.done - s.due for s in good]),
        "client_lag_ms": quantiles([s.sent - s.due for s in samples]),
        "stages_ms": {name: quantiles([s.stages[name] for s in good if name in s.stages]) for name in sorted(names)},
    }


def show(summary: dict[str, Any]) -> str:
    """The summary as a table; further figures are in the JSON."""
    rows: list[list[object]] = [["route", "sent", "ok", "failed", "per s", "p50 ms", "p95 ms", "p99 ms", "max ms"]]
    for route, of in summary.items():
        latency = [of["latency_ms"].get(name, "-") for name in ("p50", "p95", "p99", "max")]
        rows.append([route, of["sent"], of["ok"], of["sent"] - of["ok"], of["answered_per_s"], *latency])
    return table(rows)


def photos_of(arguments: argparse.Namespace) -> list[bytes]:
    """The given photos, or crops of bundled ones."""
    return read_photos(arguments.image) if arguments.image else [photo for _, photo in crops(64)]


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole test; returns the report."""
    photos = photos_of(arguments)
    calls, weights = prepare(photos, arguments.mix)
    moments = schedule(arguments.rate, arguments.warmup + arguments.seconds, arguments.arrivals, arguments.seed)
    async with open_client(arguments.url, timeout_s=arguments.timeout) as client:
        info = (await client.get("/info")).raise_for_status().json()
        samples = await send_on_schedule(client, calls, weights, moments, arguments.seed)
    settings = {
        name: getattr(arguments, name) for name in ("url", "rate", "seconds", "warmup", "arrivals", "mix", "seed")
    }
    return {
        **environment(),
        "settings": settings,
        "photos": len(photos),
        "service": info,
        "routes": summarise(samples, arguments.warmup),
    }


def add_load(parser: argparse.ArgumentParser, program: str) -> None:
    """Add the options that all open-loop programs share."""
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--warmup", type=float, default=5.0, help="seconds of load before counting")
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        help="photos to send: files, folders, tar shards (default: crops of scikit-image's)",
    )
    parser.add_argument("--mix", default="embed/image=8,embed/text=1,classify=1", help="routes and their weights")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a request counts as failed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(f"loadtests/results/{program}.json"))


def main() -> int:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.steady", description="Open-loop load; latency from the scheduled time."
    )
    add_load(parser, "steady")
    parser.add_argument("--rate", type=float, default=5.0, help="requests per second, all routes together")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    report = run_to_end(run(arguments))
    print(show(report["routes"]))
    write(arguments.out, report)
    draw_quantiles(
        {route: of["latency_ms"] for route, of in report["routes"].items()}, arguments.out.with_suffix(".png")
    )
    return 0 if report["routes"]["all"]["sent"] == report["routes"]["all"]["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
