"""The store against bare faiss on the same rows and indexes, in one run (`make bench-memory`).

    python -m index_store.benchmarks.memory [--pairs 1000000] [--dim 512] [--repeats 5] [--builds 5]

Figures are medians over the repeats. Searches that are compared alternate in short slices, and
ratios are taken within a repeat, so that a drift of the machine's speed cancels out. Writes JSON
and a picture; exits with 1 where a target is missed.
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

from index_store.benchmarks.editing import ADDED_PAIRS, measure_edits
from index_store.benchmarks.picture import draw
from index_store.benchmarks.synthetic import SyntheticPairs
from index_store.benchmarks.turns import BATCHES, Search, compare_rates, measure_seconds, median, queries_per_second
from index_store.build.build import build_version
from index_store.build.index import FLAT, empty_index, training_rows
from index_store.search.shard import BLOCK_ROWS, build_flat_index
from index_store.storage.manifest import Manifest, index_file
from index_store.store import Store
from index_store.types import SIDES
from loadtests.support.report import compare_to_targets, environment, format_verdicts, write

ENCODER = "synthetic@0123456789ab"
NAME = "bench"
QUERIES = 1000
K = 10


def measure_build(store: Store, collection: SyntheticPairs, repeats: int) -> tuple[dict[str, Any], Manifest]:
    """Seconds from embeddings to a finished version, and of faiss alone with the same indexes.

    Faiss alone trains, adds and writes them.
    """
    ours, bare = [], []
    for repeat in range(repeats):
        begun = time.perf_counter()
        manifest = build_version(
            store, NAME, f"v{repeat}", collection.blocks(), encoder=ENCODER, kinds={"image": "vector", "text": "vector"}
        )
        ours.append(time.perf_counter() - begun)
        bare.append(_measure_bare_build(collection, manifest.index["recipe"], store.root))
        print(f"build {repeat + 1} of {repeats}: {ours[-1]:.0f} s, faiss alone {bare[-1]:.0f} s", flush=True)
        if repeat < repeats - 1:
            shutil.rmtree(store.path(NAME, manifest.version))
    ratios = [alone / whole for alone, whole in zip(bare, ours, strict=True)]
    medians = {"seconds": median(ours), "bare_seconds": median(bare), "speed_vs_bare": median(ratios)}
    return {**medians, "all_seconds": _round_all(ours), "all_bare_seconds": _round_all(bare)}, manifest


def measure_search(store: Store, manifest: Manifest, collection: SyntheticPairs, repeats: int) -> dict[str, Any]:
    """Queries per second of a flat search, the version's bare index, and `retrieve`; and recall.

    Only `retrieve` also gathers ids and vectors.
    """
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
    """Seconds to open a version that was just built, and to verify every byte of it."""
    opened = [measure_seconds(lambda: store.open(NAME, manifest.version, encoder=ENCODER)) for _ in range(repeats)]
    return {
        "seconds": median(opened),
        "verify_seconds": round(measure_seconds(lambda: store.verify(NAME, manifest.version)), 3),
    }


def measure_resident(store: Store, manifest: Manifest, collection: SyntheticPairs) -> dict[str, Any]:
    """Megabytes that opening the version and searching both sides adds to a new process."""
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
    warm, cold = [_run_child(command, store.path(NAME, manifest.version), forget=forget) for forget in (False, True)]
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
    """The figures with a target: figure, value, target, and whether it was reached."""
    search, edits = report["search"], report["edits"]
    goals = [("recall@10 of retrieve", search["recall_at_10"], ">=", 0.99)]
    for batch in (f"batch_{size}" for size in BATCHES):
        goals += [
            (f"retrieve / flat, {batch}", search[batch]["retrieve_vs_flat"], ">=", 10),
            (f"retrieve / bare, {batch}", search[batch]["retrieve_vs_bare"], ">=", 0.9),
            (f"slowed by a delta, {batch}", edits[batch]["slowed"], "<=", 1.15),
        ]
    goals += [
        ("durable adds per s", edits["durable_adds_per_s"], ">=", 500),
        ("open, s", report["open"]["seconds"], "<=", 2),
        ("resident / (1.1 index + 100 MB)", report["resident"]["of_allowed"], "<=", 1),
        ("build / bare train+add+write", report["build"]["speed_vs_bare"], ">=", 0.5),
    ]
    return compare_to_targets(goals)


def main() -> int:
    """Build a memory, measure, and print and write the results."""
    args = _arguments()
    report = {
        **environment("index_store.benchmarks"),
        "settings": {name: str(value) for name, value in vars(args).items()},
    }
    shutil.rmtree(args.store, ignore_errors=True)
    store, collection = Store(args.store), SyntheticPairs(args.pairs, args.dim)
    args.store.mkdir(parents=True)
    report["build"], manifest = measure_build(store, collection, args.builds)
    report["index"] = manifest.index
    report["search"] = measure_search(store, manifest, collection, args.repeats)
    report["open"] = measure_open(store, manifest, args.repeats)
    report["resident"] = measure_resident(store, manifest, collection)
    report["edits"] = measure_edits(
        store, manifest, collection.additional_pairs(ADDED_PAIRS), collection.queries("image", QUERIES), K, args.repeats
    )
    report["targets"] = verdicts(report)
    print(format_verdicts(report["targets"]))
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


def _run_child(command: list[str], version: Path, *, forget: bool) -> dict[str, Any]:
    """The JSON that a child process prints; `forget` drops the version's files from the page cache.

    Cold files are the rule after a start. Of files in the cache the system maps far more pages than
    are touched, so that warm figures are larger.
    """
    if forget:
        for path in filter(Path.is_file, version.rglob("*")):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    told: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return told


def _measure_bare_build(collection: SyntheticPairs, recipe: str, folder: Path) -> float:
    """Seconds that faiss takes to index both sides from the same float16 rows and blocks."""
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
    """The version's image index as faiss opens it, and its search parameters."""
    if manifest.index["recipe"] == FLAT:
        return flat, None
    (shard,) = manifest.shards
    path = store.path(NAME, manifest.version) / shard["folder"] / index_file("image")
    lists = faiss.SearchParametersIVF()
    lists.nprobe = manifest.index["probes"]
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), lists


def _round_all(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


if __name__ == "__main__":
    sys.exit(main())
