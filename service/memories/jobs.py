"""Jobs: swaps and compactions as GET /jobs/{id} shows them."""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from service.errors import NotFound
from service.observability.metrics import Metrics

MAX_JOBS = 200
SWAP_PHASES = 7  # budget, verify, prove, labels, drift, point, publish

State = Literal["running", "done", "failed"]
Kind = Literal["swap", "compact"]


@dataclass(frozen=True, slots=True)
class Job:
    """A swap or a compaction; a new value replaces the old one as it progresses.

    progress: share of the pairs written (compaction) or of the phases done (swap).  recall: of the
    probes, per side.
    drift: per side, cosines between recent queries' vectors under the old and the new snapshot.
    edits_left: online edits of the retired version that the new one does not have; a rollback
    brings them back.
    """

    kind: Kind
    memory: str
    version: str | None
    dry_run: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    state: State = "running"
    phase: str = "waiting"
    progress: float | None = None
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    seconds: dict[str, float] = field(default_factory=dict)
    recall: dict[str, float] | None = None
    drift: dict[str, dict[str, float]] | None = None
    retired: str | None = None
    edits_left: int = 0
    error: str | None = None


class Jobs:
    """The last MAX_JOBS jobs, until a restart."""

    def __init__(self, metrics: Metrics) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._metrics = metrics

    def add(self, job: Job) -> Job:
        """Add a job; the oldest is removed beyond MAX_JOBS."""
        self._jobs[job.id] = job
        while len(self._jobs) > MAX_JOBS:
            self._jobs.popitem(last=False)
        return job

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        if job_id not in self._jobs:
            raise NotFound(f"no job {job_id[:40]!r}: the last {MAX_JOBS} are kept, until a restart")
        return self._jobs[job_id]

    def version(self, job: Job) -> str | None:
        """The version that a job makes or activates, None while a compaction has not named it."""
        return self._jobs.get(job.id, job).version

    def update(self, job_id: str, **changes: Any) -> None:
        """Change fields of a job, if it is still in the list."""
        if job_id in self._jobs:
            self._jobs[job_id] = replace(self._jobs[job_id], **changes)

    @contextmanager
    def phase(self, job_id: str, phase: str) -> Iterator[None]:
        """Show a phase of a job, and record its seconds."""
        self.update(job_id, phase=phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._metrics.memory_swap_duration_seconds.labels(phase).observe(spent)
            if job_id in self._jobs:
                self.update(job_id, seconds={**self._jobs[job_id].seconds, phase: round(spent, 6)})
        if job_id in self._jobs and self._jobs[job_id].kind == "swap":
            self.update(job_id, progress=round(len(self._jobs[job_id].seconds) / SWAP_PHASES, 2))
