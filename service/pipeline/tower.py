"""The worker of one tower: its batcher, and the two stages of the model that the batcher runs.

The first thread encodes, the second retrieves and fuses. A batcher that ends is replaced.
"""

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
from service.batching.executors import run_in_own_thread
from service.observability.metrics import Metrics
from service.pipeline.stages import EmbeddedItem, EncodedItem, QueuedItem, encode, enhance
from service.settings import Settings

__all__ = ["TowerWorker", "set_torch_threads"]

log = logging.getLogger("reco")
RESTART_PAUSE_S = 0.5  # a batcher that ends at once would keep the event loop from everything else


class TowerWorker:
    """The batcher of one side and the model behind it.

    on_answered: called in a model thread whenever a whole batch has been answered.
    State: the batcher in use, why nothing serves while it is being replaced, whether it is closing.
    """

    def __init__(
        self, side: Side, reco: Reco, settings: Settings, metrics: Metrics, on_answered: Callable[[Side], None]
    ) -> None:
        self._side, self._reco, self._settings, self._metrics = side, reco, settings, metrics
        self._on_answered = on_answered
        stages = ("encode", "retrieve", "fuse")
        self._histograms = {stage: metrics.stage_duration_seconds.labels(stage, side) for stage in stages}
        self._cores = torch.get_num_threads()
        self._batcher = self._new_batcher()
        self._ended: str | None = None
        self._closing = False

    @property
    def depth(self) -> int:
        """Items that wait for a batch."""
        return self._batcher.depth

    def not_live(self) -> str | None:
        """None, or why no answer comes from this tower at the moment."""
        if self._ended is not None:
            return self._ended
        if self._batcher.lost:
            return f"the {self._side} worker hangs and was replaced, which has not answered yet: restart the service"
        return None

    async def submit(self, items: Sequence[QueuedItem], deadline: float) -> list[Answer[EmbeddedItem] | Exception]:
        """As `Batcher.submit`."""
        return await self._batcher.submit(items, deadline)

    def expecting(self, items: int) -> AbstractContextManager[None]:
        """As `Batcher.expecting`."""
        return self._batcher.expecting(items)

    async def serve(self) -> None:
        """Serve until closed.

        A batcher that fails has answered its callers; a new one replaces it.
        """
        while not self._closing:
            try:
                await self._batcher.serve()
                return  # it was closed
            except Exception as error:
                self._ended = f"the {self._side} batcher has ended and is being put back: retry"
                log.error("the %s batcher has ended, a new one takes its place", self._side, exc_info=error)
            await asyncio.sleep(RESTART_PAUSE_S)
            if not self._closing:
                self._batcher, self._ended = self._new_batcher(), None

    async def close(self) -> None:
        """Refuse new items, answer every admitted one."""
        self._closing = True
        await self._batcher.close()

    def _new_batcher(self) -> Batcher[QueuedItem, EmbeddedItem]:
        return Batcher(
            self._encode,
            name=self._side,
            max_batch=self._settings.max_batch,
            max_queue=self._settings.max_queue,
            then=self._enhance,
            stall_s=self._settings.stall_s,
            initialize=partial(set_torch_threads, self._cores, self._cores),
            # retrieval and fusion are small sums, and a second OpenMP pool would slow the first
            initialize_then=partial(set_torch_threads, 1, self._cores),
            on_batch=self._metrics.batch_size.labels(self._side).observe,
        )

    def _encode(self, batch: Sequence[QueuedItem]) -> list[EncodedItem]:
        """The first stage, in the encoding thread."""
        encoded = encode(self._reco, self._side, batch)
        self._histograms["encode"].observe(encoded[0].encode_s)
        return encoded

    def _enhance(self, batch: Sequence[EncodedItem]) -> list[EmbeddedItem]:
        """The second stage."""
        items = enhance(self._reco, self._side, batch)
        # once per snapshot
        for timings in {id(item.timings): item.timings for item in items}.values():
            self._histograms["retrieve"].observe(timings.retrieve)
            self._histograms["fuse"].observe(timings.fuse)
        self._on_answered(self._side)
        return items


def set_torch_threads(cores: int, others: int) -> None:
    """Let the calling thread compute with `cores` cores, and threads that start after it with
    `others`.

    torch keeps one number for threads that have not computed yet; the last one set counts.
    """
    # otherwise the first computation sets the thread back to the process's number
    torch.get_num_threads()
    torch.set_num_threads(cores)
    if cores != others:
        run_in_own_thread(partial(torch.set_num_threads, others)).result()
