"""Choosing the number of inverted lists to probe, by recall and search time on probe queries."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np

from index_store.search.probes import ProbeQueries
from index_store.search.shard import build_flat_index
from index_store.search.sharded import ShardedIndex
from index_store.types import SIDES, Side

BATCH = 32  # queries timed together, as a busy service asks them
TIMED_BATCHES = 4  # batches of the probe queries that are timed
# the bisection of the number of lists ends within a quarter of it; recall is not known better
FINENESS = 4
FLAT_SAMPLE_ROWS = 1 << 15  # rows that the cost of a flat search is taken from

Search = Callable[[np.ndarray], object]


@dataclass(frozen=True, slots=True)
class MeasuredSetting:
    """One setting, measured on the probe queries.

    recall: share of the exact answers found, per side.  lower_bound: recall minus one standard
    error, of the worse side.
    ms: milliseconds per query in batches of 32 with all threads, mean of both sides.
    """

    recipe: str
    probes: int
    recall: Mapping[Side, float]
    lower_bound: float
    ms: float

    @property
    def worse_recall(self) -> float:
        """Recall of the worse side."""
        return min(self.recall.values())

    def manifest_entry(self) -> dict[str, Any]:
        """The entry in the manifest's curve."""
        return {
            "recipe": self.recipe,
            "probes": self.probes,
            "recall": round(self.worse_recall, 4),
            "ms": round(self.ms, 4),
        }


class RelativeTimer:
    """Times searches relative to a flat search of one block, which runs in alternation.

    Shared machines vary in speed by a factor of two within minutes, so absolute times of different
    moments cannot be compared. Milliseconds are scaled to the block's time at construction.
    """

    def __init__(self, indexes: Mapping[Side, ShardedIndex], probe_queries: Mapping[Side, ProbeQueries]) -> None:
        self._probe_queries, self._block, self._rows = probe_queries, dict[Side, Search](), dict[Side, int]()
        self._block_ms = dict[Side, float]()
        for side in SIDES:
            rows = indexes[side].shards[0].keys[side][:FLAT_SAMPLE_ROWS]
            self._block[side], self._rows[side] = (
                partial(build_flat_index(rows).search, k=probe_queries[side].k),
                len(rows),
            )
            self._block_ms[side] = statistics.median(
                _ms_per_query(self._block[side], batch) for batch in self._batches(side)
            )

    def ms(self, side: Side, search: Search) -> float:
        """Milliseconds per query of a search in batches, the median over batches."""
        ratios = []
        for batch in self._batches(side):
            block = _ms_per_query(self._block[side], batch)
            ratios.append(_ms_per_query(search, batch) / block)
        return statistics.median(ratios) * self._block_ms[side]

    def flat_ms(self, side: Side, pairs: int) -> float:
        """Estimated milliseconds per query of a flat search of `pairs` rows."""
        return self._block_ms[side] * pairs / self._rows[side]

    def _batches(self, side: Side) -> Iterator[np.ndarray]:
        queries = self._probe_queries[side].queries  # (P, Dk) float16
        for start in range(0, min(len(queries), TIMED_BATCHES * BATCH), BATCH):
            yield queries[start : start + BATCH].astype(np.float32)


def measure(
    indexes: Mapping[Side, ShardedIndex],
    probe_queries: Mapping[Side, ProbeQueries],
    timer: RelativeTimer,
    recipe: str,
    probes: int,
) -> MeasuredSetting:
    """Measure recall and time of the probe queries with `probes` lists visited."""
    # (P,) each
    shares = {side: probe_queries[side].recall_per_query(indexes[side], probes) for side in SIDES}
    recall = {side: float(share.mean()) for side, share in shares.items()}
    sure = min(float(share.mean() - share.std() / math.sqrt(len(share))) for share in shares.values())
    times = [timer.ms(side, partial(indexes[side].search, k=probe_queries[side].k, probes=probes)) for side in SIDES]
    return MeasuredSetting(recipe, probes, recall, sure, statistics.mean(times))


def find_fewest_probes(
    indexes: Mapping[Side, ShardedIndex],
    probe_queries: Mapping[Side, ProbeQueries],
    timer: RelativeTimer,
    recipe: str,
    *,
    floor: float,
    limit_ms: float = math.inf,
) -> tuple[MeasuredSetting, list[MeasuredSetting]]:
    """The fewest lists whose recall's lower bound reaches the floor, else the best found; and all
    measured settings.

    The number is doubled until it suffices or costs `limit_ms` per query, then bisected.
    """
    points: list[MeasuredSetting] = []
    for probes in _doubled_probes(max(_max_lists(indexes[side]) for side in SIDES)):
        points.append(measure(indexes, probe_queries, timer, recipe, probes))
        if points[-1].lower_bound >= floor or points[-1].ms >= limit_ms:
            break
    low, high = (points[-2].probes if len(points) > 1 else 0), points[-1].probes
    while points[-1].lower_bound >= floor and high - low > max(1, high // FINENESS):
        middle = (low + high) // 2
        points.insert(-1, measure(indexes, probe_queries, timer, recipe, middle))
        low, high = (low, middle) if points[-2].lower_bound >= floor else (middle, high)
    points.sort(key=lambda point: point.probes)
    return _choose(points, floor), points


def estimate_flat(indexes: Mapping[Side, ShardedIndex], timer: RelativeTimer, recipe: str) -> MeasuredSetting:
    """The setting of a flat search: exact, at an estimated time."""
    return MeasuredSetting(
        recipe,
        0,
        dict.fromkeys(SIDES, 1.0),
        1.0,
        statistics.mean(timer.flat_ms(side, indexes[side].pairs) for side in SIDES),
    )


def _choose(points: Sequence[MeasuredSetting], floor: float) -> MeasuredSetting:
    """The first setting whose lower bound reaches the floor, else the first whose recall does, else
    the best recall.
    """
    for good in (lambda point: point.lower_bound >= floor, lambda point: point.worse_recall >= floor):
        found = next(filter(good, points), None)
        if found is not None:
            return found
    return max(points, key=lambda point: point.worse_recall)


def _doubled_probes(lists: int) -> Iterator[int]:
    """1, 2, 4 … and all lists; 0 alone where there are none."""
    probes = 1 if lists else 0
    while probes < lists:
        yield probes
        probes *= 2
    yield lists


def _max_lists(index: ShardedIndex) -> int:
    """The most inverted lists of any shard's index, 0 where none has lists."""
    inverted = [faiss.try_extract_index_ivf(shard.indexes[index.side]) for shard in index.shards]
    return max((index.nlist for index in inverted if index is not None), default=0)


def _ms_per_query(search: Search, batch: np.ndarray) -> float:
    """Milliseconds per query of one batch."""
    begun = time.perf_counter()
    search(batch)
    return (time.perf_counter() - begun) * 1000 / len(batch)
