"""A tower's lane: its batches through the model, encoded in one thread and enhanced in another; a batcher that ends is put back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from index_store import Side
from models.reco import Reco
from service.batching.batcher import Answer, Batcher
from service.batching.executors import apart
from service.observability.metrics import Metrics
from service.pipeline.stages import EmbeddedItem, QueuedItem, Seen, encode, enhance
from service.settings import Settings

__all__ = ["TowerWorker", "computing"]

log = logging.getLogger("reco")
PAUSE_S = 0.5  # before a batcher that ended is put back: one that ends at once would keep the loop from everything else


class TowerWorker:
    """One side's batcher and the model behind it.

    passed: called in a model thread whenever a whole batch has been answered.
    State: the batcher in use, why nothing serves while one is put back, and whether the lane is closing.
    """

    def __init__(
        self, side: Side, reco: Reco, settings: Settings, metrics: Metrics, passed: Callable[[Side], None]
    ) -> None:
        self._side, self._reco, self._settings, self._metrics, self._passed = side, reco, settings, metrics, passed
        self._observed = {
            stage: metrics.stage_duration_seconds.labels(stage, side) for stage in ("encode", "retrieve", "fuse")
        }
        self._cores = torch.get_num_threads()
        self._batcher = self._made()
        self._ended: str | None = None
        self._closing = False

    @property
    def depth(self) -> int:
        """Items that wait for a batch."""
        return self._batcher.depth

    def not_live(self) -> str | None:
        """None, or why nothing comes back from this tower at the moment."""
        if self._ended is not None:
            return self._ended
        return (
            f"the {self._side} worker hangs and was replaced, which has not answered yet: restart the service"
            if self._batcher.lost
            else None
        )

    async def submit(self, items: Sequence[QueuedItem], deadline: float) -> list[Answer[EmbeddedItem] | Exception]:
        """As `Batcher.submit`."""
        return await self._batcher.submit(items, deadline)

    def expecting(self, items: int) -> AbstractContextManager[None]:
        """As `Batcher.expecting`."""
        return self._batcher.expecting(items)

    async def serve(self) -> None:
        """Serve until closed. A batcher that ends otherwise has told its callers; a new one takes its place."""
        while not self._closing:
            try:
                await self._batcher.serve()
                return  # it was closed
            except Exception as error:
                self._ended = f"the {self._side} batcher has ended and is being put back: retry"
                log.error("the %s batcher has ended, a new one takes its place", self._side, exc_info=error)
            await asyncio.sleep(PAUSE_S)
            if not self._closing:
                self._batcher, self._ended = self._made(), None

    async def close(self) -> None:
        """Refuse new items, answer every admitted one."""
        self._closing = True
        await self._batcher.close()

    def _made(self) -> Batcher[QueuedItem, EmbeddedItem]:
        chosen = self._settings
        return Batcher(
            self._encode,
            name=self._side,
            max_batch=chosen.max_batch,
            max_queue=chosen.max_queue,
            max_wait_s=chosen.max_wait_s,
            then=self._enhance,
            stall_s=chosen.stall_s,
            begin=partial(computing, self._cores, self._cores),
            begin_then=partial(computing, 1, self._cores),  # its sums are small, and a second pool would slow the first
            on_batch=self._metrics.batch_size.labels(self._side).observe,
        )

    def _encode(self, batch: Sequence[QueuedItem]) -> list[Seen]:
        """In the encoding thread."""
        seen = encode(self._reco, self._side, batch)
        self._observed["encode"].observe(seen[0].encode_s)
        return seen

    def _enhance(self, batch: Sequence[Seen]) -> list[EmbeddedItem]:
        """In the thread behind it."""
        rows = enhance(self._reco, self._side, batch)
        for row in {id(row.timings): row for row in rows}.values():  # once per snapshot of the batch
            self._observed["retrieve"].observe(row.timings.retrieve)
            self._observed["fuse"].observe(row.timings.fuse)
        self._passed(self._side)
        return rows


def computing(cores: int, others: int) -> None:
    """Let the calling thread compute with so many cores, and those that begin after it with `others`."""
    torch.get_num_threads()  # or the first computation would take the process's number again
    torch.set_num_threads(cores)  # for this thread, and for all that have not computed yet
    if cores != others:
        apart(partial(torch.set_num_threads, others)).result()
