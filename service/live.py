"""The live memories: which snapshot answers a name, and the job that replaces one while requests flow."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from index_store import Memory, Snapshot, Store
from index_store.errors import StoreError, UnknownVersion
from service.errors import NotFound, NotServing, RetiredVersion, SwapInProgress
from service.metrics import Metrics

log = logging.getLogger("reco")
KEPT_JOBS = 200

State = Literal["running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Job:
    """A swap as GET /jobs/{id} shows it; replaced, never changed, as the swap goes on."""

    memory: str
    version: str
    dry_run: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    state: State = "running"
    phase: str = "verify"
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    seconds: dict[str, float] = field(default_factory=dict)
    recall: dict[str, float] | None = None
    retired: str | None = None
    error: str | None = None


class LiveMemories:
    """Every memory being served, by name.

    State: one Memory per name, the names whose current version could not be opened with the reason, the swaps under way, and the last jobs.
    All of it changes on the event loop only; readers take `resolve`'s snapshot and keep it.
    """

    def __init__(self, store: Store, *, encoder: str, fusion: str, default: str | None, metrics: Metrics) -> None:
        self._store, self._encoder, self._fusion, self._metrics = store, encoder, fusion, metrics
        self._live: dict[str, Memory] = {}
        self._refused: dict[str, StoreError] = {}
        self._swapping: set[str] = set()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        for name in store.names():
            self._open(name)
        self.default = default or (next(iter(self._live)) if len(self._live) == 1 else None)
        if default is not None:
            self.resolve(default)  # the one memory asked for must answer, or the service does not start

    def resolve(self, wanted: str | None) -> Snapshot:
        """The snapshot that answers `name`, `name@version`, or the default.

        Raises NotServing without any memory, UnknownMemory, UnknownVersion, RetiredVersion for a version that is not the one served,
        and the reason why a memory could not be opened.
        """
        if wanted is None and self.default is None:
            known = ", ".join(sorted(self._live)) or "none: build one with `reco memory build`"
            raise NotServing(f"no default memory (live: {known}): name one in `memory`, or send enhance=false", "memory")
        name, _, version = (wanted or self.default or "").partition("@")
        if name in self._refused:
            raise self._refused[name]
        if name not in self._live:
            self._store.versions(name)  # raises UnknownMemory or NameRefused
            raise NotServing(f"memory {name!r} is in the store but not live: activate one of its versions", "memory")
        snapshot = self._live[name].current
        if version and version != snapshot.manifest.version:
            if version not in self._store.versions(name):
                raise UnknownVersion(f"memory {name!r} has no version {version!r}: it serves {snapshot.ref}")
            raise RetiredVersion(f"{name}@{version} is not being served, {snapshot.ref} is: pin that, or activate {version}", "memory")
        return snapshot

    def not_ready(self) -> str | None:
        """None, or why no memory answers by default."""
        try:
            self.resolve(None)
        except (NotServing, StoreError) as error:
            return str(error)
        return None

    def table(self) -> list[dict[str, Any]]:
        """One row per memory of the store, live or not."""
        return [self.row(name) for name in self._store.names()]

    def row(self, name: str) -> dict[str, Any]:
        """What GET /memories/{name} tells."""
        row: dict[str, Any] = {"name": name, "versions": self._store.versions(name), "live": name in self._live}
        if name in self._refused:
            row["error"] = str(self._refused[name])
        if name in self._live:
            snapshot = self._live[name].current
            found = snapshot.manifest
            row["previous"] = self._store.previous(name)
            row |= {"current": found.version, "pairs": found.pairs, "dim": found.dim, "encoder": found.encoder, "created": found.created}
            row |= {"recall": found.recall, "index": found.index, "keys": found.keys, "bytes": snapshot.bytes}
        return row

    def job(self, job_id: str) -> Job:
        """Raises NotFound."""
        if job_id not in self._jobs:
            raise NotFound(f"no job {job_id[:40]!r}: the last {KEPT_JOBS} are kept, until a restart")
        return self._jobs[job_id]

    def rollback_version(self, name: str) -> str:
        """The version served before the current one. Raises UnknownMemory, UnknownVersion."""
        version = self._store.previous(name)
        if version is None:
            raise UnknownVersion(f"memory {name!r} has no previous version to roll back to")
        return version

    def swap(self, name: str, version: str, prepare: Callable[[Snapshot], Awaitable[None]], *, dry_run: bool = False) -> Job:
        """Start replacing what `name` serves; returns at once. Raises UnknownMemory, UnknownVersion, SwapInProgress."""
        if version not in self._store.versions(name):
            raise UnknownVersion(f"memory {name!r} has no version {version!r}: it has {', '.join(self._store.versions(name))}")
        if name in self._swapping:
            raise SwapInProgress(f"a swap of {name!r} is running: wait for it to end, then retry")
        job = Job(name, version, dry_run)
        self._jobs[job.id] = job
        while len(self._jobs) > KEPT_JOBS:
            self._jobs.popitem(last=False)
        self._swapping.add(name)
        task = asyncio.create_task(self._run(job.id, prepare))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def close(self) -> None:
        """Give up the swaps under way; before their last phase nothing has changed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, job_id: str, prepare: Callable[[Snapshot], Awaitable[None]]) -> None:
        """One swap from start to end; any failure leaves the current snapshot serving."""
        job = self._jobs[job_id]
        try:
            await self._replace(job, prepare)
            self._note(job_id, state="done", phase="done")
            outcome = "dry_run" if job.dry_run else "done"
        except Exception as error:
            known = isinstance(error, StoreError)
            self._note(job_id, state="failed", error=str(error) if known else "internal error: see the service's log")
            log.error("swap to %s@%s failed: %s", job.memory, job.version, error, exc_info=None if known else error)
            outcome = "failed"
        finally:
            self._swapping.discard(job.memory)
        self._metrics.memory_swaps_total.labels(job.memory, outcome).inc()

    async def _replace(self, job: Job, prepare: Callable[[Snapshot], Awaitable[None]]) -> None:
        name = job.memory
        with self._phase(job.id, "verify"):
            snapshot = await asyncio.to_thread(self._store.open, name, job.version, encoder=self._encoder)
        with self._phase(job.id, "prove"):  # the probes also warm the index: every later search finds its pages mapped
            self._note(job.id, recall=await asyncio.to_thread(snapshot.prove))
        with self._phase(job.id, "labels"):
            await prepare(snapshot)
        if job.dry_run:
            return
        with self._phase(job.id, "publish"):
            await asyncio.to_thread(self._store.activate, name, job.version)  # first what may fail: the pointer on disk
            self._publish(name, snapshot, job.id)

    def _publish(self, name: str, snapshot: Snapshot, job_id: str) -> None:
        """The critical section: one assignment."""
        if name in self._live:
            retired = self._live[name].swap(snapshot)
            self._note(job_id, retired=retired.ref)
        else:
            self._live[name] = Memory(snapshot)
        self._refused.pop(name, None)
        if self.default is None and len(self._live) == 1:
            self.default = name
        self._describe(snapshot)

    def _open(self, name: str) -> None:
        """Serve a memory's current version, or keep the reason why not: one bad memory does not stop the others."""
        try:
            snapshot = self._store.open(name, encoder=self._encoder)
        except StoreError as error:
            self._refused[name] = error
            log.warning("memory %s is not served: %s", name, error)
            return
        self._live[name] = Memory(snapshot)
        self._describe(snapshot)

    def _describe(self, snapshot: Snapshot) -> None:
        name, found = snapshot.manifest.name, snapshot.manifest
        self._metrics.memory_info.labels(name).info({"version": found.version, "encoder": found.encoder, "fusion": self._fusion})
        self._metrics.memory_pairs.labels(name).set(found.pairs)
        self._metrics.memory_created_timestamp_seconds.labels(name).set(datetime.fromisoformat(found.created).timestamp())
        for tier, size in snapshot.bytes.items():
            self._metrics.memory_bytes.labels(name, tier).set(size)

    @contextmanager
    def _phase(self, job_id: str, phase: str) -> Iterator[None]:
        self._note(job_id, phase=phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._metrics.memory_swap_duration_seconds.labels(phase).observe(spent)
            self._note(job_id, seconds={**self._jobs[job_id].seconds, phase: round(spent, 6)})

    def _note(self, job_id: str, **changes: Any) -> None:
        if job_id in self._jobs:
            self._jobs[job_id] = replace(self._jobs[job_id], **changes)
