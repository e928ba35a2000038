"""What was asked lately: queries that an index is measured on while it serves, and that a new version is compared with the old one on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from index_store import Side, Snapshot
from models.encoder.encoder import Encoded, concatenate_encoded
from service.errors import ItemRefused
from service.pipeline.stages import EmbeddedItem

KEPT = 256  # queries per side and memory; one search of all of them takes as long as eight batches
OF_ONE = 16  # of a request: a large one must not drive out all others

Asked = tuple[str, Side]  # a memory's name, and the side searched


class QueryLog:
    """The last KEPT queries, or a request more, of each memory and side, and how many there ever were.

    Requests add on the event loop, swaps and checks read. It keeps vectors, never a snapshot: a retired one must be free to die.
    """

    def __init__(self) -> None:
        self._requests: dict[Asked, deque[Encoded]] = {}
        self._counts: dict[Asked, int] = {}
        self._kept: dict[Asked, int] = {}  # queries, so that none has to be counted while a request waits
        self._lock = threading.Lock()

    def note(self, snapshot: Snapshot | None, side: Side, rows: Sequence[EmbeddedItem | ItemRefused]) -> None:
        """Remember the first items of a request that asked a memory."""
        asked = [row for row in rows if isinstance(row, EmbeddedItem) and row.searched][:OF_ONE]
        if snapshot is None or not asked:
            return
        trunks = [row.trunk for row in asked if row.trunk is not None]
        encoded = Encoded(
            np.stack([row.plain for row in asked]), np.stack(trunks) if trunks else None
        )  # copies: a view keeps its batch
        key = (snapshot.manifest.name, side)
        with self._lock:
            kept = self._requests.setdefault(key, deque())
            kept.append(encoded)
            self._counts[key] = self._counts.get(key, 0) + len(asked)
            self._kept[key] = self._kept.get(key, 0) + len(asked)
            while self._kept[key] - len(kept[0].vectors) >= KEPT:
                self._kept[key] -= len(kept.popleft().vectors)

    def counts(self) -> dict[Asked, int]:
        """How many queries were remembered so far, those since forgotten included."""
        with self._lock:
            return dict(self._counts)

    def of(self, memory: str, side: Side, most: int = KEPT) -> Encoded | None:
        """The latest as one batch, oldest first; None where nothing was asked yet."""
        with self._lock:
            kept = list(self._requests.get((memory, side), ()))
        if not kept:
            return None
        whole = concatenate_encoded(kept)
        return whole.take(range(max(0, len(whole.vectors) - most), len(whole.vectors)))
