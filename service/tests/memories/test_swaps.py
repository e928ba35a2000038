"""Swaps and compactions of real memories without a model: what a job tells, and what is left
behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from index_store import Snapshot, Store
from index_store.errors import DamagedVersion
from index_store.tests.storage.test_checksums import record_current_stats
from index_store.tests.storage.test_damage import flip
from index_store.tests.support.small import ENCODER, build_memory, some_pairs, unlock
from service.memories.jobs import Job, Jobs
from service.memories.registry import MemoryRegistry
from service.memories.swap import Swaps
from service.observability.metrics import Metrics

DRIFT = {"image": {"mean": 0.9, "p5": 0.8, "queries": 7}}


async def no_labels(_: Snapshot) -> None:
    """No label set is stored."""


class World:
    """things@v1 is served, v2 is there too."""

    def __init__(self, root: Path, budget: int = 1 << 40) -> None:
        for version in ("v1", "v2"):
            build_memory(root, some_pairs(30), version)
        self.store, metrics = Store(root), Metrics(version="0", torch="0", faiss="0")
        self.store.activate("things", "v1")
        self.budget, self.metrics = budget, metrics
        self.live = self.opened("things")
        self.jobs = Jobs(metrics)
        self.swaps = Swaps(self.live, self.jobs, prepare=no_labels, drift=lambda old, new: DRIFT, metrics=metrics)

    def opened(self, default: str) -> MemoryRegistry:
        """The memories as a start opens them."""
        return MemoryRegistry(
            self.store,
            encoder=ENCODER,
            fusion="none",
            default=default,
            budget=self.budget,
            devices=(),
            metrics=self.metrics,
        )

    async def ended(self, job: Job) -> Job:
        while self.jobs.get(job.id).state == "running":  # noqa: ASYNC110  jobs are polled, here as over HTTP
            await asyncio.sleep(0.001)
        return self.jobs.get(job.id)

    async def swapped(self, version: str) -> Job:
        return await self.ended(self.swaps.swap("things", version))

    async def compacted(self) -> Job:
        return await self.ended(self.swaps.compact("things"))

    async def edited(self, first: int) -> None:
        await self.live.edit("things", lambda editor: editor.put(some_pairs(2, first=first)))

    def run(self, story: Callable[[], Awaitable[None]]) -> None:
        async def told() -> None:
            await story()
            await self.swaps.close()
            self.live.close()

        asyncio.run(told())


def test_a_compaction_beside_a_version_that_cannot_be_read(tmp_path: Path) -> None:
    world = World(tmp_path)
    (unlock(tmp_path / "things" / "v2") / "manifest.json").write_text("{}")

    async def story() -> None:
        await world.edited(100)
        job = await world.compacted()
        assert (job.state, job.error) == ("done", None)
        assert world.live.resolve("things").ref == f"things@{job.version}"

    world.run(story)


def test_a_compaction_that_fails_its_checks_leaves_no_version(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def refuse(_: Snapshot) -> None:
        raise DamagedVersion("the labels cannot be embedded")

    async def story() -> None:
        await world.edited(100)
        world.swaps._prepare = refuse
        job = await world.compacted()
        assert (job.state, job.error) == ("failed", "the labels cannot be embedded")
        assert world.store.versions("things") == ["v1", "v2"]
        world.swaps._prepare = no_labels
        assert (await world.compacted()).state == "done"

    world.run(story)


def test_a_memory_that_is_not_served_is_not_kept_and_its_reason_does_not_grow(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def story() -> None:
        await world.edited(100)
        await world.edited(200)

    world.run(story)
    journal = world.store.journal_path("things", "v1")
    journal.write_bytes(journal.read_bytes()[:80] + b"?" + journal.read_bytes()[81:])
    build_memory(tmp_path, some_pairs(5), "v1", name="others")
    world.store.activate("others", "v1")
    before = Snapshot.count_open().get("things", 0)
    live = world.opened("others")
    # the version was whole, its edits are not
    assert Snapshot.count_open().get("things", 0) == before
    depths = []
    for _ in range(5):
        with pytest.raises(DamagedVersion, match=r"things/v1\.journal: bytes 56 to \d+ are damaged") as refused:
            live.resolve("things")
        depths.append(len(refused.traceback))
    assert len({*depths}) == 1


def test_compactions_leave_only_what_a_rollback_needs(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def story() -> None:
        made = []
        for turn in range(4):
            await world.edited(100 + turn)
            made.append((await world.compacted()).version)
        assert len({*made}) == 4  # no name means two things
        assert world.store.versions("things") == [*map(str, made[2:]), "v1", "v2"]

    world.run(story)


def test_edits_that_a_rollback_left_behind_outlive_compactions(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def story() -> None:
        await world.edited(100)
        folded = str((await world.compacted()).version)
        await world.edited(200)
        back = await world.swapped("v1")
        assert (back.retired, back.edits_left) == (f"things@{folded}+1", 1)
        await world.edited(300)
        await world.compacted()
        again = await world.swapped(folded)
        assert again.state == "done", again.error
        assert world.live.resolve("things").ref == f"things@{folded}+1"
        assert len(world.live.resolve("things")) == 34

    world.run(story)


def test_a_swap_beyond_the_budget_is_refused_with_the_numbers_and_nothing_is_loaded(tmp_path: Path) -> None:
    held = 30 * 16 * 4 * 2
    world = World(tmp_path, budget=2 * held)
    build_memory(tmp_path, some_pairs(31), "large")
    before = Snapshot.count_open()

    async def story() -> None:
        job = await world.swapped("large")
        assert job.state == "failed"
        assert job.error == (
            f"things@large needs {31 * 16 * 4 * 2:,} bytes resident beside the {held:,} held, the budget is {2 * held:,}: "
            "raise memory_budget_bytes, or build it with a mapped index (--index auto or IVF…,SQfp16)"
        )
        assert list(job.seconds) == ["budget"]
        assert (world.live.resolve("things").ref, world.store.current("things")) == ("things@v1", "v1")
        assert Snapshot.count_open() == before
        assert (await world.swapped("v2")).state == "done"

    world.run(story)


def newer(version: Path) -> None:
    fields = json.loads((version / "manifest.json").read_text())
    (version / "manifest.json").write_text(json.dumps({**fields, "format": 7}))


def stranger(version: Path) -> None:
    shutil.rmtree(version)
    build_memory(version.parents[1], some_pairs(30), "v3", encoder="other/model@000000000000")


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "a newer format": (
        newer,
        "things@v3: manifest.json has format 7, this program reads format 2: upgrade it, or rebuild the version",
    ),
    "a missing file": (
        lambda version: (version / "shard-0000" / "text.npy").unlink(),
        "things@v3: shard-0000/text.npy cannot be read (No such file or directory): restore or rebuild the version",
    ),
    "a cut file": (
        lambda version: os.truncate(version / "shard-0000" / "text.npy", 1000),
        "things@v3: shard-0000/text.npy has 1000 bytes, the manifest says 1088, and differs in bytes 0-1087: "
        "restore or rebuild the version",
    ),
    "another encoder": (
        stranger,
        f"things@v3 was built by other/model@000000000000, this service encodes with {ENCODER}: rebuild it, or serve its encoder",
    ),
}


@pytest.mark.parametrize("what", HARM)
def test_what_cannot_be_served_is_refused_in_one_line_and_what_serves_goes_on(tmp_path: Path, what: str) -> None:
    world, (harm, told) = World(tmp_path), HARM[what]
    build_memory(tmp_path, some_pairs(30), "v3")
    harm(tmp_path / "things" / "v3")

    async def story() -> None:
        job = await world.swapped("v3")
        assert (job.state, job.error) == ("failed", told)
        assert (world.live.resolve("things").ref, world.store.current("things")) == ("things@v1", "v1")
        await world.edited(100)
        assert (await world.swapped("v2")).state == "done"

    world.run(story)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[str]]]:
    """Every file counts as large; versions are read again in the background once the event is set,
    here are their names.
    """
    monkeypatch.setattr("index_store.storage.checksums.SMALL_BYTES", 0)
    go, names = threading.Event(), list[str]()

    def slow(_: MemoryRegistry, name: str, version: str) -> None:
        go.wait(60)
        names.append(f"{name}@{version}")

    monkeypatch.setattr(MemoryRegistry, "reverify", slow)
    yield go, names
    go.set()


def test_what_is_read_again_holds_up_no_swap_and_keeps_no_snapshot(
    tmp_path: Path, read: tuple[threading.Event, list[str]]
) -> None:
    world, before = World(tmp_path), Snapshot.count_open()

    async def story() -> None:
        world.swaps.verify("things")
        for turn in range(12):
            assert (await asyncio.wait_for(world.swapped("v1" if turn % 2 else "v2"), 30)).state == "done"
        assert Snapshot.count_open() == before
        read[0].set()
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if "things@v1" in read[1]:
                break
        assert {*read[1]} <= {"things@v1", "things@v2"}
        # once for each that had begun or is served, not once for each swap
        assert len(read[1]) <= 2

    world.run(story)


def test_rot_that_no_stat_shows_is_told_while_what_serves_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("index_store.storage.checksums.SMALL_BYTES", 0)
    world, version = World(tmp_path), tmp_path / "things" / "v2"
    flip(version / "shard-0000" / "text.npy", 300)
    record_current_stats(version, world.store.manifest("things", "v2"))

    async def story() -> None:
        assert (await world.swapped("v2")).state == "done"  # opened on the word of the builder
        for _ in range(1000):
            if "error" in world.live.row("things"):
                break
            await asyncio.sleep(0.01)
        assert "things@v2: shard-0000/text.npy differs in bytes 0-1087" in world.live.row("things")["error"]
        assert world.live.resolve("things").ref == "things@v2"
        assert (await world.swapped("v1")).state == "done"
        assert "error" not in world.live.row("things")
        # nobody trusts it again
        assert "differs in bytes" in str((await world.swapped("v2")).error)

    world.run(story)
    assert "is being served, but its files are no longer as they were built" in caplog.text


def test_a_dry_run_tells_recall_and_drift_and_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def story() -> None:
        job = await world.ended(world.swaps.swap("things", "v2", dry_run=True))
        assert (job.state, job.recall, job.drift) == ("done", {"image": 1.0, "text": 1.0}, DRIFT)
        assert job.seconds.keys() == {"budget", "verify", "prove", "labels", "drift"}
        assert (world.live.resolve("things").ref, world.store.current("things")) == ("things@v1", "v1")

    world.run(story)


def test_a_swap_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, seen = World(tmp_path), list[tuple[str, float | None]]()
    note = world.jobs.update

    def noted(job_id: str, **changes: object) -> None:
        note(job_id, **changes)
        job = world.jobs.get(job_id)
        seen.append((job.phase, job.progress))

    monkeypatch.setattr(world.jobs, "update", noted)

    async def story() -> None:
        assert (await world.swapped("v2")).progress == 1

    world.run(story)
    shares = [share or 0.0 for _, share in seen]
    assert shares == sorted(shares)
    assert len({*shares}) == 8
    assert list(dict.fromkeys(phase for phase, _ in seen)) == [
        *("budget", "verify", "prove", "labels", "drift", "point", "publish"),
        "done",
    ]
