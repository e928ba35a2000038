"""A build that is stopped, killed or runs out of room goes on where it was: real processes, and the
whole build as the oracle.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_store.build.build import build_version
from index_store.build.source import BuildProgress, BuildSource, Reject, SourceStep
from index_store.build.staging import BUILD_FILES
from index_store.errors import DamagedVersion, PairsRefused, RecallTooLow, StoreBusy, StoreUnwritable, VersionExists
from index_store.storage.manifest import Manifest
from index_store.store import Store
from index_store.tests.build.test_crash import limited
from index_store.tests.support.child_process import ForkServer, kill_count
from index_store.tests.support.small import ENCODER, TRUNKS, VECTORS, some_pairs
from index_store.types import Pairs

BLOCK = 50  # items of one step, one of them a reject


class Source:
    """Numbered items, every BLOCK-th a reject; remembers where each run began and how many items it
    was made to encode.
    """

    def __init__(self, items: int = 1500, *, key_width: int = 0, ints: bool = False, pause_s: float = 0.0) -> None:
        self.items, self.began, self.encoded = items, list[BuildProgress](), 0
        self._key_width, self._ints, self._pause_s = key_width, ints, pause_s
        self.stop_at: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.log: Path | None = None

    def job(self, **options: Any) -> BuildSource:
        options = {"every_pairs": 100, **options}
        return BuildSource(options.pop("identity", {"items": self.items}), self._steps, **options)

    def _steps(self, done: BuildProgress) -> Iterator[SourceStep]:
        self.began.append(done)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{done.pairs}\n")
        stored = {name for ids in done.stored().values() for name in ids}
        for start in range(0, self.items, BLOCK):
            if self.stop_at is not None and start >= self.stop_at:
                raise self.error
            pairs, reject = self._pairs(start), Reject(f"bad-{start}", "no caption")
            if pairs is not None and stored.issuperset(pairs.ids.tolist()):
                yield SourceStep(None, BLOCK, [reject], stored=len(pairs))
                continue
            time.sleep(self._pause_s)
            self.encoded += 0 if pairs is None else len(pairs)
            origins = [self.origin(start)] * (0 if pairs is None else len(pairs))
            yield SourceStep(pairs, BLOCK, [reject], origins)

    @staticmethod
    def origin(start: int) -> str:
        """The file of an item: each holds 500."""
        return f"file-{start // 500}"

    def _pairs(self, start: int) -> Pairs | None:
        if start == 2 * BLOCK:
            return None  # a step of rejects alone
        return some_pairs(BLOCK - 1, 16, seed=start, first=start, key_width=self._key_width, ints=self._ints)


def pairs_of(items: int) -> int:
    """How many of the first items are pairs."""
    return items // BLOCK * (BLOCK - 1) - (BLOCK - 1) * (items > 2 * BLOCK)


def build(root: Path, job: BuildSource, version: str | None = "v1", **options: Any) -> Manifest:
    options = {"encoder": ENCODER, "kinds": VECTORS, "shard_pairs": 400, **options}
    return build_version(Store(root), "things", version, job, **options)


def rejects(root: Path, version: str = "v1") -> list[str]:
    return [
        json.loads(line)["item"] for line in (root / "things" / f"rejects-{version}.jsonl").read_text().splitlines()
    ]


def same(one: Path, two: Path, version: str = "v1") -> None:
    """Byte for byte the same rows, records, ids, indexes and probes, and the same rejects."""
    first, second = Store(one).manifest("things", version), Store(two).manifest("things", version)
    assert first.files == second.files
    assert first.index["recipe"] == second.index["recipe"]
    # the index tells milliseconds too
    assert replace(first, created=second.created, index=second.index) == second
    assert rejects(one, version) == rejects(two, version)
    left = {path.name for path in (two / "things" / version).iterdir()}
    assert left - set(BUILD_FILES) == {
        path.name for path in (one / "things" / version).iterdir()
    }  # a kill may spare the notes
    Store(one).open("things", version, encoder=ENCODER).check_recall()


@pytest.mark.parametrize("stop_at", [50, 100, 150, 400, 450, 800, 1450])
@pytest.mark.parametrize("options", [{}, {"key_width": 8}, {"ints": True}])
def test_a_stopped_build_goes_on_and_equals_a_whole_one(tmp_path: Path, stop_at: int, options: dict[str, Any]) -> None:
    kinds: dict[str, Any] = {"kinds": TRUNKS if options.get("key_width") else VECTORS}
    build(tmp_path / "whole", Source(**options).job(), **kinds)
    source = Source(**options)
    source.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "halves", source.job(every_pairs=10**9), **kinds)
    assert Store(tmp_path / "halves").names() == []
    source.stop_at = None
    build(tmp_path / "halves", source.job(), **kinds)
    assert [done.pairs for done in source.began] == [0, pairs_of(stop_at)]
    assert source.encoded == pairs_of(source.items)
    same(tmp_path / "whole", tmp_path / "halves")


def test_what_was_kept_is_given_back(tmp_path: Path) -> None:
    source = Source()
    source.stop_at = 900
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, source.job())
    seen: list[tuple[list[str], np.ndarray, np.ndarray]] = []

    def steps(done: BuildProgress) -> Iterator[SourceStep]:
        blocks = list(done.kept())
        seen.append(
            (
                [name for block in blocks for name in block.ids.tolist()],
                np.concatenate([block.image for block in blocks]),
                np.concatenate([block.text for block in blocks]),
            )
        )
        assert len(seen[0][0]) == done.pairs
        yield from source._steps(done)

    source.stop_at = None
    build(tmp_path, replace(source.job(), steps=steps))
    ids, image, text = seen[0]
    expected = [
        some_pairs(BLOCK - 1, 16, seed=start, first=start) for start in range(0, 900, BLOCK) if start != 2 * BLOCK
    ]
    assert ids == [name for block in expected for name in block.ids.tolist()]
    np.testing.assert_array_equal(image, np.concatenate([block.image for block in expected]).astype(np.float16))
    np.testing.assert_array_equal(text, np.concatenate([block.text for block in expected]).astype(np.float16))


def stopped(root: Path, version: str | None = "v1", every_pairs: int = 100) -> Source:
    source = Source()
    source.stop_at = 800
    with pytest.raises(KeyboardInterrupt):
        build(root, source.job(every_pairs=every_pairs), version)
    source.stop_at = None
    return source


def test_without_a_name_the_same_version_is_found_again(tmp_path: Path) -> None:
    source = stopped(tmp_path, None)
    build(tmp_path, Source(500).job(), "0-another")
    manifest = build(tmp_path, source.job(), None)
    assert source.began[-1].pairs == pairs_of(800)
    assert Store(tmp_path).versions("things") == ["0-another", manifest.version]
    assert not list((tmp_path / "things").glob(".*"))


CHANGES: dict[str, Callable[[Source], tuple[BuildSource, dict[str, Any]]]] = {
    "sources": lambda source: (source.job(identity={"items": "others"}), {}),
    "encoder": lambda source: (source.job(), {"encoder": "tiny/test@ffff00001111"}),
    "shard size": lambda source: (source.job(), {"shard_pairs": 300}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_job_never_takes_the_place_of_an_unfinished_build(tmp_path: Path, change: str) -> None:
    source = stopped(tmp_path)
    job, options = CHANGES[change](source)
    with pytest.raises(VersionExists, match=rf"things@v1 is the unfinished build of .* with {pairs_of(800)} pairs"):
        build(tmp_path, job, **options)
    other = build(tmp_path, job, None, **options)
    assert other.version != "v1"
    build(tmp_path, source.job())
    assert source.began[-1].pairs == pairs_of(800)


def test_a_trial_of_other_files_takes_another_name(tmp_path: Path) -> None:
    source = stopped(tmp_path, None)
    (work,) = (tmp_path / "things").glob(".*.partial")
    trial = build(tmp_path, replace(Source(100).job(identity={"items": 1500}), origins={"file-7"}), None)
    assert f".{trial.version}.partial" != work.name
    assert work.exists()
    manifest = build(tmp_path, source.job(), None)
    assert f".{manifest.version}.partial" == work.name


@pytest.mark.parametrize("file", [0, 1])
@pytest.mark.parametrize("every_pairs", [100, 200, 10_000])
def test_a_build_goes_on_at_the_first_file_that_changed(tmp_path: Path, file: int, every_pairs: int) -> None:
    """It lies between two blocks, or amid one."""
    build(tmp_path / "whole", Source().job())
    source = stopped(tmp_path / "halves", every_pairs=every_pairs)
    origins = {f"file-{number}" for number in range(4)} - {f"file-{file}"}
    job = replace(source.job(), origins=origins)
    if not file:
        with pytest.raises(VersionExists):
            build(tmp_path / "halves", job)
        job = replace(job, fresh=True)
    build(tmp_path / "halves", job)
    assert source.began[-1].pairs == pairs_of(500 * file)
    same(tmp_path / "whole", tmp_path / "halves")


def test_a_fresh_build_begins_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = stopped(tmp_path)
    build(tmp_path, source.job(fresh=True))
    assert source.began[-1].pairs == 0
    assert f"things: an interrupted build of {pairs_of(800)} pairs is forgotten, as asked" in caplog.text


@pytest.mark.parametrize("harm", ["cut", "altered", "gone"])
def test_a_build_goes_on_before_the_first_damaged_block(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path / "whole", Source().job())
    source = stopped(tmp_path / "halves")
    blocks = sorted((tmp_path / "halves" / "things" / ".v1.partial" / ".blocks").iterdir())
    path = blocks[3]
    if harm == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif harm == "altered":
        data = bytearray(path.read_bytes())
        data[data.index(b"origins.npy") + 170] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    build(tmp_path / "halves", source.job())
    assert source.began[-1].pairs == 3 * 3 * (BLOCK - 1)  # a block has three steps
    assert caplog.text.count("block 3 of an interrupted build is damaged") == (harm != "gone")
    same(tmp_path / "whole", tmp_path / "halves")


def test_damaged_rows_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    source = stopped(tmp_path)
    path = sorted((tmp_path / "things" / ".v1.partial" / ".blocks").iterdir())[3]
    data = bytearray(path.read_bytes())
    data[data.index(b"image.npy") + 300] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedVersion, match=r"things: the block 00000003\.npz of an interrupted build .*--fresh"):
        build(tmp_path, source.job())
    build(tmp_path, source.job(fresh=True))


def test_what_lies_beside_the_blocks_is_removed(tmp_path: Path) -> None:
    build(tmp_path / "whole", Source().job())
    source = stopped(tmp_path / "halves")
    work = tmp_path / "halves" / "things" / ".v1.partial"
    with (work / "shard-0001" / "image.npy").open("ab") as file:
        file.write(b"half a row")
    (work / "shard-0000" / "image.faiss").write_bytes(b"half an index")
    (work / "shard-0009").mkdir()
    (work / "shard-0009" / "image.npy").write_bytes(b"begun")
    (work / "manifest.json").write_text("{}")
    (work / ".blocks" / ".00000099.npz.fresh").write_bytes(b"half a block")
    build(tmp_path / "halves", source.job())
    assert source.began[-1].pairs == pairs_of(800)
    same(tmp_path / "whole", tmp_path / "halves")


def test_blocks_that_a_kill_left_in_a_finished_version_are_removed(tmp_path: Path) -> None:
    build(tmp_path, Source(100).job())
    left = tmp_path / "things" / "v1" / ".blocks"
    left.mkdir()
    (left / "00000000.npz").write_bytes(b"rows")
    stopped(tmp_path, "v2")
    assert not left.exists()
    assert list((tmp_path / "things" / ".v2.partial" / ".blocks").iterdir())


def test_what_an_older_release_left_is_refused_by_name(tmp_path: Path) -> None:
    work = tmp_path / "things" / ".v1.partial"
    work.mkdir(parents=True)
    (work / ".progress.json").write_text('{"job": "", "filled": 3}')
    with pytest.raises(VersionExists, match=r"things@v1 is the unfinished build of an older release.*--fresh"):
        build(tmp_path, Source(100).job())
    assert (work / ".progress.json").exists()
    assert build(tmp_path, Source(100).job(fresh=True)).pairs == pairs_of(100)


def test_a_failure_after_the_last_row_costs_no_row(tmp_path: Path) -> None:
    source = Source()
    with pytest.raises(RecallTooLow, match="SQ4"):
        build(tmp_path, source.job(), index="SQ4")
    build(tmp_path, source.job(), index="Flat")
    assert [done.pairs for done in source.began] == [0, pairs_of(1500)]
    assert source.encoded == pairs_of(1500)
    build(tmp_path / "whole", Source().job())
    same(tmp_path / "whole", tmp_path)


def test_an_error_of_the_source_keeps_what_was_done(tmp_path: Path) -> None:
    source = Source()
    source.stop_at, source.error = 600, FileNotFoundError("photos.tar")
    with pytest.raises(FileNotFoundError):
        build(tmp_path, source.job())
    source.stop_at = None
    build(tmp_path, source.job())
    assert source.began[-1].pairs == pairs_of(600)


def test_refused_pairs_leave_nothing_to_go_on_from(tmp_path: Path) -> None:
    def steps(done: BuildProgress) -> Iterator[SourceStep]:
        yield SourceStep(some_pairs(300), 300)
        yield SourceStep(some_pairs(5), 5)

    with pytest.raises(PairsRefused, match="comes twice"):
        build(tmp_path, BuildSource({}, steps, every_pairs=10))
    assert not list(tmp_path.glob("things/**/*"))


def test_no_valid_pair_says_how_many_were_rejected_and_leaves_only_their_list(tmp_path: Path) -> None:
    def steps(done: BuildProgress) -> Iterator[SourceStep]:
        yield SourceStep(None, 2, [Reject("a.jpg", "no caption"), Reject("b\udcff.jpg", "not a plain file")])

    with pytest.raises(PairsRefused, match=r"no valid pair.*; 2 rejected, the first 'a\.jpg': no caption$"):
        build(tmp_path, BuildSource({}, steps))
    assert rejects(tmp_path) == ["a.jpg", "b\udcff.jpg"]
    assert [path.name for path in (tmp_path / "things").iterdir()] == ["rejects-v1.jsonl"]
    build(tmp_path, BuildSource({}, lambda done: [SourceStep(some_pairs(9), 9)]))
    assert [path.name for path in (tmp_path / "things").iterdir()] == [
        "v1"
    ]  # a list of another run's rejects would mislead


def test_a_leftover_held_by_the_living_is_not_gone_on_from(tmp_path: Path) -> None:
    source = stopped(tmp_path, None)
    (work,) = (tmp_path / "things").glob(".*.partial")
    with (work / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreBusy):
            build(tmp_path, source.job(), None)
    build(tmp_path, source.job(), None)
    assert source.began[-1].pairs == pairs_of(800)


def test_without_a_job_nothing_is_remembered(tmp_path: Path) -> None:
    stopped(tmp_path)
    manifest = build_version(Store(tmp_path), "things", "v1", [some_pairs(7)], encoder=ENCODER, kinds=VECTORS)
    assert manifest.pairs == 7
    assert [path.name for path in (tmp_path / "things").iterdir()] == ["v1"]


BUILD = """
from index_store.tests.build.test_resume import Source, build as built
def build(root):
    source = Source(pause_s=0.002)
    source.log = root.with_suffix(".log")
    built(root, source.job(), index="IVF4,Flat")
"""


def test_kill_9_at_random_moments_and_the_same_build_comes_out(tmp_path: Path) -> None:
    nursery, moments = ForkServer(BUILD), random.Random(3)
    try:
        nursery.begin(tmp_path / "whole")
        start = time.monotonic()
        assert nursery.end() == 0
        took = time.monotonic() - start
        root, log, killed, finished = tmp_path / "store", tmp_path / "store.log", 0, 0
        log.touch()
        while killed < kill_count() or not finished:
            process = nursery.begin(root)
            time.sleep(moments.uniform(0, took))
            os.kill(process, signal.SIGKILL)
            killed += nursery.end() != 0
            if Store(root).names():
                finished += 1
                same(tmp_path / "whole", root)
                shutil.rmtree(root)
        nursery.begin(root)
        assert nursery.end() == 0
        same(tmp_path / "whole", root)
    finally:
        nursery.close()
    began = [int(line) for line in log.read_text().split()]
    assert sum(items > 0 for items in began) >= min(3, kill_count() // 5), f"hardly a run went on from another: {began}"


FULL = """
import resource, signal, sys
from pathlib import Path
from index_store.errors import StoreUnwritable
from index_store.tests.build.test_resume import Source, build
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    build(Path(sys.argv[1]), Source().job(), shard_pairs=10_000)
except StoreUnwritable as error:
    print(error)
"""


def test_a_full_disk_costs_only_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    build(tmp_path / "whole", Source().job(), shard_pairs=10_000)
    done = limited(FULL, tmp_path / "store", "30000")
    assert done.stdout.startswith("cannot write shard-0000: "), done.stderr
    assert done.stdout.count("\n") == 1
    source = Source()
    build(tmp_path / "store", source.job(), shard_pairs=10_000)
    assert 300 <= source.began[0].pairs < pairs_of(1500)
    same(tmp_path / "whole", tmp_path / "store")


def test_a_disk_without_any_room_says_so(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("not a folder")
    with pytest.raises(StoreUnwritable, match="cannot write things"):
        build(root, Source().job())
