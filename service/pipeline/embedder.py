"""The way of a request's items through the model: admit, decode or tokenize, batch, encode,
enhance.

A bad item is refused alone; the other items of its request are answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from index_store import SearchParams, Side, Snapshot
from index_store.types import SIDES
from models.encoder.preprocess import Crop
from models.reco import Reco
from service.batching.batcher import Answer
from service.batching.run_parts import gather_parts
from service.decoding.decoder import Decoder
from service.decoding.fork_server import ForkServer
from service.decoding.messages import DecodeJob
from service.errors import ItemRefused
from service.observability.metrics import Metrics, Stage
from service.pipeline.admission import Admission
from service.pipeline.stages import EmbeddedItem, EmbedResult, Items, Query, QueuedItem, slowest_stages
from service.pipeline.tokenizing import Tokenizing
from service.pipeline.tower import TowerWorker
from service.pipeline.watchdog import Part, Watchdog
from service.settings import Settings

__all__ = ["Embedder"]

# a GIF of one pixel, the watchdog's test item of the decoder
TEST_IMAGE = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
Prepared = np.ndarray | ItemRefused  # the model's input of one item, or why there is none


class Embedder:
    """Owns the decoder, the two towers and their watchdog.

    test_snapshot: the snapshot that the watchdog's items search, None = none.  fork_server: of the
    decoder's processes.
    """

    def __init__(
        self,
        reco: Reco,
        settings: Settings,
        metrics: Metrics,
        test_snapshot: Callable[[], Snapshot | None],
        fork_server: ForkServer,
    ) -> None:
        self._reco, self._settings, self._metrics, self._test_snapshot = reco, settings, metrics, test_snapshot
        self.watchdog = Watchdog(self._send_test_item)
        self.decoder = _new_decoder(reco.encoder.crop, settings, metrics, fork_server)
        self.towers: dict[Side, TowerWorker] = {
            side: TowerWorker(side, reco, settings, metrics, self.watchdog.note) for side in SIDES
        }
        self._tokenizing = Tokenizing(reco.encoder.tokenize)
        self._admission = Admission(settings.max_queue, metrics)

    async def embed(self, items: Items, query: Query, deadline: float) -> EmbedResult:
        """Embed all items of a request, each with its result or its refusal.

        deadline: a `time.monotonic()` instant.  Raises QueueFull, BatcherClosed for the whole
        request.
        """
        if items.images:
            return await self._embed_images(items.images, query, deadline)
        return await self._embed_texts(items.texts, query, deadline)

    def not_live(self) -> str | None:
        """None, or which tower does not answer, or why no image is decoded."""
        problems = (*(tower.not_live() for tower in self.towers.values()), self.decoder.not_live())
        return next(filter(None, problems), None)

    async def close(self) -> None:
        """Answer every admitted item, then end the towers."""
        await asyncio.gather(*(tower.close() for tower in self.towers.values()))
        self._tokenizing.close()

    async def _embed_images(self, images: Sequence[bytes | ItemRefused], query: Query, deadline: float) -> EmbedResult:
        """Decode, then embed; a large request batch by batch, one in the model while the next is
        decoded.
        """
        request = object()
        with self._admission.admit("image", len(images)):
            size = self._settings.max_batch
            parts = [
                self._embed_part_of_images(first, images[first : first + size], query, deadline, request)
                for first in range(0, len(images), size)
            ]
            return _join(await gather_parts(parts))

    async def _embed_part_of_images(
        self, first: int, images: Sequence[bytes | ItemRefused], query: Query, deadline: float, request: object
    ) -> EmbedResult:
        """first: the place of the first image in its request, which takes turns with others."""
        start = time.perf_counter()
        with self.towers["image"].expecting(len(images)):
            decoding = (self._decode(first + i, image, deadline, request) for i, image in enumerate(images))
            pixels = await asyncio.gather(*decoding)
        return await self._run("image", first, pixels, query, deadline, {"decode": time.perf_counter() - start})

    async def _embed_texts(self, texts: Sequence[str], query: Query, deadline: float) -> EmbedResult:
        with self._admission.admit("text", len(texts)):
            start = time.perf_counter()
            with self.towers["text"].expecting(len(texts)):
                tokens = await self._tokenizing.tokenize(texts, deadline)  # (B, L)
            seconds = time.perf_counter() - start
            self._metrics.observe_stage("tokenize", "text", seconds)
            result = await self._run("text", 0, list(tokens), query, deadline, {"tokenize": seconds})
            return replace(result, tokens=int(np.count_nonzero(tokens)))

    async def _decode(self, place: int, image: bytes | ItemRefused, deadline: float, request: object) -> Prepared:
        """place: of the image in its request."""
        if isinstance(image, ItemRefused):
            return image
        start = time.perf_counter()
        try:
            pixels = await self.decoder.decode(image, deadline, request)
            self.watchdog.note("decoder")
            return pixels
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to this image
            return ItemRefused(f"images[{place}]", error)
        finally:
            self._metrics.observe_stage("decode", "image", time.perf_counter() - start)

    async def _run(
        self,
        side: Side,
        first: int,
        inputs: Sequence[Prepared],
        query: Query,
        deadline: float,
        seconds: dict[Stage, float],
    ) -> EmbedResult:
        """Send the good items through the tower, and put every outcome in the place of its item.

        first: the place of the first input in its request.  seconds: of the stages so far.
        """
        good = {i: array for i, array in enumerate(inputs) if not isinstance(array, ItemRefused)}
        answers = await self.towers[side].submit([QueuedItem(array, query) for array in good.values()], deadline)
        outcomes = dict(zip(good, answers, strict=True))
        rows = [
            each if isinstance(each, ItemRefused) else self._take_outcome(side, first + i, outcomes[i])
            for i, each in enumerate(inputs)
        ]
        timings = [row.timings for row in rows if isinstance(row, EmbeddedItem)]
        queued = [answer.queued_s for answer in answers if isinstance(answer, Answer)]
        slowest: dict[Stage, float] = {"queue": max(queued, default=0.0)}
        for stage in ("encode", "retrieve", "fuse"):
            slowest[stage] = max((getattr(each, stage) for each in timings), default=0.0)
        return EmbedResult(rows, {**seconds, **slowest})

    def _take_outcome(
        self, side: Side, place: int, outcome: Answer[EmbeddedItem] | Exception
    ) -> EmbeddedItem | ItemRefused:
        """Count an outcome. place: of the item in its request."""
        if isinstance(outcome, Exception):
            return ItemRefused(f"{side}s[{place}]", outcome)
        self._metrics.observe_stage("queue", side, outcome.queued_s)
        row = outcome.result
        self._metrics.items_total.labels(side).inc()
        reason = "neighbors" if row.enhanced else "no_neighbor" if row.searched else "off"
        self._metrics.enhanced_total.labels(str(row.enhanced).lower(), reason).inc()
        if row.similarity is not None:
            self._metrics.neighbor_similarity.labels(side).observe(row.similarity)
        return row

    async def _send_test_item(self, part: Part, deadline: float) -> Sequence[object]:
        """Send one real item through a part: a tower also searches where a memory is served."""
        if part == "decoder":
            return [await self._decode(0, TEST_IMAGE, deadline, "watchdog")]
        encoder = self._reco.encoder
        blank = np.zeros((3, *encoder.image_size), np.uint8)
        array = blank if part == "image" else encoder.tokenize(["pulse"])[0]
        item = QueuedItem(array, Query(self._test_snapshot(), self._reco.k, SearchParams(), neighbors=False))
        return await self.towers[part].submit([item], deadline)


def _new_decoder(crop: Crop, settings: Settings, metrics: Metrics, fork_server: ForkServer) -> Decoder:
    """The decoder, with a quarter of its pixels for images that need not ask for them."""
    workers, pixels = settings.decode_workers, settings.max_pixels_in_flight or 2 * settings.max_pixels
    free = pixels // 4 // workers
    job = DecodeJob(crop, settings.max_pixels, free, settings.decode_cpu_s)
    return Decoder(job, workers=workers, pixels=pixels - free * workers, metrics=metrics, fork_server=fork_server)


def _join(parts: Sequence[EmbedResult]) -> EmbedResult:
    """The parts of a request as one, each stage as long as in its slowest part."""
    return EmbedResult([row for part in parts for row in part.rows], slowest_stages(parts))
