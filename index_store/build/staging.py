"""The hidden folder in which one builder works: owned by a lock, cleared, discarded, or left for
the next run to go on from.
"""

import fcntl
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

# held by the living builder; the kernel lets go when it dies, so a dead one's leftover is told
# apart
LOCK = ".lock"
PROGRESS = ".progress.json"  # how much of the rest counts
IDS = ".ids.jsonl"  # one line per pair stored
REJECTS = ".rejects.jsonl"  # one line per item left out
NOTES = (LOCK, PROGRESS, IDS, REJECTS)  # the builder's own, no part of a version


@dataclass(frozen=True, slots=True)
class Progress:
    """What counts. Everything on the disk beyond it is cut off by the next run.

    job: digest.  dim, keys, id_kind: as in the manifest.  shards: the finished ones.
    files: theirs.  filled: rows of the shard after them, 0 where none was begun.
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
        """The shard that is being filled."""
        return f"shard-{len(self.shards):04d}"

    @property
    def pairs(self) -> int:
        """Stored in all."""
        return self.filled + sum(int(shard["pairs"]) for shard in self.shards)

    def cut(self, rows: int) -> "Progress":
        """The progress of the first rows only; the shard that they end in is open again."""
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
        """(folder, rows that count) of every shard."""
        yield from ((shard["folder"], shard["pairs"]) for shard in self.shards)
        if self.filled:
            yield self.open_folder, self.filled


@contextmanager
def workplace(memory: Path, version: str) -> Iterator[Path]:
    """The hidden folder that this builder alone owns, with whatever an earlier one left in it.

    Gone afterwards unless it was renamed into a version, or holds progress that a next run can go
    on from.
    """
    work = partial_folder(memory, version)
    with translate_write_errors(f"{memory.name}/{version}"):
        make_folder(memory)
        # a builder that gives up may take the folder away in between
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _own(lock, work, f"{memory.name}@{version}")
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
    """Remove what a builder that died left behind."""
    with translate_write_errors(work.parent.name):
        for entry in work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()


def forget_notes(folder: Path) -> None:
    """Remove the builder's own files from a finished version; where that fails they may as well
    stay.
    """
    for name in NOTES:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def _own(lock: int, work: Path, ref: str) -> None:
    """Take the lock, or StoreBusy; a lock file that is no longer in its place belonged to a builder
    that has just finished.
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
    """Remove what this builder made, its lock last: until then nobody else may begin here."""
    with suppress(OSError, StoreUnwritable):
        clear(work)
        (work / LOCK).unlink()
        work.rmdir()
        work.parent.rmdir()  # where the memory holds nothing else
