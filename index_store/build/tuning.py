"""What a search costs and what it finds: one point per number of lists visited, and the cheapest
that is good enough.
"""

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
TIMED = 4  # batches of the probe queries that are timed
# the search for the fewest lists ends within a quarter of them: their recall is known no better
# than that
FINENESS = 4
BLOCK = 1 << 15  # rows that the cost of a flat search is taken from

Search = Callable[[np.ndarray], object]


@dataclass(frozen=True, slots=True)
class Point:
    """One setting, measured on the probe queries.

    recall: share of the exact answers found, per side.  sure: recall less one standard error, the
    worse side: what other queries will find.
    ms: milliseconds per query in batches of 32, all threads, the mean of both sides.
    """

    recipe: str
    probes: int
    recall: Mapping[Side, float]
    sure: float
    ms: float

    @property
    def worst(self) -> float:
        """Recall of the worse side."""
        return min(self.recall.values())

    def described(self) -> dict[str, Any]:
        """As the manifest's curve has it."""
        return {"recipe": self.recipe, "probes": self.probes, "recall": round(self.worst, 4), "ms": round(self.ms, 4)}


class Clock:
    """What a search costs, told against a flat search of one block of rows that takes turns with
    it.

    A machine that others share is twice as fast in one minute as in the next: recipes measured
    minutes apart could not be compared by the wall clock. Milliseconds are those that the block
    took when the clock was made.
    """

    def __init__(self, fans: Mapping[Side, ShardedIndex], questions: Mapping[Side, ProbeQueries]) -> None:
        self._questions, self._block, self._rows = questions, dict[Side, Search](), dict[Side, int]()
        self._block_ms = dict[Side, float]()
        for side in SIDES:
            rows = fans[side].shards[0].keys[side][:BLOCK]
            self._block[side], self._rows[side] = (
                partial(build_flat_index(rows).search, k=questions[side].k),
                len(rows),
            )
            self._block_ms[side] = statistics.median(_ms(self._block[side], batch) for batch in self._batches(side))

    def ms(self, side: Side, search: Search) -> float:
        """Milliseconds per query of a search in batches, the median over them."""
        ratios = []
        for batch in self._batches(side):
            block = _ms(self._block[side], batch)
            ratios.append(_ms(search, batch) / block)
        return statistics.median(ratios) * self._block_ms[side]

    def flat_ms(self, side: Side, pairs: int) -> float:
        """What searching so many rows one by one would cost; converting all would take the memory
        that lists are to save.
        """
        return self._block_ms[side] * pairs / self._rows[side]

    def _batches(self, side: Side) -> Iterator[np.ndarray]:
        queries = self._questions[side].queries  # (P, Dk) float16
        for start in range(0, min(len(queries), TIMED * BATCH), BATCH):
            yield queries[start : start + BATCH].astype(np.float32)


def measure(
    fans: Mapping[Side, ShardedIndex], questions: Mapping[Side, ProbeQueries], clock: Clock, recipe: str, probes: int
) -> Point:
    """Answer the probe queries visiting `probes` lists, for their recall and then once more for the
    time.
    """
    # (P,) each
    shares = {side: questions[side].recall_per_query(fans[side], probes) for side in SIDES}
    recall = {side: float(share.mean()) for side, share in shares.items()}
    sure = min(float(share.mean() - share.std() / math.sqrt(len(share))) for share in shares.values())
    times = [clock.ms(side, partial(fans[side].search, k=questions[side].k, probes=probes)) for side in SIDES]
    return Point(recipe, probes, recall, sure, statistics.mean(times))


def settle(
    fans: Mapping[Side, ShardedIndex],
    questions: Mapping[Side, ProbeQueries],
    clock: Clock,
    recipe: str,
    *,
    floor: float,
    limit_ms: float = math.inf,
) -> tuple[Point, list[Point]]:
    """The fewest lists whose recall surely reaches the floor, or what came nearest to it; and every
    point that was measured.

    Lists visited are doubled until they suffice, or cost `limit_ms` a query; then the last step is
    halved again and again.
    """
    points: list[Point] = []
    for probes in _doubling(max(_lists(fans[side]) for side in SIDES)):
        points.append(measure(fans, questions, clock, recipe, probes))
        if points[-1].sure >= floor or points[-1].ms >= limit_ms:
            break
    low, high = (points[-2].probes if len(points) > 1 else 0), points[-1].probes
    while points[-1].sure >= floor and high - low > max(1, high // FINENESS):
        middle = (low + high) // 2
        points.insert(-1, measure(fans, questions, clock, recipe, middle))
        low, high = (low, middle) if points[-2].sure >= floor else (middle, high)
    points.sort(key=lambda point: point.probes)
    return _fewest(points, floor), points


def flat_point(fans: Mapping[Side, ShardedIndex], clock: Clock, recipe: str) -> Point:
    """What searching every row would cost."""
    return Point(
        recipe,
        0,
        dict.fromkeys(SIDES, 1.0),
        1.0,
        statistics.mean(clock.flat_ms(side, fans[side].pairs) for side in SIDES),
    )


def _fewest(points: Sequence[Point], floor: float) -> Point:
    """The first point that surely reaches the floor; else the first that does on the probes; else
    the one of the best recall.
    """
    for good in (lambda point: point.sure >= floor, lambda point: point.worst >= floor):
        found = next(filter(good, points), None)
        if found is not None:
            return found
    return max(points, key=lambda point: point.worst)


def _doubling(lists: int) -> Iterator[int]:
    """1, 2, 4 … and all lists; 0 alone where there are none."""
    probes = 1 if lists else 0
    while probes < lists:
        yield probes
        probes *= 2
    yield lists


def _lists(fan: ShardedIndex) -> int:
    """The most inverted lists of any shard's index, 0 where none has lists."""
    inverted = [faiss.try_extract_index_ivf(shard.indexes[fan.side]) for shard in fan.shards]
    return max((index.nlist for index in inverted if index is not None), default=0)


def _ms(search: Search, batch: np.ndarray) -> float:
    """Milliseconds per query of one batch."""
    begun = time.perf_counter()
    search(batch)
    return (time.perf_counter() - begun) * 1000 / len(batch)
