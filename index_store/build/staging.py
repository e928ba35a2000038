"""The staging folder of a build: locked by one builder, and kept for a later run or removed."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from index_store.errors import PairsRefused, StoreBusy, StoreUnwritable, VersionExists
from index_store.storage.atomic import make_folder, translate_write_errors
from index_store.storage.layout import partial_folder
from index_store.types import Side

# locked by the running builder; the kernel unlocks it when the process dies
LOCK = ".lock"
PROGRESS = ".progress.json"  # the BuildState
IDS = ".ids.jsonl"  # one line per pair stored
REJECTS = ".rejects.jsonl"  # one line per item left out
BUILD_FILES = (LOCK, PROGRESS, IDS, REJECTS)  # not part of a version


@dataclass(frozen=True, slots=True)
class BuildState:
    """The valid part of a staging folder; a later run removes everything else.

    job: digest.  dim, keys, id_kind: as in the manifest.  shards: the finished ones.
    files: of the finished shards.  filled: rows of the shard after them, 0 where none was begun.
    """

    job: str
    dim: int
    keys: dict[Side, dict[str, Any]]
    id_kind: str
    shards: list[dict[str, Any]]
    files: list[str]
    filled: int

    @property
    def open_folder(self) -> str:
        """The folder of the unfinished shard."""
        return f"shard-{len(self.shards):04d}"

    @property
    def pairs(self) -> int:
        """Number of stored pairs."""
        return self.filled + sum(int(shard["pairs"]) for shard in self.shards)

    def first_rows(self, rows: int) -> "BuildState":
        """The state of the first `rows` rows only; the shard in which they end becomes the
        unfinished one.
        """
        shards, left = list[dict[str, Any]](), rows
        for shard in self.shards:
            if shard["pairs"] > left:
                break
            shards.append(shard)
            left -= int(shard["pairs"])
        folders = {shard["folder"] for shard in shards}
        files = [file for file in self.files if file.partition("/")[0] in folders]
        return replace(self, shards=shards, files=files, filled=left)

    def rows(self) -> Iterator[tuple[str, int]]:
        """(folder, valid rows) of every shard."""
        yield from ((shard["folder"], shard["pairs"]) for shard in self.shards)
        if self.filled:
            yield self.open_folder, self.filled


@contextmanager
def staging_folder(memory: Path, version: str) -> Iterator[Path]:
    """Lock and yield the staging folder of a version, with the files of an earlier run.

    It is removed afterwards unless it was renamed into a version or holds a checkpoint. Raises
    VersionExists, StoreBusy, StoreUnwritable.
    """
    work = partial_folder(memory, version)
    with translate_write_errors(f"{memory.name}/{version}"):
        make_folder(memory)
        # a builder that gives up may take the folder away in between
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(lock, work, f"{memory.name}@{version}")
        try:
            if (memory / version).exists():
                raise VersionExists(
                    f"{memory.name}@{version} exists already, and a version is never overwritten: choose another name"
                )
            yield work
        except (PairsRefused, VersionExists):  # a next run would be refused as well
            _discard(work)
            raise
        except BaseException:
            if not (work / PROGRESS).exists():
                _discard(work)
            raise
    finally:
        os.close(lock)


def clear(work: Path) -> None:
    """Remove everything but the lock."""
    with translate_write_errors(work.parent.name):
        for entry in work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()


def remove_build_files(folder: Path) -> None:
    """Remove the builder's files from a finished version; failures are ignored, since the files do
    no harm.
    """
    for name in BUILD_FILES:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def _lock(lock: int, work: Path, ref: str) -> None:
    """Take the lock. Raises StoreBusy where another builder holds it, or has just replaced the
    file.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == (work / LOCK).stat().st_ino:
            return
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreBusy(f"{ref} is being built by another process: wait for it, or choose another version") from error
    raise StoreBusy(f"{ref} was being built by another process until now: look at it, then try again")


def _discard(work: Path) -> None:
    """Remove the folder, its lock last, so that no other builder starts in it meanwhile."""
    with suppress(OSError, StoreUnwritable):
        clear(work)
        (work / LOCK).unlink()
        work.rmdir()
        work.parent.rmdir()  # where the memory holds nothing else


@dataclass(frozen=True, slots=True)
class UnfinishedBuild:
    """What a stopped or running build has left in a store.

    pairs: that a next run keeps, 0 where its progress cannot be read.  size: in bytes.
    changed: when it last went on, in seconds since 1970.
    """

    name: str
    version: str
    pairs: int
    size: int
    changed: float


def unfinished_builds(root: Path, name: str = "*") -> list[UnfinishedBuild]:
    """The unfinished builds in a store, of one memory or of all, sorted."""
    found = []
    for work in sorted(root.glob(f"{name}/{partial_folder(Path(), '*').name}")):
        sizes, times = [0], [0.0]
        for path in (work, *work.rglob("*")):
            with suppress(OSError):  # a running build may remove it meanwhile
                stat = path.stat()
                sizes.append(stat.st_size if path.is_file() else 0)
                times.append(stat.st_mtime)
        state = read_state(work)
        version = work.name.removeprefix(".").removesuffix(".partial")
        found.append(UnfinishedBuild(work.parent.name, version, state.pairs if state else 0, sum(sizes), max(times)))
    return found


def discard_build(root: Path, build: UnfinishedBuild) -> None:
    """Remove an unfinished build. Raises StoreBusy while it runs, StoreUnwritable."""
    work = partial_folder(root / build.name, build.version)
    with translate_write_errors(f"{build.name}/{build.version}"):
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(lock, work, f"{build.name}@{build.version}")
        clear(work)
        _discard(work)
    finally:
        os.close(lock)


def read_state(work: Path) -> BuildState | None:
    """The state that a build has written; None where it has none that can be read."""
    try:
        return BuildState(**json.loads((work / PROGRESS).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
