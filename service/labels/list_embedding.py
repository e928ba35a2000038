"""Resumable embedding of one label list, in steps, so that lists take turns.

A list that nobody waits for is paused and continues later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from index_store import Snapshot
from service.labels.index import LabelIndex
from service.labels.label_set import LabelSet

__all__ = ["Candidates", "Embed", "ListEmbedding"]

STEP_TEXTS = 128  # of one list, before the next list has its turn

Candidates = np.ndarray | LabelIndex  # (labels, D) float32 unit, or what searches them
Embed = Callable[[Sequence[str], Sequence[str], Snapshot | None], np.ndarray]


class ListEmbedding:
    """A label list under one memory version. Used on the event loop only, but for `embed_step`.

    result: its vectors, once they are made.  kept: it is embedded although nobody waits, as a
    large stored set is. The snapshot itself is not held, so that a retired one is freed.
    State: the rows made so far, none once it is finished; how many callers wait; the task that
    makes the other rows, None before it starts and while it is paused.
    """

    def __init__(self, labels: LabelSet, snapshot: Snapshot | None, *, kept: bool) -> None:
        self._labels, self.kept = labels, kept
        self.memory = None if snapshot is None else snapshot.ref
        self.count, self.done, self.waiting = len(labels.labels), 0, 0
        self.result: asyncio.Future[Candidates] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self._rows = np.empty((0, 0), np.float32)  # (labels, D) from the first step on

    @property
    def running(self) -> bool:
        """Whether rows are being made, or wait for a thread to be made."""
        return self.task is not None and not self.result.done()

    @property
    def bytes(self) -> int:
        """Bytes of the vectors, those of an unfinished list included."""
        finished = self.result.done() and not self.result.cancelled() and self.result.exception() is None
        return self.result.result().nbytes if finished else self._rows.nbytes

    @cached_property
    def _characters(self) -> int:
        return self._labels.characters

    @property
    def left_characters(self) -> int:
        """Of the texts that are still to be embedded."""
        return self._characters * (self.count - self.done) // self.count

    def next_step(self) -> slice:
        """The labels of the next step: as many as make STEP_TEXTS texts, one at least."""
        return slice(self.done, self.done + max(1, STEP_TEXTS // len(self._labels.templates)))

    def embed_step(self, embed: Embed, snapshot: Snapshot | None, step: slice) -> np.ndarray:
        """In a thread: the rows of one step."""
        return embed(self._labels.labels[step], self._labels.templates, snapshot)

    def add(self, step: slice, rows: np.ndarray) -> None:
        """Keep the rows of a step."""
        if not self.done:
            self._rows = np.empty((self.count, rows.shape[1]), np.float32)
        self._rows[step] = rows
        self.done = step.start + len(rows)

    def build(self, scale: float, indexed_from: int) -> Candidates:
        """The rows, or an index of them where there are more than `indexed_from`; blocks."""
        index = LabelIndex.build(self._rows, scale) if self.count > indexed_from else None
        return self._rows if index is None else index

    def finish(self, made: Candidates) -> None:
        """Give the vectors to those who wait, and keep no rows beside an index of them."""
        self._rows = np.empty((0, 0), np.float32)
        if not self.result.done():
            self.result.set_result(made)

    def pause(self) -> None:
        """Stop after the step that runs."""
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def fail(self, error: Exception) -> None:
        """Stop, and tell those who wait."""
        self.pause()
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # perhaps nobody waits
