"""Builders that die, collide, or run out of room or rights: real processes, real file systems."""

import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from index_store.errors import StoreBusy, StoreError, StoreUnwritable
from index_store.store import Store
from index_store.tests.support.child_process import ROOT, ForkServer, kill_count, tiny_disk
from index_store.tests.support.small import ENCODER, build_memory, open_memory, some_pairs, store_is_empty

BUILD = """
from index_store.tests.support.small import build_memory, slice_pairs, some_pairs
pairs = some_pairs(1500, 32)
blocks = [slice_pairs(pairs, slice(i, i + 100)) for i in range(0, 1500, 100)]
def build(root):
    build_memory(root, blocks, index="IVF8,Flat", shard_pairs=500)
"""


SWAP = """
from index_store.store import Store
def build(root):
    while True:
        Store(root).activate("things", "v2")
        Store(root).activate("things", "v1")
"""


@pytest.fixture
def fork_server() -> Iterator[ForkServer]:
    fork_server = ForkServer(BUILD)
    yield fork_server
    fork_server.close()


def test_kill_9_at_random_moments_leaves_nothing_that_opens(tmp_path: Path, fork_server: ForkServer) -> None:
    fork_server.begin(tmp_path / "whole")
    start = time.monotonic()
    assert fork_server.end() == 0
    took = time.monotonic() - start
    store, moments, killed = Store(tmp_path / "store"), random.Random(22), 0
    while killed < kill_count():
        process = fork_server.begin(store.root)
        time.sleep(moments.uniform(0, 1.1 * took))
        os.kill(process, signal.SIGKILL)  # harmless where it is done already
        ended = fork_server.end()
        killed += ended != 0
        if store.names():  # it was faster than the blow, or just renamed: then the version is whole
            assert len(store.open("things", "v1", encoder=ENCODER)) == 1500
            shutil.rmtree(store.root)
        else:
            assert ended == -signal.SIGKILL
            with pytest.raises(StoreError, match="no memory 'things' here"):
                store.open("things", "v1", encoder=ENCODER)
    fork_server.begin(store.root)
    assert fork_server.end() == 0
    assert [path.name for path in (store.root / "things").iterdir()] == ["v1"]
    assert min(store.open("things", "v1", encoder=ENCODER).check_recall().values()) >= 0.99


def test_two_processes_that_build_one_version(tmp_path: Path, fork_server: ForkServer) -> None:
    store = Store(tmp_path / "store")
    fork_server.begin(store.root)
    while not (store.root / "things" / ".v1.partial" / "shard-0000").exists():
        time.sleep(0.001)
    with pytest.raises(
        StoreBusy, match="things@v1 is being built by another process: wait for it, or choose another version"
    ):
        build_memory(store.root, some_pairs(5))
    assert fork_server.end() == 0
    assert len(store.open("things", "v1", encoder=ENCODER)) == 1500


def test_kill_9_at_random_moments_leaves_one_of_the_two_versions_current(tmp_path: Path) -> None:
    store, moments, swapping = Store(tmp_path), random.Random(23), ForkServer(SWAP)
    for version in ("v1", "v2"):
        build_memory(tmp_path, some_pairs(20), version=version)
    store.activate("things", "v1")
    try:
        for _ in range(kill_count()):
            process = swapping.begin(tmp_path)
            time.sleep(moments.uniform(0.005, 0.08))
            os.kill(process, signal.SIGKILL)
            assert swapping.end() == -signal.SIGKILL
            assert store.current("things") in ("v1", "v2")
            assert len(store.open("things", encoder=ENCODER)) == 20
    finally:
        swapping.close()


def test_the_leftover_of_a_dead_builder_is_cleared(tmp_path: Path) -> None:
    partial = tmp_path / "things" / ".v1.partial"
    (partial / "shard-0000").mkdir(parents=True)
    (partial / "shard-0000" / "image.npy").write_bytes(b"half")
    (partial / "manifest.json").write_text("{}")
    (partial / ".lock").touch()
    assert Store(tmp_path).names() == []
    open_memory(tmp_path, some_pairs(5))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "partial" in str(path)) == []


def test_every_new_name_on_the_way_to_a_version_is_synced_before_the_build_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may otherwise take away the folder of a memory, and with it a version that was
    reported as built.
    """
    synced: list[int] = []
    real = os.fsync

    def watched(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", watched)
    build_memory(tmp_path / "var" / "store", some_pairs(5))
    for folder in (tmp_path, tmp_path / "var", tmp_path / "var" / "store", tmp_path / "var" / "store" / "things"):
        assert folder.stat().st_ino in synced, folder.name


def test_a_leftover_held_by_the_living_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "things" / ".v1.partial"
    partial.mkdir(parents=True)
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (partial / "precious").touch()
        with pytest.raises(StoreBusy):
            build_memory(tmp_path, some_pairs(5))
        assert (partial / "precious").exists()
    assert build_memory(tmp_path, some_pairs(5)).pairs == 5


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for 300 KB."""
    with tiny_disk(tmp_path / "disk", "300k") as root:
        yield root


@pytest.mark.parametrize("recipe", ["Flat", "IVF8,Flat"])
def test_a_full_disk(full_disk: Path, recipe: str) -> None:
    """Flat fills it with rows, the lists fit their rows and fill it with the index that faiss
    writes.
    """
    rows = 5000 if recipe == "Flat" else 1800
    with pytest.raises(StoreUnwritable, match=r"cannot write .*free some room") as refused:
        build_memory(full_disk, some_pairs(rows, 32), index=recipe)
    assert "\n" not in str(refused.value)
    assert str(full_disk) not in str(refused.value)
    assert store_is_empty(full_disk)
    build_memory(full_disk, some_pairs(100, 32))


def limited(code: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(root), *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


FULL = """
import resource, sys
from pathlib import Path
from index_store.errors import StoreUnwritable
from index_store.tests.support.small import build_memory, some_pairs
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    build_memory(Path(sys.argv[1]), some_pairs(900, 32), index=sys.argv[3])
except StoreUnwritable as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("room", "recipe", "file"), [(40_000, "Flat", "shard-0000"), (80_000, "IVF8,Flat", "shard-0000/image.faiss")]
)
def test_a_file_that_may_not_grow(tmp_path: Path, room: int, recipe: str, file: str) -> None:
    """A quota on the size of a file: works without root, where a full disk cannot be had."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = limited(FULL, tmp_path, str(room), recipe)
    assert done.stdout.startswith(f"cannot write {file}: "), done.stderr
    assert done.stdout.count("\n") == 1
    assert store_is_empty(tmp_path)


READ_ONLY = """
import os, sys
from pathlib import Path
from index_store.errors import StoreUnwritable
from index_store.store import Store
from index_store.tests.support.small import build_memory, some_pairs
pairs = some_pairs(5)
Store(Path(sys.argv[1])).open("things", "v1", encoder="@0123456789ab")  # everything imported before the rights are given up
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
for attempt in (lambda: build_memory(Path(sys.argv[1]), pairs, "v2"), lambda: build_memory(Path(sys.argv[1]), pairs, "v1", name="others"),
                lambda: Store(Path(sys.argv[1])).activate("things", "v1")):
    try:
        attempt()
    except StoreUnwritable as error:
        print(error)
print(Store(Path(sys.argv[1])).open("things", "v1", encoder="@0123456789ab").ref)
"""


def test_no_permission_to_write(tmp_path: Path) -> None:
    root = Path(f"{tmp_path}-read-only")
    build_memory(root, some_pairs(5))
    for folder in (root, root / "things"):
        folder.chmod(0o555)
    for parent in list(root.parents)[:-1]:
        if os.geteuid() == 0 and not parent.stat().st_mode & 0o001:
            if parent.stat().st_uid != 0 or "pytest" not in str(parent):
                pytest.skip(f"another user may not even look into {parent.name}")
            parent.chmod(parent.stat().st_mode | 0o011)
    done = limited(READ_ONLY, root)
    for folder in (root, root / "things"):
        folder.chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert all(
        line.startswith("cannot write ") and "Permission denied" in line and str(root) not in line for line in lines[:3]
    )
    assert lines[3] == "things@v1"
    assert sorted(path.name for path in root.rglob("*") if path.is_dir()) == ["probes", "shard-0000", "things", "v1"]
