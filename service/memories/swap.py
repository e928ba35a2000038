"""Replacing what a memory serves while requests flow: check everything first, then one assignment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import nullcontext
from typing import Any, TypeVar

from index_store import Snapshot
from index_store.editor import CompactedVersion
from index_store.errors import DamagedVersion, StoreError
from service.batching.executors import low_priority_threads
from service.errors import SwapInProgress
from service.memories.drift import worst
from service.memories.jobs import Job, Jobs
from service.memories.registry import MemoryRegistry
from service.observability.metrics import Metrics

log = logging.getLogger("reco")

WORKERS = 4  # of swaps of several memories at a time

T = TypeVar("T")
Prepare = Callable[[Snapshot], Awaitable[None]]
Drift = Callable[[Snapshot, Snapshot], dict[str, dict[str, float]]]


class Swaps:
    """One swap or compaction per memory at a time; any failure leaves the current snapshot serving.

    prepare: embeds the stored label sets under a snapshot.  drift: compares two snapshots on recent queries, blocking.
    State: the names under way, the versions to be read again, and the tasks of both. What takes long runs aside, so that requests are
    answered as fast as ever; reading again in a thread of its own, so that no swap waits for a disk.
    """

    def __init__(self, live: MemoryRegistry, jobs: Jobs, *, prepare: Prepare, drift: Drift, metrics: Metrics) -> None:
        self._live, self._jobs, self._prepare, self._drift, self._metrics = live, jobs, prepare, drift, metrics
        self._under_way: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._to_read: set[tuple[str, str]] = set()
        self._pool, self._reader = low_priority_threads(WORKERS, "swap"), low_priority_threads(1, "verify")

    def swap(self, name: str, version: str, *, dry_run: bool = False) -> Job:
        """Start replacing what `name` serves; returns at once. Raises UnknownMemory, UnknownVersion, SwapInProgress."""
        job = Job("swap", name, self._live.version(name, version), dry_run)
        return self._begin(job, self._swap(job))

    def compact(self, name: str) -> Job:
        """Start folding the online edits of `name` into a new version. Raises UnknownMemory, NotServing, SwapInProgress."""
        self._live.editor(name)
        job = Job("compact", name, None)
        return self._begin(job, self._compact(job))

    def busy(self, name: str) -> bool:
        """Whether one is under way."""
        return name in self._under_way

    def verify(self, name: str) -> None:
        """Read again, in the background, what was opened on the word of an earlier reading."""
        snapshot = self._live.resolve(name)
        wanted = name, snapshot.manifest.version
        if snapshot.unread_files and wanted not in self._to_read:
            self._to_read.add(wanted)
            self._keep(asyncio.create_task(self._verified(*wanted)))

    async def close(self) -> None:
        """Give up what is under way; before its last phase nothing has changed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pool in (self._pool, self._reader):
            pool.close()

    def _begin(self, job: Job, work: Coroutine[Any, Any, None]) -> Job:
        if job.memory in self._under_way:
            work.close()
            raise SwapInProgress(f"a swap or a compaction of {job.memory!r} is running: wait for it to end, then retry")
        self._under_way.add(job.memory)
        self._jobs.add(job)
        self._keep(asyncio.create_task(self._run(job, work)))
        return job

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """One job from start to end."""
        outcome = "dry_run" if job.dry_run else "done" if job.kind == "swap" else "compacted"
        try:
            await work
            self._jobs.note(job.id, state="done", phase="done", progress=1.0)
        except Exception as error:
            outcome, known = "failed", isinstance(error, StoreError)
            self._jobs.note(
                job.id, state="failed", error=str(error) if known else "internal error: see the service's log"
            )
            log.error("%s of %s failed: %s", job.kind, job.memory, error, exc_info=None if known else error)
        finally:
            self._under_way.discard(job.memory)
        self._metrics.memory_swaps_total.labels(job.memory, outcome).inc()

    async def _swap(self, job: Job) -> None:
        """Edits wait only where the version that serves is opened anew: an edit made meanwhile would not be in what was read."""
        name, version = job.memory, str(job.version)
        again = self._live.serves(name, version)
        async with self._live.editing(name) if again else nullcontext():
            with self._jobs.phase(job.id, "budget"):
                await asyncio.to_thread(self._live.afford, name, version)
            with self._jobs.phase(job.id, "verify"):
                editor = await self._aside(self._live.open, name, version)
            await self._proven(job, editor.snapshot)
            if job.dry_run:
                return
            async with nullcontext() if again else self._live.editing(name):
                with self._jobs.phase(job.id, "point"):  # first what may fail: the pointer on disk
                    await asyncio.to_thread(self._live.point, name, version)
                with self._jobs.phase(job.id, "publish"):
                    retired = self._live.publish(name, editor)
        self._retired(job, retired, again=again)

    async def _compact(self, job: Job) -> None:
        name = job.memory
        editor = self._live.editor(name)

        def progress(done: int, total: int) -> None:
            self._jobs.note(job.id, progress=done / max(total, 1))

        with self._jobs.phase(job.id, "build"):
            prepared: CompactedVersion = await self._aside(editor.compact_build, None, progress)
        self._jobs.note(job.id, version=prepared.snapshot.manifest.version)
        await self._proven(job, prepared.snapshot)
        async with self._live.editing(name):
            with self._jobs.phase(job.id, "point"):  # carries the edits made meanwhile over
                await asyncio.to_thread(editor.switch, prepared)
            with self._jobs.phase(job.id, "publish"):
                retired = self._live.publish(name, editor)
        self._jobs.note(job.id, retired=retired.ref if retired else None)
        await self._aside(self._live.drop_compacted, name)

    async def _proven(self, job: Job, snapshot: Snapshot) -> None:
        """Probes, label sets, drift: all that must hold, or be ready, before anybody is answered from `snapshot`."""
        with self._jobs.phase(
            job.id, "prove"
        ):  # the probes also warm the index: every later search finds its pages mapped
            self._jobs.note(job.id, recall=await self._aside(snapshot.check_recall))
        with self._jobs.phase(job.id, "labels"):
            await self._prepare(snapshot)
        if job.memory not in self._live.names():
            return
        with self._jobs.phase(job.id, "drift"):
            found = await self._aside(self._drift, self._live.resolve(job.memory), snapshot)
        self._jobs.note(job.id, drift=found)
        lowest = worst(found)
        if lowest is not None:
            self._metrics.drift_cosine.labels(job.memory).set(lowest)

    def _retired(self, job: Job, retired: Snapshot | None, *, again: bool) -> None:
        left = retired.edits if retired is not None and not again else 0
        self._jobs.note(job.id, retired=retired.ref if retired else None, edits_left=left)
        if left:
            log.warning(
                "%s@%s lacks the %d online edits of what it replaced; a rollback brings them back",
                job.memory,
                job.version,
                left,
            )
        self.verify(job.memory)

    async def _aside(self, work: Callable[..., T], *arguments: object) -> T:
        return await self._pool.run(work, *arguments)

    async def _verified(self, name: str, version: str) -> None:
        """Holds no snapshot meanwhile: a version that is replaced while it is read must be free to die."""
        try:
            await self._reader.run(self._read_again, name, version)
        except DamagedVersion as error:
            if self._live.serves(name, version):
                self._live.damaged(name, error)
        except StoreError as error:
            log.warning("memory %s could not be read again: %s", name, error)
        finally:
            self._to_read.discard((name, version))

    def _read_again(self, name: str, version: str) -> None:
        """In a thread, when its turn comes; nothing where another version has taken its place by then."""
        if self._live.serves(name, version):
            self._live.reverify(name, version)
