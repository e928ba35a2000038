"""Bytes per pair and time per row on this machine: the constants of docs/concepts/scale.md.

    python -m index_store.benchmarks.constants [--rows 100000]
        [--out loadtests/results/constants.json]

Processor costs are nanoseconds of one core, measured as processor time of one thread, so that other
load does not change them. Disk costs are wall time. The tables computed from these constants are
printed as Markdown.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_store.benchmarks.synthetic import SyntheticPairs
from index_store.build.index import empty_index
from index_store.storage.atomic import file_digest
from loadtests.support.report import environment, write

DIMS = (512, 768)
SIZES = {"1 M": 10**6, "100 M": 10**8, "1 B": 10**9}
BATCH = 32
K = 10
PROBES = 32  # lists visited of 4 sqrt(N), enough for recall 0.99 of a million synthetic pairs
PQ_BYTES = 64  # code bytes per row and side
ID_BYTES = 8  # bytes of the id that faiss stores beside a row in a list
REST_BYTES = 110  # bytes of a pair without vectors: id 14, order 8, record offset 8, record 80
GPU, GPU_BANDWIDTH, GPU_BYTES = "H200", 4.8e12, 141e9  # bytes/s and bytes, from its data sheet, not measured


def measure(rows: int, folder: Path) -> dict[str, Any]:
    """Measure all constants: {"cpu_ns": {D: {name: nanoseconds}}, "disk": {…}}."""
    faiss.omp_set_num_threads(1)
    return {"cpu_ns": {str(dim): _measure_cpu(rows, dim) for dim in DIMS}, "disk": _measure_disk(folder)}


def _measure_cpu(rows: int, dim: int) -> dict[str, float]:
    """Nanoseconds of one core per row and query, by kind of index."""
    collection = SyntheticPairs(rows, dim)
    stored, queries = collection.rows["image"].astype(np.float32), collection.queries("image", BATCH)
    found = {}
    for name, recipe in (("flat32", "Flat"), ("flat16", "SQfp16"), ("pq", f"PQ{PQ_BYTES}")):
        index = empty_index(recipe, dim)
        index.train(stored[:16_384])
        index.add(stored)
        found[name] = _cpu_s(lambda index=index: index.search(queries, K)) / (len(queries) * rows) * 1e9  # type: ignore[misc]
    lists = empty_index("IVF64,SQfp16", dim)
    lists.train(stored[:16_384])
    lists.add(stored)
    every = faiss.SearchParametersIVF()
    every.nprobe = 64
    found["list16"] = _cpu_s(lambda: lists.search(queries, K, params=every)) / (len(queries) * rows) * 1e9
    found["gather"] = _cpu_s(lambda: collection.rows["text"][:: rows // 320][:320].astype(np.float32)) / 320 * 1e9
    return {name: round(value, 3) for name, value in found.items()}


def _measure_disk(folder: Path) -> dict[str, float]:
    """Microseconds of a random read of 4 KiB from the disk, alone and beside 31 others.

    Also the bytes verified per second.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        block = np.random.default_rng(0).bytes(1 << 24)
        for _ in range(64):  # 1 GiB
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        size, rng = 1 << 30, np.random.default_rng(1)
        begun = time.perf_counter()
        file_digest(Path(file.name))
        through = size / (time.perf_counter() - begun)

        def read(offset: int) -> None:
            os.pread(file.fileno(), 4096, offset * 4096)

        def read_randomly(count: int, threads: int) -> float:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            offsets = rng.integers(size // 4096, size=count).tolist()
            begun = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, offsets))
            return (time.perf_counter() - begun) / count * 1e6

        one, many = (statistics.median(read_randomly(1000, threads) for _ in range(5)) for threads in (1, 32))
    return {"read_us": round(one, 1), "read_us_of_32": round(many, 1), "verify_bytes_per_s": round(through)}


def table(constants: dict[str, Any]) -> str:
    """The Markdown table of docs/concepts/scale.md.

    Bytes and milliseconds per query by recipe, number of pairs and width.
    """
    head = ["pairs", "D", "values + rest on disk", "recipe", "index bytes", "where", "ms of one core per query", "note"]
    rows = [head, ["---"] * len(head)]
    for name, pairs in SIZES.items():
        for dim in DIMS:
            ns, read = constants["cpu_ns"][str(dim)], constants["disk"]["read_us_of_32"]
            lists = 4 * pairs**0.5
            coarse, visited = lists * ns["flat32"], PROBES * pairs / lists
            gather = K * ns["gather"] / 1e6
            disk = _bytes(pairs * (4 * dim + REST_BYTES))
            gpus = -(-pairs * 4 * dim // (0.8 * GPU_BYTES))
            flat, lists_fp16, lists_pq = (
                4 * dim * pairs,
                2 * pairs * (2 * dim + ID_BYTES),
                2 * pairs * (PQ_BYTES + ID_BYTES),
            )
            flat_ms = pairs * ns["flat16"] / 1e6 + gather
            lists_ms, pq_ms = ((coarse + visited * ns[name]) / 1e6 + gather for name in ("list16", "pq"))
            gpu_ms = pairs * 2 * dim / GPU_BANDWIDTH / gpus * 1000
            for recipe, index, where, ms, note in (
                ("flat fp16", flat, "RAM", flat_ms, "exact"),
                ("IVF, fp16", lists_fp16, "RAM", lists_ms, f"{PROBES} lists"),
                ("IVF-PQ64 + values on NVMe", lists_pq, "RAM", pq_ms, f"+ {K * read / 1000:.1f} ms of reads"),
                ("GPU flat fp16", flat, f"{gpus:.0f} x {GPU}", gpu_ms, "per batch; data sheet"),
            ):
                rows.append([name, str(dim), disk, recipe, _bytes(index), where, f"{ms:,.2f}", note])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Measure the constants, print them and the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--folder", type=Path, default=Path("var"), help="a folder on the disk that will hold the memory"
    )
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/constants.json"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    constants = measure(args.rows, args.folder)
    print(constants, "\n")
    print(table(constants))
    write(args.out, {**environment("index_store.benchmarks"), **constants})


def _cpu_s(work: Callable[[], object], repeats: int = 5) -> float:
    """Median processor seconds of this process over `repeats` calls."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def _bytes(count: float) -> str:
    for unit in ("GB", "TB"):
        count /= 1000 if unit == "TB" else 1e9
        if count < 1000:
            break
    return f"{count:.3g} {unit}"


if __name__ == "__main__":
    main()
