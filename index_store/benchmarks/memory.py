"""The memory beside bare faiss, in one run on the same rows and the same indexes (`make bench-memory`).

    python -m index_store.benchmarks.memory [--pairs 1000000] [--dim 512] [--repeats 5] [--builds 5]

Figures are medians over the repeats. What is compared takes turns, and a ratio is taken inside a repeat, so that a machine whose speed
drifts does not bend it. Writes JSON and a picture; exits with 1 where a target is missed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_store.benchmarks.editing import ADDED, measure_edits
from index_store.benchmarks.picture import draw
from index_store.benchmarks.synthetic import Collection
from index_store.benchmarks.turns import BATCHES, Search, compare_rates, measure_seconds, median, queries_per_second
from index_store.build.build import build_version
from index_store.build.index import FLAT, empty_index, training_rows
from index_store.search.shard import BLOCK_ROWS, build_flat_index
from index_store.storage.manifest import Manifest, index_file
from index_store.store import Store
from index_store.types import SIDES
from loadtests.report import environment, judged, told, write

ENCODER = "synthetic@0123456789ab"
NAME = "bench"
QUERIES = 1000
K = 10


def measure_build(store: Store, collection: Collection, repeats: int) -> tuple[dict[str, Any], Manifest]:
    """Seconds from ready embeddings to a version that can be opened, and of faiss alone: train, add and write the same indexes."""
    ours, bare = [], []
    for repeat in range(repeats):
        begun = time.perf_counter()
        manifest = build_version(
            store, NAME, f"v{repeat}", collection.blocks(), encoder=ENCODER, kinds={"image": "vector", "text": "vector"}
        )
        ours.append(time.perf_counter() - begun)
        bare.append(_bare_build(collection, manifest.index["recipe"], store.root))
        print(f"build {repeat + 1} of {repeats}: {ours[-1]:.0f} s, faiss alone {bare[-1]:.0f} s", flush=True)
        if repeat < repeats - 1:
            shutil.rmtree(store.path(NAME, manifest.version))
    ratios = [alone / whole for alone, whole in zip(bare, ours, strict=True)]
    medians = {"seconds": median(ours), "bare_seconds": median(bare), "speed_vs_bare": median(ratios)}
    return {**medians, "all_seconds": _rounded(ours), "all_bare_seconds": _rounded(bare)}, manifest


def measure_search(store: Store, manifest: Manifest, collection: Collection, repeats: int) -> dict[str, Any]:
    """Queries per second of an exact flat search, of the version's own index alone, and of retrieve, which also gathers; and recall."""
    snapshot = store.open(NAME, manifest.version, encoder=ENCODER)
    queries, flat = collection.queries("image", QUERIES), build_flat_index(collection.rows["image"])
    index, lists = _bare_index(store, manifest, flat)
    searches: dict[str, Search] = {
        "flat": lambda batch: flat.search(batch, K),
        "bare": lambda batch: index.search(batch, K, params=lists),
        "retrieve": lambda batch: snapshot.retrieve(batch, "image", K),
    }
    exact, found = flat.search(queries, K)[1], snapshot.retrieve(queries, "image", K).ids
    names = [{f"item-{row:09d}" for row in rows} for rows in exact.tolist()]
    recall = statistics.mean(len(known & set(ids)) / K for known, ids in zip(names, found.tolist(), strict=True))
    ratios = {f"retrieve_vs_{name}": ("retrieve", name) for name in ("flat", "bare")}
    measured = {
        f"batch_{batch}": compare_rates(queries_per_second(searches, queries, batch, repeats), ratios)
        for batch in BATCHES
    }
    return {"recall_at_10": round(recall, 4), **measured}


def measure_open(store: Store, manifest: Manifest, repeats: int) -> dict[str, Any]:
    """Seconds to open a version that was just built, and to read every byte of it, as happens behind its back."""
    opened = [measure_seconds(lambda: store.open(NAME, manifest.version, encoder=ENCODER)) for _ in range(repeats)]
    return {
        "seconds": median(opened),
        "verify_seconds": round(measure_seconds(lambda: store.verify(NAME, manifest.version)), 3),
    }


def measure_resident(store: Store, manifest: Manifest, collection: Collection) -> dict[str, Any]:
    """Megabytes that opening the version and answering queries on both sides adds to those of Python and faiss, in a process of its own."""
    for side in SIDES:
        np.save(store.root / f"queries-{side}.npy", collection.queries(side, QUERIES // 2))
    command = [
        sys.executable,
        "-m",
        "index_store.benchmarks.resident",
        str(store.root),
        NAME,
        manifest.version,
        ENCODER,
    ]
    warm, cold = [_child(command, store.path(NAME, manifest.version), forget=forget) for forget in (False, True)]
    files = [f"{shard['folder']}/{index_file(side)}" for shard in manifest.shards for side in SIDES]
    index_mb = (
        sum(manifest.files[file]["bytes"] for file in files if file in manifest.files) / 1e6
        + manifest.bytes["resident"] / 1e6
    )
    allowed = 1.1 * index_mb + 100
    return {
        "cold": cold,
        "warm": warm,
        "index_mb": round(index_mb, 1),
        "of_allowed": round(cold["taken_mb"] / allowed, 3),
    }


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that has a target: figure, value, target, and whether it was reached."""
    search, edits = report["search"], report["edits"]
    goals = [("recall@10 of retrieve", search["recall_at_10"], ">=", 0.99)]
    for batch in (f"batch_{size}" for size in BATCHES):
        goals += [
            (f"retrieve / flat, {batch}", search[batch]["retrieve_vs_flat"], ">=", 10),
            (f"retrieve / bare, {batch}", search[batch]["retrieve_vs_bare"], ">=", 0.9),
            (f"slowed by a tail, {batch}", edits[batch]["slowed"], "<=", 1.15),
        ]
    goals += [
        ("durable adds per s", edits["durable_adds_per_s"], ">=", 500),
        ("open, s", report["open"]["seconds"], "<=", 2),
        ("resident / (1.1 index + 100 MB)", report["resident"]["of_allowed"], "<=", 1),
        ("build / bare train+add+write", report["build"]["speed_vs_bare"], ">=", 0.5),
    ]
    return judged(goals)


def main() -> int:
    """Build, measure, tell."""
    args = _arguments()
    report = {
        **environment("index_store.benchmarks"),
        "settings": {name: str(value) for name, value in vars(args).items()},
    }
    shutil.rmtree(args.store, ignore_errors=True)
    store, collection = Store(args.store), Collection(args.pairs, args.dim)
    args.store.mkdir(parents=True)
    report["build"], manifest = measure_build(store, collection, args.builds)
    report["index"] = manifest.index
    report["search"] = measure_search(store, manifest, collection, args.repeats)
    report["open"] = measure_open(store, manifest, args.repeats)
    report["resident"] = measure_resident(store, manifest, collection)
    report["edits"] = measure_edits(
        store, manifest, collection.fresh(ADDED), collection.queries("image", QUERIES), K, args.repeats
    )
    report["targets"] = verdicts(report)
    print(told(report["targets"]))
    write(args.out, report)
    draw(report, args.out.with_suffix(".png"))
    shutil.rmtree(args.store)
    return 0 if all(row["reached"] for row in report["targets"]) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The memory beside bare faiss.")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--builds", type=int, default=5)
    parser.add_argument("--store", type=Path, default=Path("var/bench-memory"), help="emptied before and after")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/memory.json"))
    return parser.parse_args()


def _child(command: list[str], version: Path, *, forget: bool) -> dict[str, Any]:
    """What the child tells, where the system has forgotten the version's files or has just read them.

    Forgotten is the rule after a start, and what counts: of files in its cache the system maps far more than is touched, as that is free.
    """
    if forget:
        for path in filter(Path.is_file, version.rglob("*")):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    told: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return told


def _bare_build(collection: Collection, recipe: str, folder: Path) -> float:
    """Seconds that faiss takes for both sides, from the same float16 rows in the same blocks."""
    begun = time.perf_counter()
    for side in SIDES:
        rows, index = collection.rows[side], empty_index(recipe, collection.dim)
        index.train(training_rows(rows, index))
        for start in range(0, len(rows), BLOCK_ROWS):
            index.add(rows[start : start + BLOCK_ROWS].astype(np.float32))
        faiss.write_index(index, str(folder / index_file(side)))
    return time.perf_counter() - begun


def _bare_index(
    store: Store, manifest: Manifest, flat: faiss.Index
) -> tuple[faiss.Index, faiss.SearchParameters | None]:
    """The version's own index of the image side, as faiss opens it, and how it is to be searched."""
    if manifest.index["recipe"] == FLAT:
        return flat, None
    (shard,) = manifest.shards
    path = store.path(NAME, manifest.version) / shard["folder"] / index_file("image")
    lists = faiss.SearchParametersIVF()
    lists.nprobe = manifest.index["probes"]
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), lists


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


if __name__ == "__main__":
    sys.exit(main())
