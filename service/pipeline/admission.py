"""Admission of items: a request whose items would exceed the queue is refused with 429."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from index_store import Side
from index_store.types import SIDES
from service.batching.batcher import QueueFull
from service.observability.metrics import Metrics

__all__ = ["Admission"]


class Admission:
    """Counts the items that are admitted and not yet answered, by side. Used on the event loop
    only.

    max_queue: the limit per side. `Batcher` and `LabelVectors` raise QueueFull for their own
    queues.
    """

    def __init__(self, max_queue: int, metrics: Metrics) -> None:
        self._max_queue, self._metrics = max_queue, metrics
        self._admitted: dict[Side, int] = dict.fromkeys(SIDES, 0)

    @contextmanager
    def admit(self, side: Side, items: int) -> Iterator[None]:
        """Count the items as admitted inside; before any decoding. Raises QueueFull."""
        if self._admitted[side] + items > self._max_queue:
            self._metrics.rejected_total.labels("queue_full").inc()
            raise QueueFull(
                f"{self._admitted[side]} {side} items are admitted, {items} more would pass {self._max_queue}: "
                "retry later"
            )
        self._admitted[side] += items
        try:
            yield
        finally:
            self._admitted[side] -= items
