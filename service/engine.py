"""Engine: owns the model, the live memories, the batchers and the label sets; everything a route asks for is a method of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from index_store import SearchParams, Side, Snapshot, Store
from index_store.types import SIDES
from models.encoder.device import gpu_memory
from models.reco import Reco
from models.starter import MEMORY, install_starter, starter_labels
from service.batching.batcher import Answer, DeadlinePassed, QueueFull
from service.batching.gather import gather
from service.errors import InvalidValue, ItemRefused
from service.labels.cache import ranked
from service.labels.label_set import LabelSet
from service.labels.scoring import Ranked
from service.labels.store import LabelSets
from service.memories.budget import allowed_bytes
from service.memories.drift import drift
from service.memories.edits import Editing
from service.memories.jobs import Jobs
from service.memories.query_log import QueryLog
from service.memories.recall import RecallSampler
from service.memories.registry import MemoryRegistry
from service.memories.swap import Swaps
from service.observability.metrics import Metrics, Stage
from service.observability.tracing import Tracing
from service.pipeline.decode import Decoder
from service.pipeline.load import load_reco
from service.pipeline.stages import Answered, EmbeddedItem, Items, Query, QueuedItem, slowest
from service.pipeline.tower import TowerWorker
from service.pipeline.watchdog import Watchdog
from service.settings import Settings


class Engine:
    """Opened once per process; what cannot be opened is refused in one line.

    State: the counts of items admitted and not yet answered, whether it is draining, the requests inside.
    """

    def __init__(self, settings: Settings, reco: Reco, store: Store, metrics: Metrics) -> None:
        self.settings, self.reco, self.metrics = settings, reco, metrics
        encoder = reco.encoder
        default = settings.memory or (MEMORY if settings.model == "starter" else None)
        budget = allowed_bytes(settings.memory_budget_bytes)
        self.memories = MemoryRegistry(
            store, encoder=encoder.fingerprint, fusion=reco.fusion_id, default=default, budget=budget, devices=settings.search_devices,
            metrics=metrics,
        )  # fmt: skip
        self.label_sets = LabelSets(
            store.root / ".label-sets",
            reco.embed_labels,
            scale=encoder.logit_scale,
            max_texts=settings.max_labels,
            max_stored=settings.max_stored_labels,
            max_sets=settings.max_label_sets,
            metrics=metrics,
        )
        self._recent, self.jobs = QueryLog(), Jobs(metrics)
        self.swaps = Swaps(
            self.memories,
            self.jobs,
            prepare=self.label_sets.warm,
            drift=lambda old, new: drift(reco, self._recent, old, new),
            metrics=metrics,
        )
        self.editing = Editing(self.memories, self.swaps, self._encoded, settings)
        self._recall = RecallSampler(self._recent, self.memories.resolve, metrics, share=settings.recall_share)
        self._decoder = Decoder(
            partial(encoder.read_image, max_pixels=settings.max_pixels), workers=settings.decode_workers
        )
        self._pulse = Watchdog(self._test_item)
        self._lanes: dict[Side, TowerWorker] = {
            side: TowerWorker(side, reco, settings, metrics, self._pulse.felt) for side in SIDES
        }
        self._admitted: dict[Side, int] = dict.fromkeys(SIDES, 0)
        self.tracing = Tracing.from_environment()
        self.draining = False
        self.inside = 0  # requests let in and not yet answered; the gate counts

    @classmethod
    def open(cls, settings: Settings) -> Engine:
        """Load the encoder, the fusion and every current memory. Raises ModelError, StoreError or ServiceError, each one line."""
        import faiss
        import torch

        reco, store = load_reco(settings), Store(settings.store)
        if settings.model == "starter":
            install_starter(store)
        metrics = Metrics(version=version("reco-serve"), torch=torch.__version__, faiss=faiss.__version__)
        engine = cls(settings, reco, store, metrics)
        if settings.model == "starter" and not engine.label_sets.names():
            engine.label_sets.put(MEMORY, LabelSet(tuple(starter_labels())))
        return engine

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve batches until left; then answer what was admitted, for `drain_s` at the most, and let go."""
        serving = [asyncio.create_task(lane.serve()) for lane in self._lanes.values()]
        for side in self._lanes:
            await self._pulse.check(side)  # the first batch of each tower: warm before ready
        background = [asyncio.create_task(self._pulse.keep()), asyncio.create_task(self._recall.run())]
        for name in self.memories.names():
            self.swaps.verify(name)
        try:
            yield
        finally:
            self.draining = True
            for task in background:
                task.cancel()
            await self.swaps.close()
            with suppress(TimeoutError):  # a model that hangs would hold the end up; who still waits is told
                async with asyncio.timeout(max(1.0, self.settings.drain_s)):
                    await asyncio.gather(*(lane.close() for lane in self._lanes.values()), *serving)
            self.label_sets.vectors.close()
            self._decoder.close()
            self.memories.close()
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close)

    def not_live(self) -> str | None:
        """None, or which worker does not answer."""
        return next(filter(None, (lane.not_live() for lane in self._lanes.values())), None)

    def not_ready(self) -> str | None:
        """None, or why no traffic should come here."""
        if self.draining:
            return "shutting down"
        return self._pulse.stale() or self.not_live() or self.memories.not_ready()

    def default_snapshot(self) -> Snapshot | None:
        """What answers a request that names no memory, if anything does."""
        return None if self.memories.not_ready() else self.memories.resolve(None)

    def query(self, snapshot: Snapshot | None, *, k: int | None, params: SearchParams, neighbors: bool) -> Query:
        """What a request asks of its items, which `snapshot` enhances. k: None = the fusion's own. Raises InvalidValue for k."""
        wanted = self.reco.k if k is None else k
        if wanted > self.reco.max_k:
            raise InvalidValue(f"k = {wanted}: this fusion takes 1 to {self.reco.max_k} neighbours", "k")
        return Query(snapshot, wanted, params, neighbors)

    async def embed(self, wanted: Items, query: Query, deadline: float) -> Answered:
        """Every item's row or refusal. deadline: a `time.monotonic()` instant. Raises QueueFull, BatcherClosed for the whole."""
        if wanted.images:
            return await self._embed_images(wanted.images, query, deadline)
        return await self._embed_texts(wanted.texts, query, deadline)

    async def _embed_images(self, images: Sequence[bytes | ItemRefused], query: Query, deadline: float) -> Answered:
        """Decode, then embed; a large request batch by batch, one in the model while the next is decoded. A bad image is refused alone."""
        with self._admit("image", len(images)):
            size = self.settings.max_batch
            parts = [
                self._part_of_images(at, images[at : at + size], query, deadline) for at in range(0, len(images), size)
            ]
            return self._answered("image", query, await gather(parts))

    async def _part_of_images(
        self, at: int, images: Sequence[bytes | ItemRefused], query: Query, deadline: float
    ) -> Answered:
        """at: the place of the first in its request."""
        start = time.perf_counter()
        with self._lanes["image"].expecting(len(images)):
            pixels = await asyncio.gather(*(self._pixels(at + i, image, deadline) for i, image in enumerate(images)))
        seconds: dict[Stage, float] = {"decode": time.perf_counter() - start}
        return await self._part("image", at, pixels, query, deadline, seconds)

    async def _embed_texts(self, texts: Sequence[str], query: Query, deadline: float) -> Answered:
        with self._admit("text", len(texts)):
            start = time.perf_counter()
            with self._lanes["text"].expecting(len(texts)):
                tokens = await asyncio.to_thread(self.reco.encoder.tokenize, list(texts))  # (B, L)
            spent = time.perf_counter() - start
            self.observe("tokenize", "text", spent)
            part = await self._part("text", 0, list(tokens), query, deadline, {"tokenize": spent})
            return replace(self._answered("text", query, [part]), tokens=int(np.count_nonzero(tokens)))

    async def rank(
        self, rows: Sequence[EmbeddedItem], labels: LabelSet, snapshot: Snapshot | None, top_k: int, deadline: float
    ) -> Ranked:
        """The best labels of each row, their scores a softmax over all labels at the model's own temperature. Raises DeadlinePassed."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                candidates = await self.label_sets.vectors.get(labels, snapshot)
        except TimeoutError as error:
            done = max((each["done"] for each in self.label_sets.vectors.progress(labels)), default=0)
            raise DeadlinePassed(
                f"{done} of {len(labels.labels)} labels are embedded: ask again, what is done stays done"
            ) from error
        return await asyncio.to_thread(
            ranked, np.stack([row.vector for row in rows]), candidates, self.reco.encoder.logit_scale, top_k
        )

    async def _encoded(
        self, images: Sequence[bytes | ItemRefused], texts: Sequence[str], deadline: float
    ) -> Sequence[EmbeddedItem | ItemRefused]:
        """Plain rows of images or of texts."""
        plain = Query(None, self.reco.k, SearchParams(), neighbors=False)
        found = await (
            self._embed_images(images, plain, deadline) if images else self._embed_texts(texts, plain, deadline)
        )
        return found.rows

    def info(self) -> dict[str, Any]:
        """What is running, for /info; no path and no key."""
        encoder, chosen = self.reco.encoder, self.settings
        limits = {
            name: value for name, value in chosen.model_dump().items() if name.startswith("max_") or name.endswith("_s")
        }
        return {
            "version": version("reco-serve"),
            "model": {
                "name": chosen.model,
                "fingerprint": encoder.fingerprint,
                "dim": encoder.dim,
                "device": str(encoder.device),
            }
            | {
                "precision": chosen.precision,
                "fixed_shapes": encoder.fixed_shapes,
                "image_size": list(encoder.image_size),
            }
            | {"random_weights": chosen.pretrained == "random"},
            "fusion": {"id": self.reco.fusion_id, "k": self.reco.k, "max_k": self.reco.max_k},
            "memories": {
                "default": self.memories.default,
                "live": {row["name"]: row["current"] for row in self.memories.table() if row["live"]},
            },
            "limits": limits,
        }

    def refresh_gauges(self) -> None:
        """Set what is only known when asked; called at each scrape."""
        for side, lane in self._lanes.items():
            self.metrics.queue_depth.labels(side).set(lane.depth)
        for name, alive in Snapshot.count_open().items():
            self.metrics.snapshots_alive.labels(name).set(alive)
        for kind, size in gpu_memory(self.reco.encoder.device).items():
            self.metrics.gpu_memory_bytes.labels(kind).set(size)
        self.metrics.ready.set(self.not_ready() is None)

    async def _part(
        self,
        side: Side,
        at: int,
        arrays: Sequence[np.ndarray | ItemRefused],
        query: Query,
        deadline: float,
        seconds: dict[Stage, float],
    ) -> Answered:
        """Send the good items through the lane; put every outcome in its item's place."""
        good = {i: array for i, array in enumerate(arrays) if not isinstance(array, ItemRefused)}
        answers = await self._lanes[side].submit([QueuedItem(array, query) for array in good.values()], deadline)
        outcomes = dict(zip(good, answers, strict=True))
        rows = [
            array if isinstance(array, ItemRefused) else self._outcome(side, at + i, outcomes[i])
            for i, array in enumerate(arrays)
        ]
        longest: dict[Stage, float] = {
            "queue": max((found.queued_s for found in answers if isinstance(found, Answer)), default=0.0)
        }
        timings = [row.timings for row in rows if isinstance(row, EmbeddedItem)]
        for stage in ("encode", "retrieve", "fuse"):
            longest[stage] = max((getattr(timing, stage) for timing in timings), default=0.0)
        return Answered(rows, {**seconds, **longest})

    def _answered(self, side: Side, query: Query, parts: Sequence[Answered]) -> Answered:
        """The parts of a request as one, each stage as long as in the slowest."""
        rows, spent = [row for part in parts for row in part.rows], slowest(parts)
        self._recent.note(query.snapshot, side, rows)
        if self.tracing is not None:
            memory = "none" if query.snapshot is None else query.snapshot.ref
            self.tracing.stages(spent, {"reco.side": side, "reco.items": len(rows), "reco.memory": memory})
        return Answered(rows, spent)

    def _outcome(self, side: Side, index: int, found: Answer[EmbeddedItem] | Exception) -> EmbeddedItem | ItemRefused:
        if isinstance(found, Exception):
            return ItemRefused(f"{side}s[{index}]", found)
        self.observe("queue", side, found.queued_s)
        row = found.result
        self.metrics.items_total.labels(side).inc()
        reason = "neighbors" if row.enhanced else "no_neighbor" if row.searched else "off"
        self.metrics.enhanced_total.labels(str(row.enhanced).lower(), reason).inc()
        if row.similarity is not None:
            self.metrics.neighbor_similarity.labels(side).observe(row.similarity)
        return row

    async def _pixels(self, index: int, image: bytes | ItemRefused, deadline: float) -> np.ndarray | ItemRefused:
        if isinstance(image, ItemRefused):
            return image
        start = time.perf_counter()
        try:
            return await self._decoder.decode(image, deadline)
        except Exception as error:  # noqa: BLE001  whatever it is, it is this image's own
            return ItemRefused(f"images[{index}]", error)
        finally:
            self.observe("decode", "image", time.perf_counter() - start)

    @contextmanager
    def _admit(self, side: Side, items: int) -> Iterator[None]:
        """Refuse at the door, before any decoding, what would not fit behind the items already admitted."""
        if self._admitted[side] + items > self.settings.max_queue:
            self.metrics.rejected_total.labels("queue_full").inc()
            raise QueueFull(
                f"{self._admitted[side]} {side} items are admitted, {items} more would pass {self.settings.max_queue}: retry later"
            )
        self._admitted[side] += items
        try:
            yield
        finally:
            self._admitted[side] -= items

    async def _test_item(self, side: Side, deadline: float) -> Sequence[object]:
        """One real item through the whole of one tower, a memory's search included where there is one."""
        array = (
            np.zeros((3, *self.reco.encoder.image_size), np.uint8)
            if side == "image"
            else self.reco.encoder.tokenize(["pulse"])[0]
        )
        work = QueuedItem(array, Query(self.default_snapshot(), self.reco.k, SearchParams(), neighbors=False))
        return await self._lanes[side].submit([work], deadline)

    @contextmanager
    def timed(self, stage: Stage, side: Side) -> Iterator[None]:
        """Observe how long the block takes."""
        start = time.perf_counter()
        yield
        self.observe(stage, side, time.perf_counter() - start)

    def observe(self, stage: Stage, side: Side, seconds: float) -> None:
        """Add one duration to a stage's histogram."""
        self.metrics.stage_duration_seconds.labels(stage, side).observe(seconds)
