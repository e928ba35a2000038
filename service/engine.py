"""The engine: owns the model, the memories being served, the towers and the label sets.

Everything that a route asks for is a method of the engine or of what it owns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.metadata import version
from typing import Any

import numpy as np

from index_store import SearchParams, Snapshot, Store
from index_store.errors import StoreUnwritable
from models.encoder.device import gpu_memory
from models.reco import Reco
from models.starter import MEMORY, install_starter, starter_labels
from service.access.gate import Gate
from service.batching.batcher import DeadlinePassed
from service.decoding.fork_server import ForkServer
from service.errors import InvalidValue, ItemRefused
from service.labels.cache import rank_candidates
from service.labels.label_set import LabelSet
from service.labels.scoring import Ranked, ScoreFunction
from service.labels.store import LabelSets
from service.memories.budget import allowed_bytes
from service.memories.drift import measure_drift
from service.memories.edits import MemoryEdits
from service.memories.jobs import Jobs
from service.memories.query_log import QueryLog
from service.memories.recall import RecallSampler
from service.memories.registry import MemoryRegistry
from service.memories.swap import Swaps
from service.observability.metrics import Metrics
from service.observability.tracing import Tracing
from service.pipeline.embedder import Embedder
from service.pipeline.load import load_reco
from service.pipeline.stages import EmbeddedItem, EmbedResult, Items, Query
from service.pipeline.watchdog import PARTS
from service.settings import Settings

log = logging.getLogger("reco")


class Engine:
    """Opened once per process.

    fork_server: of the processes that decode images; the engine closes it.
    State: whether it is draining, and how many guarded requests are inside (the middleware counts).
    """

    def __init__(
        self,
        settings: Settings,
        reco: Reco,
        store: Store,
        metrics: Metrics,
        fork_server: ForkServer,
    ) -> None:
        self.settings, self.reco, self.metrics = settings, reco, metrics
        self.gate = Gate(settings)
        self.memories = MemoryRegistry(
            store,
            encoder=reco.encoder.fingerprint,
            fusion=reco.fusion_id,
            default=settings.memory or (MEMORY if settings.model == "starter" and MEMORY in store.names() else None),
            budget=allowed_bytes(settings.memory_budget_bytes),
            devices=settings.search_devices,
            metrics=metrics,
        )
        self.score_function = ScoreFunction(reco.encoder.logit_scale, reco.encoder.logit_bias)
        self.label_sets = _open_label_sets(settings, reco, store, self.score_function, metrics)
        self._fork_server = fork_server
        self.embedder = Embedder(reco, settings, metrics, self.default_snapshot, self._fork_server)
        self.jobs = Jobs(metrics)
        self._query_log = QueryLog()
        self.swaps = Swaps(
            self.memories,
            self.jobs,
            prepare=self.label_sets.embed_all,
            drift=lambda old, new: measure_drift(reco, self._query_log, old, new),
            metrics=metrics,
        )
        self.edits = MemoryEdits(self.memories, self.swaps, self._embed_plain, settings)
        self._recall = RecallSampler(self._query_log, self.memories.resolve, metrics, share=settings.recall_share)
        self.tracing = Tracing.from_environment()
        self.draining = False
        self.inside = 0

    @classmethod
    def open(cls, settings: Settings) -> Engine:
        """Load the encoder, the fusion and every current memory.

        The starter's own memory and label set are installed where it serves them and the store can
        be written.  Raises ModelError, StoreError or ServiceError, each one line.
        """
        import faiss
        import torch

        fork_server = ForkServer()
        fork_server.start()  # its imports take as long as a third of the model's
        reco, store = load_reco(settings), Store(settings.store)
        starter = settings.model == "starter" and settings.memory in (None, MEMORY)
        if starter:
            with _if_writable(store, "memory"):
                install_starter(store)
        metrics = Metrics(version=version("reco-serve"), torch=torch.__version__, faiss=faiss.__version__)
        engine = cls(settings, reco, store, metrics, fork_server)
        if starter and not engine.label_sets.names():
            with _if_writable(store, "label set"):
                engine.label_sets.put(MEMORY, LabelSet(tuple(starter_labels())))
        return engine

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve batches inside; at the end answer what was admitted, for at most `drain_s`."""
        embedder = self.embedder
        serving = [asyncio.create_task(tower.serve()) for tower in embedder.towers.values()]
        await embedder.decoder.start()
        for part in PARTS:
            # the first batch of each tower warms it before ready
            await embedder.watchdog.check(part)
        background = [asyncio.create_task(embedder.watchdog.run()), asyncio.create_task(self._recall.run())]
        for name in self.memories.names():
            self.swaps.verify(name)
        try:
            yield
        finally:
            self.draining = True
            for task in background:
                task.cancel()
            await self.swaps.close()
            # a model that hangs would delay the end; waiting callers are answered
            with suppress(TimeoutError):
                async with asyncio.timeout(max(1.0, self.settings.drain_s)):
                    await asyncio.gather(embedder.close(), *serving)
            self.label_sets.vectors.close()
            await embedder.decoder.close()
            await asyncio.to_thread(self._fork_server.close)
            self.memories.close()
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close)

    def not_live(self) -> str | None:
        """None, or which worker or decoder does not answer."""
        return self.embedder.not_live()

    def not_ready(self) -> str | None:
        """None, or why no traffic should be sent here."""
        if self.draining:
            return "shutting down"
        return self.embedder.watchdog.stale() or self.not_live() or self.memories.not_ready()

    def default_snapshot(self) -> Snapshot | None:
        """The snapshot that answers a request which names no memory, None without one."""
        return None if self.memories.not_ready() else self.memories.resolve(None)

    def query(self, snapshot: Snapshot | None, *, k: int | None, params: SearchParams, neighbors: bool) -> Query:
        """The query of a request with `snapshot` pinned. k: None = the fusion's own.

        Raises InvalidValue for a k beyond the fusion's.
        """
        wanted = self.reco.k if k is None else k
        if wanted > self.reco.max_k:
            raise InvalidValue(f"k = {wanted}: this fusion takes 1 to {self.reco.max_k} neighbours", "k")
        return Query(snapshot, wanted, params, neighbors)

    async def embed(self, items: Items, query: Query, deadline: float) -> EmbedResult:
        """Embed all items of a request, remember its queries, and trace its stages.

        deadline: a `time.monotonic()` instant.  Raises QueueFull, BatcherClosed for the whole
        request.
        """
        result = await self.embedder.embed(items, query, deadline)
        self._query_log.note(query.snapshot, items.side, result.rows)
        if self.tracing is not None:
            memory = "none" if query.snapshot is None else query.snapshot.ref
            attributes = {"reco.side": items.side, "reco.items": len(result.rows), "reco.memory": memory}
            self.tracing.stages(result.seconds, attributes)
        return result

    async def rank(
        self, rows: Sequence[EmbeddedItem], labels: LabelSet, snapshot: Snapshot | None, top_k: int, deadline: float
    ) -> Ranked:
        """The best labels of each row, scored as the model was trained.

        snapshot: what enhances the labels, None = nothing.  Raises DeadlinePassed.
        """
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                candidates = await self.label_sets.vectors.get(labels, snapshot)
        except TimeoutError as error:
            done = max((each["done"] for each in self.label_sets.vectors.progress(labels)), default=0)
            raise DeadlinePassed(
                f"{done} of {len(labels.labels)} labels are embedded: ask again, what is done stays done"
            ) from error
        vectors = np.stack([row.vector for row in rows])
        return await asyncio.to_thread(rank_candidates, vectors, candidates, self.score_function, top_k)

    async def _embed_plain(
        self, images: Sequence[bytes | ItemRefused], texts: Sequence[str], deadline: float
    ) -> Sequence[EmbeddedItem | ItemRefused]:
        """Plain rows of images or of texts, for edits."""
        query = Query(None, self.reco.k, SearchParams(), neighbors=False)
        return (await self.embedder.embed(Items(images, texts), query, deadline)).rows

    def info(self) -> dict[str, Any]:
        """What is running, for /info; no path and no key."""
        encoder, settings = self.reco.encoder, self.settings
        limits = {name: value for name, value in settings.model_dump().items() if name.startswith("max_")}
        limits |= {name: value for name, value in settings.model_dump().items() if name.endswith("_s")}
        return {
            "version": version("reco-serve"),
            "model": {
                "name": settings.model,
                "fingerprint": encoder.fingerprint,
                "dim": encoder.dim,
                "device": str(encoder.device),
                "precision": settings.precision,
                "fixed_shapes": encoder.fixed_shapes,
                "image_size": list(encoder.image_size),
                "random_weights": settings.pretrained == "random",
            },
            "fusion": {"id": self.reco.fusion_id, "k": self.reco.k, "max_k": self.reco.max_k},
            "memories": {"default": self.memories.default, "live": self.memories.current_versions()},
            "limits": limits,
        }

    def refresh_gauges(self) -> None:
        """Set the gauges whose values are known only when asked, at each scrape."""
        self.embedder.decoder.refresh_gauges()
        for side, tower in self.embedder.towers.items():
            self.metrics.queue_depth.labels(side).set(tower.depth)
        for name, count in Snapshot.count_open().items():
            self.metrics.snapshots_alive.labels(name).set(count)
        for kind, size in gpu_memory(self.reco.encoder.device).items():
            self.metrics.gpu_memory_bytes.labels(kind).set(size)
        self.metrics.ready.set(self.not_ready() is None)


def _open_label_sets(
    settings: Settings, reco: Reco, store: Store, function: ScoreFunction, metrics: Metrics
) -> LabelSets:
    return LabelSets(
        store.root / ".label-sets",
        reco.embed_labels,
        function=function,
        max_texts=settings.max_labels,
        max_chars=settings.max_list_chars,
        max_stored=settings.max_stored_labels,
        max_sets=settings.max_label_sets,
        metrics=metrics,
    )


@contextmanager
def _if_writable(store: Store, what: str) -> Iterator[None]:
    """Go on without what the block installs where the store is a folder that cannot be written."""
    try:
        yield
    except StoreUnwritable as error:
        if not store.root.is_dir():
            raise
        log.warning("the starter's %s is not installed: %s", what, error)
