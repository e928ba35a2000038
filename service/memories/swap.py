"""Swaps and compactions: replace the snapshot that a memory serves, after everything was
checked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

from index_store import Snapshot
from index_store.editor import CompactedVersion, Editor
from index_store.errors import DamagedVersion, StoreError
from service.batching.executors import low_priority_threads
from service.errors import SwapInProgress
from service.memories.drift import lowest_mean
from service.memories.jobs import Job, Jobs
from service.memories.registry import MemoryRegistry
from service.observability.audit import audit
from service.observability.metrics import Metrics

log = logging.getLogger("reco")

SWAP_THREADS = 4  # swaps of several memories at a time

T = TypeVar("T")
Prepare = Callable[[Snapshot], Awaitable[None]]
Drift = Callable[[Snapshot, Snapshot], dict[str, dict[str, float]]]


class Swaps:
    """One swap or compaction per memory at a time; any failure leaves the current snapshot serving.

    prepare: embeds the stored label sets under a snapshot.  drift: compares two snapshots on recent
    queries, blocking.  Long work runs in low-priority threads, so that requests are not slowed;
    versions are read again in a thread of their own, so that no swap waits for a disk.
    State: the memories with a job, the versions to be read again, and the tasks of both.
    """

    def __init__(self, live: MemoryRegistry, jobs: Jobs, *, prepare: Prepare, drift: Drift, metrics: Metrics) -> None:
        self._live, self._jobs, self._prepare, self._drift, self._metrics = live, jobs, prepare, drift, metrics
        self._running: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._to_verify: set[tuple[str, str]] = set()
        self._pool, self._reader = low_priority_threads(SWAP_THREADS, "swap"), low_priority_threads(1, "verify")

    def swap(self, name: str, version: str, *, dry_run: bool = False) -> Job:
        """Start a swap of `name` to a version and return its job at once.

        Raises UnknownMemory, UnknownVersion, SwapInProgress.
        """
        job = Job("swap", name, self._live.version(name, version), dry_run)
        return self._start(job, self._swap(job))

    def compact(self, name: str) -> Job:
        """Start a compaction: the online edits of `name` become a new version.

        Raises UnknownMemory, NotServing, SwapInProgress.
        """
        self._live.editor(name)
        job = Job("compact", name, None)
        return self._start(job, self._compact(job))

    def busy(self, name: str) -> bool:
        """Whether a swap or a compaction of `name` is running."""
        return name in self._running

    def verify(self, name: str) -> None:
        """Read in the background the files whose checksums were not computed at opening."""
        snapshot = self._live.resolve(name)
        wanted = name, snapshot.manifest.version
        if snapshot.unread_files and wanted not in self._to_verify:
            self._to_verify.add(wanted)
            self._track(asyncio.create_task(self._verify_again(*wanted)))

    async def close(self) -> None:
        """Cancel running jobs. A job that has not written the pointer has changed nothing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pool in (self._pool, self._reader):
            pool.close()

    def _start(self, job: Job, work: Coroutine[Any, Any, None]) -> Job:
        if job.memory in self._running:
            work.close()
            raise SwapInProgress(f"a swap or a compaction of {job.memory!r} is running: wait for it to end, then retry")
        self._running.add(job.memory)
        self._jobs.add(job)
        self._track(asyncio.create_task(self._run(job, work)))
        return job

    def _track(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """Run one job to its end and record the outcome."""
        outcome = "dry_run" if job.dry_run else "done" if job.kind == "swap" else "compacted"
        before, start = self._live.current_versions().get(job.memory), time.perf_counter()
        try:
            await work
            self._jobs.update(job.id, state="done", phase="done", progress=1.0)
        except Exception as error:
            outcome, known = "failed", isinstance(error, StoreError)
            self._jobs.update(
                job.id, state="failed", error=str(error) if known else "internal error: see the service's log"
            )
            log.error("%s of %s failed: %s", job.kind, job.memory, error, exc_info=None if known else error)
        finally:
            self._running.discard(job.memory)
        self._metrics.memory_swaps_total.labels(job.memory, outcome).inc()
        audit(
            job.kind,
            outcome=outcome,
            memory=job.memory,
            job=job.id,
            seconds=round(time.perf_counter() - start, 6),
            **{"from": before, "to": self._jobs.version(job)},
        )

    async def _swap(self, job: Job) -> None:
        """The phases of a swap.

        Where the version being served is opened anew, edits wait: an edit made meanwhile would be
        missing in what was read.
        """
        name, version = job.memory, str(job.version)
        same_version = self._live.serves(name, version)
        async with self._live.lock(name) if same_version else nullcontext():
            with self._jobs.phase(job.id, "budget"):
                await asyncio.to_thread(self._live.check_budget, name, version)
            with self._jobs.phase(job.id, "verify"):
                editor = await self._run_in_background(self._live.open, name, version)
            await self._check_candidate(job, editor.snapshot)
            if job.dry_run:
                return
            async with nullcontext() if same_version else self._live.lock(name):
                # first the step that may fail: the pointer on disk
                with self._jobs.phase(job.id, "point"):
                    await asyncio.to_thread(self._live.write_current, name, version)
                with self._jobs.phase(job.id, "publish"):
                    retired = self._live.publish(name, editor)
        self._report_retired(job, retired, same_version=same_version)

    async def _compact(self, job: Job) -> None:
        name = job.memory
        editor = self._live.editor(name)

        def progress(done: int, total: int) -> None:
            self._jobs.update(job.id, progress=done / max(total, 1))

        with self._jobs.phase(job.id, "build"):
            prepared: CompactedVersion = await self._run_in_background(editor.compact_build, None, progress)
        self._jobs.update(job.id, version=prepared.snapshot.manifest.version)
        async with _discarded_on_failure(editor, prepared):
            await self._check_candidate(job, prepared.snapshot)
        async with self._live.lock(name):
            with self._jobs.phase(job.id, "point"):  # carries over the edits made meanwhile
                async with _discarded_on_failure(editor, prepared):
                    await asyncio.to_thread(editor.switch, prepared)
            with self._jobs.phase(job.id, "publish"):
                retired = self._live.publish(name, editor)
        self._jobs.update(job.id, retired=retired.ref if retired else None)
        await self._run_in_background(self._live.drop_compacted, name)

    async def _check_candidate(self, job: Job, snapshot: Snapshot) -> None:
        """Check probes, embed label sets and measure drift, before any request is answered from
        `snapshot`.
        """
        # the probes also warm the index: its pages are mapped afterwards
        with self._jobs.phase(job.id, "prove"):
            self._jobs.update(job.id, recall=await self._run_in_background(snapshot.check_recall))
        with self._jobs.phase(job.id, "labels"):
            await self._prepare(snapshot)
        if job.memory not in self._live.names():
            return
        with self._jobs.phase(job.id, "drift"):
            found = await self._run_in_background(self._drift, self._live.resolve(job.memory), snapshot)
        self._jobs.update(job.id, drift=found)
        lowest = lowest_mean(found)
        if lowest is not None:
            self._metrics.drift_cosine.labels(job.memory).set(lowest)

    def _report_retired(self, job: Job, retired: Snapshot | None, *, same_version: bool) -> None:
        left = retired.edits if retired is not None and not same_version else 0
        self._jobs.update(job.id, retired=retired.ref if retired else None, edits_left=left)
        if left:
            log.warning(
                "%s@%s lacks the %d online edits of what it replaced; a rollback brings them back",
                job.memory,
                job.version,
                left,
            )
        self.verify(job.memory)

    async def _run_in_background(self, work: Callable[..., T], *arguments: object) -> T:
        return await self._pool.run(work, *arguments)

    async def _verify_again(self, name: str, version: str) -> None:
        """Read a version again.

        It holds no snapshot: a version replaced meanwhile must be freed.
        """
        try:
            await self._reader.run(self._reverify, name, version)
        except DamagedVersion as error:
            if self._live.serves(name, version):
                self._live.note_damage(name, error)
        except StoreError as error:
            log.warning("memory %s could not be read again: %s", name, error)
        finally:
            self._to_verify.discard((name, version))

    def _reverify(self, name: str, version: str) -> None:
        """In a thread: read the version, unless another one has replaced it by then."""
        if self._live.serves(name, version):
            self._live.reverify(name, version)


@asynccontextmanager
async def _discarded_on_failure(editor: Editor, prepared: CompactedVersion) -> AsyncIterator[None]:
    """Delete the compacted version where the block fails.

    A cancelled one stays: the next compaction deletes it as redundant.
    """
    try:
        yield
    except Exception:
        await asyncio.to_thread(editor.discard, prepared.snapshot.manifest)
        raise
