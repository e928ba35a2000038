"""Rates of several searches, measured in alternation."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

BATCHES = (1, 32)
SECONDS_PER_REPEAT = 1.0  # per search and repeat
SLICE_S = 0.05  # seconds of one search before the next has its turn

Search = Callable[[np.ndarray], object]


def queries_per_second(
    searches: Mapping[str, Search], queries: np.ndarray, batch: int, repeats: int
) -> dict[str, list[float]]:
    """Queries per second of each search per repeat; a first, cold repeat is dropped."""
    turns = [_measure_repeat(searches, queries, batch) for _ in range(repeats + 1)][1:]
    return {name: [turn[name] for turn in turns] for name in searches}


def compare_rates(found: Mapping[str, Sequence[float]], ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Medians of the rates, and of their ratios within each repeat.

    ratios: {name: (numerator, denominator)}.
    """
    medians = {name: round(median(values), 1) for name, values in found.items()}
    quotients = {
        name: median([above / below for above, below in zip(found[up], found[down], strict=True)])
        for name, (up, down) in ratios.items()
    }
    return {"queries_per_s": medians, **quotients}


def median(values: Sequence[float]) -> float:
    """The median, rounded to four decimals."""
    return round(statistics.median(values), 4)


def measure_seconds(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _measure_repeat(searches: Mapping[str, Search], queries: np.ndarray, batch: int) -> dict[str, float]:
    """Queries per second of each search; short alternating slices spread disturbances over all."""
    done, spent = dict.fromkeys(searches, 0), dict.fromkeys(searches, 0.0)
    while min(spent.values()) < SECONDS_PER_REPEAT:
        for name, search in searches.items():
            begun = time.perf_counter()
            while (took := time.perf_counter() - begun) < SLICE_S:
                start = done[name] % (len(queries) - batch + 1)
                search(queries[start : start + batch])
                done[name] += batch
            spent[name] += took
    return {name: done[name] / spent[name] for name in searches}
