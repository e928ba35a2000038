"""Figures of `bench`, each measured in alternation with the bare model."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtests.compare.alone import ProfiledRequest, median_profile, profile_lone_caller
from loadtests.compare.bare_model import BareModel
from loadtests.support.calls import image_call, run_to_end, text_call
from loadtests.support.closed_loop import closed_loop
from loadtests.support.report import ROOT, Goal, median_and_spread, quantiles, table

__all__ = [
    "BenchContext",
    "Measured",
    "by_concurrency",
    "labels",
    "many_photos",
    "one_photo",
    "short_texts",
    "throughput",
]

Measured = tuple[dict[str, Any], list[Goal]]

LOADS = {
    "plain at 32": (32, 0.95),
    "enhanced at 32": (32, 0.90),
    "plain at 8": (8, 0.90),
    "enhanced at 8": (8, 0.90),
}  # at once, share of raw
WORDS = [
    "cat",
    "dog",
    "bird",
    "car",
    "bus",
    "apple",
    "pear",
    "lemon",
    "bread",
    "milk",
    "juice",
    "rice",
    "chair",
    "lamp",
    "table",
    "shoe",
]
LABELS = [f"a photo of a {look} {word}" for look in ("red", "small") for word in WORDS]
AT_ONCE = {"cpu": (1, 2, 8, 32), "cuda": (1, 8, 32, 128, 512)}  # callers of `by_concurrency`
MANY = 64  # photos of one request
ASKED = 5  # requests in a row of each round of `one_photo`
INSIDE = ("decode", "encode", "retrieve")  # stages that are not the service's own


@dataclass(frozen=True, slots=True)
class BenchContext:
    """A running service and the bare model.

    batch: the bare model's best batch size.  device: of both.  memory: the memory that enhances.
    """

    url: str
    bare_model: BareModel
    batch: int
    device: str
    memory: str
    photos: Sequence[bytes]
    repeats: int
    seconds: float
    warmup: float

    def raw(self) -> float:
        """Images per second of the bare tower."""
        return self.bare_model.images(self.batch, self.seconds / 2)["images_per_s"]

    def ceiling(self) -> float:
        """Photos per second that all cores can decode."""
        return self.bare_model.decoding(self.photos, os.cpu_count() or 1, self.seconds / 2)

    def options(self, name: str) -> dict[str, object]:
        """Request options, by the first word of the load's name."""
        return {"enhance": False} if name.startswith("plain") else {"memory": self.memory}


def throughput(bench: BenchContext) -> Measured:
    """Images per second through HTTP, one photo per request, against the bare tower; on a GPU
    against the decoder where that is slower.
    """
    rounds = []
    for number in range(bench.repeats):
        raw, entry = [bench.raw()], dict[str, Any]()
        decoder = bench.ceiling()
        for name, (concurrency, _) in LOADS.items():
            calls = [image_call([photo], **bench.options(name)) for photo in bench.photos]
            entry[name] = run_to_end(closed_loop(bench.url, calls, concurrency, bench.seconds, bench.warmup))
            raw.append(bench.raw())
            bound = statistics.mean(raw[-2:])
            entry[name]["ratio"] = entry[name]["images_per_s"] / (
                bound if bench.device == "cpu" else min(bound, decoder)
            )
        rounds.append({"raw_images_per_s": raw, "decoder_photos_per_s": decoder, **entry})
        print(
            f"throughput {number + 1}: " + ", ".join(f"{name} {entry[name]['ratio']:.3f}" for name in LOADS), flush=True
        )
    ratios = {name: median_and_spread([entry[name]["ratio"] for entry in rounds]) for name in LOADS}
    goals: list[Goal] = [(f"{name} / raw", ratios[name]["median"], ">=", goal) for name, (_, goal) in LOADS.items()]
    raws = median_and_spread([rate for entry in rounds for rate in entry["raw_images_per_s"]])
    decoders = median_and_spread([entry["decoder_photos_per_s"] for entry in rounds])
    return {"raw_images_per_s": raws, "decoder_photos_per_s": decoders, "ratios": ratios, "rounds": rounds}, goals


def by_concurrency(bench: BenchContext) -> Measured:
    """Throughput and latency by number of concurrent callers, without targets."""
    calls = [image_call([photo], memory=bench.memory) for photo in bench.photos]
    rows = []
    for callers in AT_ONCE[bench.device]:
        found = run_to_end(closed_loop(bench.url, calls, callers, bench.seconds, bench.warmup))
        rows.append({"callers": callers, **found})
    shown = [
        [row["callers"], row["images_per_s"], *(row["latency_ms"][q] for q in ("p50", "p99")), row["mean_batch"]]
        for row in rows
    ]
    print(table([["callers", "images/s", "p50 ms", "p99 ms", "mean batch"], *shown]), flush=True)
    return {"rows": rows}, []


def one_photo(bench: BenchContext) -> Measured:
    """Latency of a single caller, and its part outside decoding, encoding and search."""
    names = ("plain", "enhanced")
    calls = {name: [image_call([photo], **bench.options(name)) for photo in bench.photos[:ASKED]] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    visits: dict[str, list[ProfiledRequest]] = {name: [] for name in names}
    for _ in range(4 * bench.repeats):
        before = _raw_photo(bench)
        for name in names:
            these = run_to_end(profile_lone_caller(bench.url, calls[name]))
            after = _raw_photo(bench)
            ratios[name].append(statistics.median(visit.felt for visit in these) / statistics.mean((before, after)))
            visits[name] += these
            before = after
    found = {name: _describe_visits(visits[name], ratios[name]) for name in names}
    _print_profiles(found)
    goals: list[Goal] = [
        ("p50 alone / (decode + raw forward)", found["plain"]["p50_over_raw"]["median"], "<=", 1.10),
        ("own time of an enhanced request, ms (p50)", found["enhanced"]["own_ms"]["p50"], "<=", 2.0),
    ]
    return found, goals


def _describe_visits(visits: Sequence[ProfiledRequest], ratios: Sequence[float]) -> dict[str, Any]:
    """Latency over the raw forward, and what is the service's own."""
    own = [visit.inside - sum(visit.stages.get(stage, 0.0) for stage in INSIDE) for visit in visits]
    return {"p50_over_raw": median_and_spread(ratios), "own_ms": quantiles(own), "profile_ms": median_profile(visits)}


def _print_profiles(found: Mapping[str, Mapping[str, Any]]) -> None:
    """A row per stage, a column per kind of request."""
    stages = list(found["enhanced"]["profile_ms"])
    rows = [[stage, *(each["profile_ms"].get(stage, 0.0) for each in found.values())] for stage in stages]
    print(table([["p50, ms", *found], *rows]))


def short_texts(bench: BenchContext) -> Measured:
    """32 short labels in one request, against open_clip's own text encoding at the full context
    length.
    """
    call, ratios, cosines = text_call(LABELS, enhance=False), [], []
    run_to_end(profile_lone_caller(bench.url, [call]))
    for _ in range(bench.repeats):
        before, vectors = bench.bare_model.texts(LABELS)
        visit = run_to_end(profile_lone_caller(bench.url, [call]))[0]
        after, _ = bench.bare_model.texts(LABELS)
        ratios.append(statistics.mean((before, after)) / visit.felt)
        served = np.asarray([row["embedding"] for row in visit.reply.json()["data"]], np.float32)
        cosines.append(float((served * vectors).sum(axis=1).min()))
    speed = median_and_spread(ratios)
    goals: list[Goal] = [
        ("short labels / encode_text", speed["median"], ">=", 4.0),
        ("their least cosine", min(cosines), ">=", 0.99999),
    ]
    return {"speed": speed, "least_cosine": round(min(cosines), 7)}, goals


def many_photos(bench: BenchContext) -> Measured:
    """One request of 64 photos, against the bare tower."""
    call = image_call([bench.photos[i % len(bench.photos)] for i in range(MANY)], enhance=False)
    ratios, raw = [], [bench.raw()]
    for _ in range(bench.repeats):
        felt = run_to_end(profile_lone_caller(bench.url, [call]))[0].felt
        raw.append(bench.raw())
        ratios.append(MANY / felt / statistics.mean(raw[-2:]))
    return {"ratio": median_and_spread(ratios)}, [
        (f"{MANY} photos at once / raw", statistics.median(ratios), ">=", 0.95)
    ]


def labels(count: int, model: str, device: str, precision: str, repeats: int, environ: Mapping[str, str]) -> Measured:
    """One image among so many labels, beside encoding it: measured in a process of its own, not
    over HTTP (`service.benchmarks.labels`).
    """
    command = [
        sys.executable,
        "-m",
        "service.benchmarks.labels",
        "--labels",
        str(count),
        "--model",
        model,
        "--device",
        device,
    ]
    command += ["--precision", precision, "--repeats", str(repeats)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    ratio = found["ratio"] = median_and_spread(found["whole_over_encode"])
    return found, [(f"{count:,} labels: (encode + rank) / encode", ratio["median"], "<=", 2.0)]


def _raw_photo(bench: BenchContext) -> float:
    """Seconds of the bare model for one photo, the median of a few."""
    return statistics.median(bench.bare_model.photo(photo) for photo in bench.photos[:ASKED])
