"""A directory of named memories, their finished versions, and which one of each is current."""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count, repeat
from pathlib import Path

from index_store.edits.journal import JOURNAL_SUFFIX, read_records
from index_store.edits.overlay import replay_journal
from index_store.errors import (
    DamagedVersion,
    IncompatibleSnapshot,
    NameRefused,
    StoreBusy,
    StoreUnwritable,
    UnknownMemory,
    UnknownVersion,
)
from index_store.snapshot import Snapshot
from index_store.storage.atomic import READ_THREADS, lock_folder, replace_text, translate_write_errors
from index_store.storage.checksums import verified_record_path, verify
from index_store.storage.layout import rejects_path
from index_store.storage.manifest import MANIFEST_FILE, Manifest, read_manifest

CURRENT_FILE = "CURRENT"  # first line the version that serves, second line the one before it
DELETED_SUFFIX = ".deleted"  # behind a leading dot: what is being removed
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class Store:
    """root/name/version/… and root/name/CURRENT. Holds nothing but the path: every answer is read from the disk.

    A version directory without a manifest does not exist; neither does a memory without a version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Every memory with at least one finished version, sorted."""
        return [name for name in self._plain_names(self.root) if self._finished(name)]

    def versions(self, name: str) -> list[str]:
        """Finished versions of a memory in the order of their names, which next_version makes the order of time."""
        found = self._finished(check_name(name))
        if not found:
            raise UnknownMemory(
                f"no memory {name!r} here, there is {', '.join(self.names()) or 'none at all'}: build it, or correct the name"
            )
        return found

    def current(self, name: str) -> str:
        """The version that serves, also after a restart."""
        return self._pointer(name)[0]

    def previous(self, name: str) -> str | None:
        """The version that served before the current one: what a rollback goes to."""
        pointer = self._pointer(name)
        return pointer[1] if len(pointer) > 1 else None

    def path(self, name: str, version: str) -> Path:
        """The directory of a finished version."""
        if check_name(version) not in self.versions(name):
            raise UnknownVersion(
                f"{name} has no version {version!r}, only {', '.join(self.versions(name))}: choose one of these"
            )
        return self.root / name / version

    def manifest(self, name: str, version: str | None = None) -> Manifest:
        """The manifest alone, files unchecked: for lists and tables."""
        return read_manifest(self.path(name, self.current(name) if version is None else version))

    def open(self, name: str, version: str | None = None, *, encoder: str, devices: Sequence[int] = ()) -> Snapshot:
        """A verified snapshot of a version with the edits made on it, the current one where none is named.

        devices: GPUs to clone its indexes to.
        """
        version = self.current(name) if version is None else version
        base = Snapshot.open(self.path(name, version), encoder=encoder, devices=devices)
        return replay_journal(base, self.journal_path(name, version))[0].snapshot

    def verify(self, name: str, version: str, *, threads: int = READ_THREADS) -> None:
        """Read every byte of a version; DamagedVersion names each file that differs, and where. Gigabytes take seconds."""
        path = self.path(name, version)
        verify(path, read_manifest(path), threads=threads)

    def journal_path(self, name: str, version: str) -> Path:
        """Where the edits of a version are written; there is no file before the first."""
        return self.path(name, version).with_name(version + JOURNAL_SUFFIX)

    def count_edits(self, name: str, version: str) -> int:
        """How many edits stand on a version."""
        return sum(1 for _ in read_records(self.journal_path(name, version), self.manifest(name, version).sha256))

    def activate(self, name: str, version: str, *, instead_of: str | None = None) -> None:
        """Make a version the current one, in one step; the one it replaces becomes the previous.

        instead_of: only where this version is the current one, otherwise nothing changes.
        """
        self.path(name, version)  # refused here if unknown
        with translate_write_errors(f"{name}/{CURRENT_FILE}"), lock_folder(self.root / name):
            before = self._pointer_if_whole(name)
            if before[:1] != [version] and instead_of in (None, *before[:1]):
                replace_text(self.root / name / CURRENT_FILE, "\n".join([version, *before[:1]]) + "\n")

    def delete(self, name: str, version: str) -> None:
        """Remove a version and its edits; never the current one. Whoever serves it still goes on: the files stay mapped.

        The one rename makes it stop existing; what a kill leaves behind afterwards is no version, and the next delete or build removes it.
        """
        path = self.path(name, version)
        with translate_write_errors(f"{name}/{version}"), lock_folder(self.root / name):
            if self._pointer_if_whole(name)[:1] == [version]:
                raise StoreBusy(f"{name}@{version} is the current version: activate another one first")
            _clear_deleted(path.parent)
            path.rename(path.with_name(f".{version}{DELETED_SUFFIX}"))
            _clear_deleted(path.parent)

    def remove_deleted(self, name: str) -> None:
        """Remove what a kill left of deleted versions, so that one of the same name does not find their edits."""
        folder = self.root / check_name(name)
        if any(folder.glob(f".*{DELETED_SUFFIX}")):
            with translate_write_errors(name), lock_folder(folder):
                _clear_deleted(folder)

    def prune(self, name: str, keep: int) -> list[str]:
        """Delete all but the `keep` versions built last, the current and the previous one aside; the names of those deleted.

        What cannot be read is left alone: nobody knows how old it is.
        """
        served, built = set(self._pointer_if_whole(name)), []
        for version in self.versions(name):
            with suppress(DamagedVersion, IncompatibleSnapshot):
                written = (self.path(name, version) / MANIFEST_FILE).stat().st_mtime_ns  # `created` has whole seconds
                built.append((self.manifest(name, version).created, written, version))
        old = [version for *_, version in sorted(built)[: -keep or None] if version not in served]
        for version in old:
            self.delete(name, version)
        return old

    def next_version(self, name: str, today: datetime | None = None) -> str:
        """A version name of today (UTC) after all there are, such as 2026-11-22a, then b …, z, za; those of deleted ones stay unused.

        Only a version that came last and never served leaves its name to the next.
        """
        day = (today or datetime.now(UTC)).strftime("%Y-%m-%d")
        taken = [
            version
            for version in {*self._finished(check_name(name)), *self._pointer_if_whole(name)}
            if version.startswith(day)
        ]
        return next(label for label in map(_label, repeat(day), count()) if all(label > version for version in taken))

    def _pointer(self, name: str) -> list[str]:
        """The lines of CURRENT, one or two."""
        self.versions(name)
        try:
            lines = (self.root / name / CURRENT_FILE).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise UnknownVersion(
                f"{name} has no current version: activate one of {', '.join(self.versions(name))}"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedVersion(
                f"{name}/{CURRENT_FILE} cannot be read ({type(error).__name__}): activate a version again"
            ) from error
        if not 1 <= len(lines) <= 2 or not all(NAME_PATTERN.fullmatch(line) for line in lines):
            raise DamagedVersion(
                f"{name}/{CURRENT_FILE} does not hold one or two version names: activate a version again"
            )
        return lines

    def _pointer_if_whole(self, name: str) -> list[str]:
        """The lines of CURRENT, none where it is missing or damaged: activating is how that is repaired."""
        try:
            return self._pointer(name)
        except (UnknownMemory, UnknownVersion, DamagedVersion):
            return []

    def _finished(self, name: str) -> list[str]:
        return [
            version
            for version in self._plain_names(self.root / name)
            if (self.root / name / version / MANIFEST_FILE).is_file()
        ]

    @staticmethod
    def _plain_names(folder: Path) -> list[str]:
        try:
            return sorted(entry.name for entry in folder.iterdir() if NAME_PATTERN.fullmatch(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreUnwritable(
                f"the folder of {folder.name} cannot be read: {error.strerror}; grant permission"
            ) from error


def _clear_deleted(folder: Path) -> None:
    """Remove deleted versions of a memory, what lies beside each first: as long as its own folder is there, a next run knows of them."""
    for leftover in folder.glob(f".*{DELETED_SUFFIX}"):
        path = folder / leftover.name[1:].removesuffix(DELETED_SUFFIX)
        for beside in (
            path.with_name(path.name + JOURNAL_SUFFIX),
            verified_record_path(path),
            rejects_path(folder, path.name),
        ):
            beside.unlink(missing_ok=True)
        shutil.rmtree(leftover)


def check_name(name: str) -> str:
    """The name itself where it is a plain one; NameRefused for anything that could be a path."""
    if not NAME_PATTERN.fullmatch(name):
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise NameRefused(
            f"{shown!r} is not a name: 1 to 64 of the characters A-Z a-z 0-9 . _ -, beginning with a letter or digit"
        )
    return name


def check_version_name(version: str) -> str:
    """The same for a version, which also must not be called like a file beside it."""
    if version.lower().endswith(JOURNAL_SUFFIX):
        raise NameRefused(f"{version!r} ends like the edits of another version: choose another name")
    if check_name(version).upper() == CURRENT_FILE:
        raise NameRefused(f"{version!r} is the name of the pointer file, no version can have it: choose another")
    return version


def _label(day: str, number: int) -> str:
    """0 → a, 25 → z, 26 → za: longer labels begin with z, so that they sort last."""
    tens, ones = divmod(number, 26)
    return day + "z" * tens + chr(ord("a") + ones)
