"""A log of recent queries, on which recall is measured while serving and drift before a swap."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from index_store import Side, Snapshot
from models.encoder.encoder import Encoded, concatenate_encoded
from service.errors import ItemRefused
from service.pipeline.stages import EmbeddedItem

MAX_QUERIES = 256  # per memory and side; one search of all takes as long as eight batches
MAX_OF_REQUEST = 16  # a large request must not drive out all others

MemorySide = tuple[str, Side]  # a memory's name, and the side searched


class QueryLog:
    """The last MAX_QUERIES queries, or a request more, of each memory and side, and how many there
    were.

    Requests add on the event loop; swaps and checks read in threads. It keeps vectors, never a
    snapshot: a retired snapshot must be freed.
    """

    def __init__(self) -> None:
        self._requests: dict[MemorySide, deque[Encoded]] = {}
        self._counts: dict[MemorySide, int] = {}
        # queries held, so that none is counted while a request waits
        self._held: dict[MemorySide, int] = {}
        self._lock = threading.Lock()

    def note(self, snapshot: Snapshot | None, side: Side, rows: Sequence[EmbeddedItem | ItemRefused]) -> None:
        """Add the first items of a request that searched a memory."""
        searched = [row for row in rows if isinstance(row, EmbeddedItem) and row.searched][:MAX_OF_REQUEST]
        if snapshot is None or not searched:
            return
        trunks = [row.trunk for row in searched if row.trunk is not None]
        encoded = Encoded(
            np.stack([row.plain for row in searched]), np.stack(trunks) if trunks else None
        )  # copies: a view keeps its batch
        key = (snapshot.manifest.name, side)
        with self._lock:
            batches = self._requests.setdefault(key, deque())
            batches.append(encoded)
            self._counts[key] = self._counts.get(key, 0) + len(searched)
            self._held[key] = self._held.get(key, 0) + len(searched)
            while self._held[key] - len(batches[0].vectors) >= MAX_QUERIES:
                self._held[key] -= len(batches.popleft().vectors)

    def counts(self) -> dict[MemorySide, int]:
        """How many queries were added so far, those since removed included."""
        with self._lock:
            return dict(self._counts)

    def latest(self, memory: str, side: Side, most: int = MAX_QUERIES) -> Encoded | None:
        """The latest queries as one batch, oldest first; None without any."""
        with self._lock:
            batches = list(self._requests.get((memory, side), ()))
        if not batches:
            return None
        whole = concatenate_encoded(batches)
        return whole.take(range(max(0, len(whole.vectors) - most), len(whole.vectors)))
