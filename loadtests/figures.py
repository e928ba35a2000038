"""What `bench` measures: each figure beside its yardstick, in turn, never at once.

Ratios are taken inside a round, against yardsticks measured before and after, so that a machine whose speed drifts does not bend them.
A function returns what it measured and the goals that this is judged by.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from loadtests.calls import Call, Reply, Unexpected, image_call, open_client, run_to_end, send, text_call
from loadtests.closed_loop import closed_loop
from loadtests.gauges import samples
from loadtests.report import Goal, quantiles
from loadtests.serving import service
from loadtests.steady import Sample, drive, schedule
from loadtests.yardstick import Yardstick

__all__ = ["Bench", "Measured", "cold_start", "flood", "many_photos", "one_photo", "short_texts", "throughput"]

Measured = tuple[dict[str, Any], list[Goal]]

LOADS = {
    "plain at 32": (32, 0.95),
    "enhanced at 32": (32, 0.90),
    "plain at 8": (8, 0.90),
    "enhanced at 8": (8, 0.90),
}  # at once, share of raw
WORDS = ("cat", "dog", "bird", "car", "bus", "apple", "pear", "lemon", "bread", "milk", "juice", "rice", "chair", "lamp", "table", "shoe")
LABELS = [f"a photo of a {look} {word}" for look in ("red", "small") for word in WORDS]
MANY = 64  # photos of one request
ASKED = 5  # requests in a row of each round of `one_photo`
QUEUE = 32  # items that the flooded service admits
FLOOD = 10  # times the capacity
PATIENCE_S = 1.0  # after the last reply of the flood
INSIDE = ("decode", "encode", "retrieve")  # stages that are not the service's own


@dataclass(frozen=True, slots=True)
class Bench:
    """A running service and its yardstick.

    batch: the yardstick's best.  memory: what enhances.  repeats: rounds.  seconds, warmup: of each load in a round.
    """

    url: str
    yardstick: Yardstick
    batch: int
    memory: str
    photos: Sequence[bytes]
    repeats: int
    seconds: float
    warmup: float

    def raw(self) -> float:
        """Images per second of the bare tower now."""
        return self.yardstick.images(self.batch, self.seconds / 2)["images_per_s"]

    def options(self, name: str) -> dict[str, object]:
        """Of a request, by the first word of the load's name."""
        return {"enhance": False} if name.startswith("plain") else {"memory": self.memory}


def throughput(bench: Bench) -> Measured:
    """Images per second through HTTP, one photo per request, against the bare tower."""
    rounds = []
    for number in range(bench.repeats):
        raw, entry = [bench.raw()], dict[str, Any]()
        for name, (concurrency, _) in LOADS.items():
            calls = [image_call([photo], **bench.options(name)) for photo in bench.photos]
            entry[name] = run_to_end(closed_loop(bench.url, calls, concurrency, bench.seconds, bench.warmup))
            raw.append(bench.raw())
            entry[name]["ratio"] = entry[name]["images_per_s"] / statistics.mean(raw[-2:])
        rounds.append({"raw_images_per_s": raw, **entry})
        print(f"throughput {number + 1}: " + ", ".join(f"{name} {entry[name]['ratio']:.3f}" for name in LOADS), flush=True)
    ratios = {name: middle([entry[name]["ratio"] for entry in rounds]) for name in LOADS}
    goals: list[Goal] = [(f"{name} / raw", ratios[name]["median"], ">=", goal) for name, (_, goal) in LOADS.items()]
    raws = middle([rate for entry in rounds for rate in entry["raw_images_per_s"]])
    return {"raw_images_per_s": raws, "ratios": ratios, "rounds": rounds}, goals


def one_photo(bench: Bench) -> Measured:
    """Latency of a caller who is alone, and what of it is neither decoding, encoding nor searching."""
    names = ("plain", "enhanced")
    calls = {name: [image_call([photo], **bench.options(name)) for photo in bench.photos[:ASKED]] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    own: dict[str, list[float]] = {name: [] for name in names}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(4 * bench.repeats):
        before = _raw_photo(bench)
        for name in names:
            visits = run_to_end(_alone(bench.url, calls[name]))
            after = _raw_photo(bench)
            ratios[name].append(statistics.median(visit.felt for visit in visits) / statistics.mean((before, after)))
            own[name] += [visit.inside - sum(visit.stages.get(stage, 0.0) for stage in INSIDE) for visit in visits]
            stages[name] += [visit.stages for visit in visits]
            before = after
    found: dict[str, Any] = {
        name: {"p50_over_raw": middle(ratios[name]), "own_ms": quantiles(own[name]), "stages_ms": _medians(stages[name])} for name in names
    }
    goals: list[Goal] = [
        ("p50 alone / (decode + raw forward)", found["plain"]["p50_over_raw"]["median"], "<=", 1.10),
        ("own time of an enhanced request, ms (p50)", found["enhanced"]["own_ms"]["p50"], "<=", 2.0),
    ]
    return found, goals


def short_texts(bench: Bench) -> Measured:
    """32 short labels in one request, against open_clip's own text encoding at the full context length."""
    call, ratios, cosines = text_call(LABELS, enhance=False), [], []
    run_to_end(_alone(bench.url, [call]))
    for _ in range(bench.repeats):
        before, vectors = bench.yardstick.texts(LABELS)
        visit = run_to_end(_alone(bench.url, [call]))[0]
        after, _ = bench.yardstick.texts(LABELS)
        ratios.append(statistics.mean((before, after)) / visit.felt)
        served = np.asarray([row["embedding"] for row in visit.reply.json()["data"]], np.float32)
        cosines.append(float((served * vectors).sum(axis=1).min()))
    speed = middle(ratios)
    goals: list[Goal] = [("short labels / encode_text", speed["median"], ">=", 4.0), ("their least cosine", min(cosines), ">=", 0.99999)]
    return {"speed": speed, "least_cosine": round(min(cosines), 7)}, goals


def many_photos(bench: Bench) -> Measured:
    """One request of 64 photos, against the bare tower."""
    call = image_call([bench.photos[i % len(bench.photos)] for i in range(MANY)], enhance=False)
    ratios, raw = [], [bench.raw()]
    for _ in range(bench.repeats):
        felt = run_to_end(_alone(bench.url, [call]))[0].felt
        raw.append(bench.raw())
        ratios.append(MANY / felt / statistics.mean(raw[-2:]))
    return {"ratio": middle(ratios)}, [(f"{MANY} photos at once / raw", statistics.median(ratios), ">=", 0.95)]


def flood(environ: Mapping[str, str], log: Path, photos: Sequence[bytes], seconds: float) -> Measured:
    """Ten times as many photos as the service can encode: who is admitted, who is refused and how fast, and what it is like afterwards."""
    limits = {"RECO_MAX_QUEUE": str(QUEUE), "RECO_MAX_ITEMS": str(QUEUE)}
    calls = [image_call([photo], enhance=False) for photo in photos]
    with service({**environ, **limits}, log) as served:
        capacity = run_to_end(closed_loop(served.url, calls, QUEUE // 2, seconds, warmup=2.0))["images_per_s"]
        calm = statistics.median(visit.felt for visit in run_to_end(_alone(served.url, calls[:10])))
        moments = schedule(FLOOD * capacity, seconds, "poisson", 0)
        flooded = run_to_end(_flooded(served.url, calls, moments))
        time.sleep(PATIENCE_S)
        again = statistics.median(visit.felt for visit in run_to_end(_alone(served.url, calls[:10])))
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


def cold_start(environ: Mapping[str, str], log: Path, model: str, threads: int, repeats: int) -> Measured:
    """From the start of the process to /readyz, against importing torch and open_clip and building the same model."""
    served, bare = [], [_bare_start(model, threads)]
    for _ in range(repeats):
        with service(environ, log) as started:
            served.append(started.ready_s)
        bare.append(_bare_start(model, threads))
    ratios = [ours / statistics.mean(around) for ours, around in zip(served, pairwise(bare), strict=True)]
    found = {"ready_s": middle(served), "bare_s": middle(bare), "ratio": middle(ratios)}
    return found, [("cold start / bare load", found["ratio"]["median"], "<=", 1.2)]


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


@dataclass(frozen=True, slots=True)
class _Visit:
    """One request of a caller who is alone, in seconds: felt by the client, inside by the service's own clock, and per stage."""

    reply: Reply
    felt: float
    inside: float

    @property
    def stages(self) -> dict[str, float]:
        """By the service's own clock."""
        return self.reply.stages


async def _alone(url: str, calls: Sequence[Call]) -> list[_Visit]:
    """One call after the other, each answered with 200."""
    visits = []
    async with open_client(url) as client:
        before = await _inside(client, calls[0].route)
        for call in calls:
            begun = time.perf_counter()
            reply = await send(client, call)
            felt = time.perf_counter() - begun
            if reply.status != 200:
                raise Unexpected(f"{call.path}: {reply.status} {reply.content[:300]!r}")
            after = await _inside(client, call.route)
            visits.append(_Visit(reply, felt, after - before))
            before = after
    return visits


async def _inside(client: httpx.AsyncClient, route: str) -> float:
    """Seconds that the service has spent on requests of this route so far."""
    spent = [
        s.value for s in await samples(client) if s.name == "reco_request_duration_seconds_sum" and s.labels["endpoint"] == f"/{route}"
    ]
    return sum(spent)


async def _flooded(url: str, calls: Sequence[Call], moments: Sequence[float]) -> list[Sample]:
    async with open_client(url, timeout_s=300.0) as client:
        return await drive(client, calls, [1.0] * len(calls), moments, seed=0)


def _raw_photo(bench: Bench) -> float:
    """Seconds of the yardstick for one photo, the median of a few."""
    return statistics.median(bench.yardstick.photo(photo) for photo in bench.photos[:ASKED])


def _bare_start(model: str, threads: int) -> float:
    with Yardstick(model, threads) as started:
        return started.ready_s


def _medians(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Milliseconds of each stage, the median over requests."""
    return {name: round(1000 * statistics.median(of.get(name, 0.0) for of in stages), 3) for name in stages[0]}
