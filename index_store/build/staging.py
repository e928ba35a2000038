"""The staging folder of a build: locked by one builder, and kept for a later run or removed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from index_store.errors import PairsRefused, StoreBusy, StoreUnwritable, VersionExists
from index_store.storage.atomic import make_folder, translate_write_errors
from index_store.storage.blocks import DAMAGE, read_block
from index_store.storage.layout import partial_folder

# locked by the running builder; the kernel unlocks it when the process dies
LOCK = ".lock"
BLOCKS = ".blocks"  # the stored pairs, in block files
REJECTS = ".rejects.jsonl"  # one line per item left out
BUILD_FILES = (LOCK, BLOCKS, REJECTS)  # not part of a version


@contextmanager
def staging_folder(memory: Path, version: str) -> Iterator[Path]:
    """Lock and yield the staging folder of a version, with the files of an earlier run.

    It is removed afterwards unless it was renamed into a version or holds a block. Raises
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
            if not block_path(work, 0).exists():
                _discard(work)
            raise
    finally:
        os.close(lock)


def block_path(work: Path, number: int) -> Path:
    """The file of a block of a staging folder."""
    return work / BLOCKS / f"{number:08d}.npz"


def stored_blocks(work: Path) -> Iterator[Path]:
    """The blocks of a staging folder in order, up to the first that is missing."""
    return takewhile(Path.exists, (block_path(work, number) for number in count()))


def clear(work: Path, *, keep_blocks: bool = False) -> None:
    """Remove everything but the lock, and the blocks where asked."""
    with translate_write_errors(work.parent.name):
        for entry in work.iterdir():
            if entry.name == LOCK or (keep_blocks and entry.name == BLOCKS):
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def remove_build_files(folder: Path) -> None:
    """Remove the builder's files from a finished version; failures are ignored, since the files do
    no harm.
    """
    shutil.rmtree(folder / BLOCKS, ignore_errors=True)
    for name in (LOCK, REJECTS):
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

    pairs: that it has stored, as far as they can be read.  size: in bytes.
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
        version = work.name.removeprefix(".").removesuffix(".partial")
        found.append(UnfinishedBuild(work.parent.name, version, _count_stored(work), sum(sizes), max(times)))
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


def _count_stored(work: Path) -> int:
    """Pairs in the blocks of a staging folder, as far as they can be read."""
    pairs = 0
    with suppress(*DAMAGE):
        for path in stored_blocks(work):
            pairs += len(read_block(path, ("origin",))["origin"])
    return pairs
