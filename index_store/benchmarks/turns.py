"""Searches measured beside each other, by turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

BATCHES = (1, 32)
SECONDS = 1.0  # of each search in each repeat, in slices of
SLICE_S = 0.05

Search = Callable[[np.ndarray], object]


def queries_per_second(
    searches: Mapping[str, Search], queries: np.ndarray, batch: int, repeats: int
) -> dict[str, list[float]]:
    """Queries per second of each search, repeat by repeat; the first, which finds everything cold, does not count."""
    turns = [_turn(searches, queries, batch) for _ in range(repeats + 1)][1:]
    return {name: [turn[name] for turn in turns] for name in searches}


def compare_rates(found: Mapping[str, Sequence[float]], ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Medians of the rates, and of their ratios repeat by repeat.  ratios: name -> (above, below) the line."""
    medians = {name: round(median(values), 1) for name, values in found.items()}
    quotients = {
        name: median([above / below for above, below in zip(found[up], found[down], strict=True)])
        for name, (up, down) in ratios.items()
    }
    return {"queries_per_s": medians, **quotients}


def median(values: Sequence[float]) -> float:
    """The median, four digits behind the point."""
    return round(statistics.median(values), 4)


def measure_seconds(work: Callable[[], object]) -> float:
    """How long one piece of work takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _turn(searches: Mapping[str, Search], queries: np.ndarray, batch: int) -> dict[str, float]:
    """Queries per second of each search over SECONDS, in short slices by turns: a disturbance then falls on all of them."""
    asked, spent = dict.fromkeys(searches, 0), dict.fromkeys(searches, 0.0)
    while min(spent.values()) < SECONDS:
        for name, search in searches.items():
            begun = time.perf_counter()
            while (took := time.perf_counter() - begun) < SLICE_S:
                start = asked[name] % (len(queries) - batch + 1)
                search(queries[start : start + batch])
                asked[name] += batch
            spent[name] += took
    return {name: asked[name] / spent[name] for name in searches}
