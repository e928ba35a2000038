"""Decoding in the service's processes beside the same decoding in threads.

    python -m service.benchmarks.decoding [--seconds 1] [--workers 2] [--out FILE]

Several callers in a loop each send one photo at a time, as many workers decode. Both ways take
turns, and each figure is the median of ROUNDS. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from PIL import Image

from loadtests.support.report import environment, table, write
from models.encoder.image_io import read_image
from models.encoder.preprocess import Crop
from service.decoding.decoder import Decoder
from service.decoding.fork_server import ForkServer
from service.decoding.messages import DecodeJob
from service.observability.metrics import Metrics

CROP = Crop((224, 224), "shortest", "bicubic")
JOB = DecodeJob(CROP, max_pixels=64_000_000, free_pixels=16_000_000, cpu_s=10.0)
SIZES = ((348, 348), (1600, 1200))
CALLERS = (1, 8, 32)
ROUNDS = 5

Decode = Callable[[bytes], Awaitable[np.ndarray]]


def photo(size: tuple[int, int]) -> bytes:
    """A JPEG of smooth noise, about as hard to decode as a photo of that size."""
    coarse = np.random.default_rng(5).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def read(data: bytes) -> np.ndarray:
    """(3, H, W) uint8, in this thread."""
    return CROP.pixels(read_image(data, target_size=CROP.size))


async def images_per_s(decode: Decode, image: bytes, callers: int, seconds: float) -> float:
    """The rate of callers who each send the image again as soon as it is answered."""
    begun, done = time.perf_counter(), 0

    async def call() -> None:
        nonlocal done
        while time.perf_counter() < begun + seconds:
            await decode(image)
            done += 1

    await asyncio.gather(*(call() for _ in range(callers)))
    return done / (time.perf_counter() - begun)


async def measure(workers: int, seconds: float) -> list[dict[str, Any]]:
    """Both ways in turns, for each size and number of callers."""
    fork_server, threads = ForkServer(), ThreadPoolExecutor(workers)
    metrics = Metrics(version="", torch="", faiss="")
    decoder = Decoder(JOB, workers=workers, pixels=96_000_000, metrics=metrics, fork_server=fork_server)
    await decoder.start()

    async def in_process(data: bytes) -> np.ndarray:
        return await decoder.decode(data, time.monotonic() + 60, object())

    async def in_thread(data: bytes) -> np.ndarray:
        return await asyncio.get_running_loop().run_in_executor(threads, read, data)

    rows = []
    for size in SIZES:
        image = photo(size)
        np.testing.assert_array_equal(await in_process(image), await in_thread(image))
        for callers in CALLERS:
            found: dict[str, list[float]] = {"processes": [], "threads": []}
            for _ in range(ROUNDS):
                found["processes"].append(await images_per_s(in_process, image, callers, seconds))
                found["threads"].append(await images_per_s(in_thread, image, callers, seconds))
            rates = {f"{way}_per_s": round(statistics.median(each), 1) for way, each in found.items()}
            ratios = [round(a / b, 3) for a, b in zip(*found.values(), strict=True)]
            row = {"size": size, "bytes": len(image), "callers": callers, **rates}
            rows.append({**row, "speed_vs_threads": statistics.median(ratios), "all_speeds_vs_threads": ratios})
    await decoder.close()
    fork_server.close()
    threads.shutdown()
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round of each way")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 2), help="threads, and processes")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/decoding.json"))
    args = parser.parse_args()
    settings = {name: str(value) for name, value in vars(args).items()}
    report = {**environment("service.benchmarks.decoding"), "settings": settings}
    report["rows"] = rows = uvloop.run(measure(args.workers, args.seconds))
    heads = ("size", "callers", "processes_per_s", "threads_per_s", "speed_vs_threads")
    cells = [("x".join(map(str, row["size"])), *(str(row[head]) for head in heads[1:])) for row in rows]
    print(table([("photo", "callers", "processes, images/s", "threads, images/s", "ratio"), *cells]))
    write(args.out, report)


if __name__ == "__main__":
    main()
