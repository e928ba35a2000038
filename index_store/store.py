"""Store: a directory of named memories, their versions, and the pointer to the current version."""

import fcntl
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
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

CURRENT_FILE = "CURRENT"  # line 1: the current version, line 2: the previous one
DELETED_SUFFIX = ".deleted"  # .VERSION.deleted is a version being removed
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class Store:
    """A directory with one folder per memory and, in it, one folder per version.

    A Store keeps no state but its path: every answer is read from disk. A version exists once its
    folder holds a manifest, and a memory exists once it has a version.

    root/name/version/            a finished version (see FORMAT.md)
    root/name/version.journal     the edits made on it
    root/name/CURRENT             which version is served
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """All memories with at least one finished version, sorted."""
        return [name for name in self._list_names(self.root) if self._list_versions(name)]

    def versions(self, name: str) -> list[str]:
        """The finished versions of a memory, sorted; names from `next_version` sort by time.

        Raises NameRefused, UnknownMemory.
        """
        found = self._list_versions(check_name(name))
        if not found:
            known = ", ".join(self.names()) or "none at all"
            raise UnknownMemory(f"no memory {name!r} here, there is {known}: build it, or correct the name")
        return found

    def current(self, name: str) -> str:
        """The version to serve, now and after a restart.

        Raises UnknownMemory, UnknownVersion where none was activated, DamagedVersion.
        """
        return self._read_pointer(name)[0]

    def previous(self, name: str) -> str | None:
        """The version that was current before, which a rollback activates; None without one."""
        pointer = self._read_pointer(name)
        return pointer[1] if len(pointer) > 1 else None

    def path(self, name: str, version: str) -> Path:
        """The folder of a finished version. Raises NameRefused, UnknownMemory, UnknownVersion."""
        if check_name(version) not in self.versions(name):
            raise UnknownVersion(
                f"{name} has no version {version!r}, only {', '.join(self.versions(name))}: choose one of these"
            )
        return self.root / name / version

    def manifest(self, name: str, version: str | None = None) -> Manifest:
        """The manifest of a version, by default the current one; no other file is checked."""
        return read_manifest(self.path(name, self.current(name) if version is None else version))

    def open(self, name: str, version: str | None = None, *, encoder: str, devices: Sequence[int] = ()) -> Snapshot:
        """Open a verified version with the edits made on it, by default the current version.

        encoder: fingerprint of the encoder of the queries.  devices: GPUs to clone its indexes to.
        Raises UnknownMemory, UnknownVersion, DamagedVersion, IncompatibleSnapshot, DeviceRefused.
        """
        version = self.current(name) if version is None else version
        base = Snapshot.open(self.path(name, version), encoder=encoder, devices=devices)
        overlay, _ = replay_journal(base, self.journal_path(name, version))
        return overlay.snapshot

    def verify(
        self,
        name: str,
        version: str,
        *,
        threads: int = READ_THREADS,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Read every byte of a version, seconds per gigabyte.

        on_progress: called with the bytes of each file that was read.
        Raises DamagedVersion, which names each file that differs and the bytes.
        """
        path = self.path(name, version)
        verify(path, read_manifest(path), threads=threads, on_progress=on_progress)

    def journal_path(self, name: str, version: str) -> Path:
        """The journal of a version's edits; the file exists from the first edit on."""
        return self.path(name, version).with_name(version + JOURNAL_SUFFIX)

    def count_edits(self, name: str, version: str) -> int:
        """Number of edits made on a version."""
        records = read_records(self.journal_path(name, version), self.manifest(name, version).sha256)
        return sum(1 for _ in records)

    def activate(self, name: str, version: str, *, instead_of: str | None = None) -> None:
        """Make a version the current one, atomically; the current one becomes the previous.

        instead_of: activate only where this version is the current one, else change nothing.
        """
        self.path(name, version)  # raises where the version is unknown
        with translate_write_errors(f"{name}/{CURRENT_FILE}"), lock_folder(self.root / name):
            current = self._read_pointer_or_none(name)[:1]
            if current != [version] and instead_of in (None, *current):
                replace_text(self.root / name / CURRENT_FILE, "\n".join([version, *current]) + "\n")

    def delete(self, name: str, version: str) -> None:
        """Delete a version and its edits. Raises StoreBusy for the current version.

        The version stops existing by one rename. Processes that serve it go on, since its files
        stay mapped. What a kill leaves behind is removed by the next delete or build.
        """
        path = self.path(name, version)
        with translate_write_errors(f"{name}/{version}"), lock_folder(self.root / name):
            if self._read_pointer_or_none(name)[:1] == [version]:
                raise StoreBusy(f"{name}@{version} is the current version: activate another one first")
            _remove_deleted(path.parent)
            path.rename(path.with_name(f".{version}{DELETED_SUFFIX}"))
            _remove_deleted(path.parent)

    def delete_memory(self, name: str) -> None:
        """Delete a memory: all its versions with their edits.

        It stops existing by one rename.  Raises UnknownMemory; StoreBusy while a process edits it.
        """
        versions, folder = self.versions(name), self.root / name
        with translate_write_errors(name), lock_folder(folder), ExitStack() as stack:
            for journal in filter(Path.exists, (self.journal_path(name, version) for version in versions)):
                try:
                    fcntl.flock(stack.enter_context(journal.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise StoreBusy(f"{name} is being edited by another process: stop the service first") from error
            gone = self.root / f".{name}{DELETED_SUFFIX}"
            shutil.rmtree(gone, ignore_errors=True)  # left by a kill
            folder.rename(gone)
            shutil.rmtree(gone)

    def remove_deleted(self, name: str) -> None:
        """Finish deletions that a kill interrupted, so that no new version inherits their edits."""
        folder = self.root / check_name(name)
        if any(folder.glob(f".*{DELETED_SUFFIX}")):
            with translate_write_errors(name), lock_folder(folder):
                _remove_deleted(folder)

    def prune(self, name: str, keep: int) -> list[str]:
        """Delete all versions but the `keep` newest, the current and the previous one.

        Returns the deleted versions. A version whose manifest is unreadable has no known age and is
        kept.
        """
        pointed, built = set(self._read_pointer_or_none(name)), []
        for version in self.versions(name):
            with suppress(DamagedVersion, IncompatibleSnapshot):
                written = (self.path(name, version) / MANIFEST_FILE).stat().st_mtime_ns  # `created` has whole seconds
                built.append((self.manifest(name, version).created, written, version))
        old = [version for *_, version in sorted(built)[: -keep or None] if version not in pointed]
        for version in old:
            self.delete(name, version)
        return old

    def next_version(self, name: str, today: datetime | None = None) -> str:
        """A new version name of today (UTC) that sorts behind all others of today.

        Names are 2026-11-22a, then b …, z, za. The name of a deleted version is used again only if
        it was the last one and no longer in CURRENT. The name of an unfinished build is taken.
        """
        day = (today or datetime.now(UTC)).strftime("%Y-%m-%d")
        unfinished = {path.name[1:].removesuffix(".partial") for path in (self.root / name).glob(".*.partial")}
        existing = {*self._list_versions(check_name(name)), *self._read_pointer_or_none(name), *unfinished}
        taken = [version for version in existing if version.startswith(day)]
        labels = map(_version_label, repeat(day), count())
        return next(label for label in labels if all(label > version for version in taken))

    def _read_pointer(self, name: str) -> list[str]:
        """The one or two versions in CURRENT."""
        versions = self.versions(name)
        try:
            lines = (self.root / name / CURRENT_FILE).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise UnknownVersion(f"{name} has no current version: activate one of {', '.join(versions)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedVersion(
                f"{name}/{CURRENT_FILE} cannot be read ({type(error).__name__}): activate a version again"
            ) from error
        if not 1 <= len(lines) <= 2 or not all(NAME_PATTERN.fullmatch(line) for line in lines):
            raise DamagedVersion(
                f"{name}/{CURRENT_FILE} does not hold one or two version names: activate a version again"
            )
        return lines

    def _read_pointer_or_none(self, name: str) -> list[str]:
        """The versions in CURRENT; none where it is missing or damaged: `activate` repairs it."""
        try:
            return self._read_pointer(name)
        except (UnknownMemory, UnknownVersion, DamagedVersion):
            return []

    def _list_versions(self, name: str) -> list[str]:
        folder = self.root / name
        return [version for version in self._list_names(folder) if (folder / version / MANIFEST_FILE).is_file()]

    @staticmethod
    def _list_names(folder: Path) -> list[str]:
        """The entries of a folder with plain names, sorted; none where it does not exist."""
        try:
            return sorted(entry.name for entry in folder.iterdir() if NAME_PATTERN.fullmatch(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreUnwritable(
                f"the folder of {folder.name} cannot be read: {error.strerror}; grant permission"
            ) from error


def _remove_deleted(folder: Path) -> None:
    """Remove the deleted versions of a memory; the files beside a version go before its folder.

    While the folder exists, the next run still finds an interrupted deletion.
    """
    for leftover in folder.glob(f".*{DELETED_SUFFIX}"):
        path = folder / leftover.name[1:].removesuffix(DELETED_SUFFIX)
        journal = path.with_name(path.name + JOURNAL_SUFFIX)
        for beside in (journal, verified_record_path(path), rejects_path(folder, path.name)):
            beside.unlink(missing_ok=True)
        shutil.rmtree(leftover)


def check_name(name: str) -> str:
    """The name of a memory or version, unchanged. Raises NameRefused for anything like a path."""
    if not NAME_PATTERN.fullmatch(name):
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise NameRefused(
            f"{shown!r} is not a name: 1 to 64 of the characters A-Z a-z 0-9 . _ -, beginning with a letter or digit"
        )
    return name


def check_version_name(version: str) -> str:
    """The name of a new version, unchanged. Raises NameRefused for a file name of the store."""
    if version.lower().endswith(JOURNAL_SUFFIX):
        raise NameRefused(f"{version!r} ends like the edits of another version: choose another name")
    if check_name(version).upper() == CURRENT_FILE:
        raise NameRefused(f"{version!r} is the name of the pointer file, no version can have it: choose another")
    return version


def _version_label(day: str, number: int) -> str:
    """0 → a, 25 → z, 26 → za: longer labels begin with z, so that they sort last."""
    tens, ones = divmod(number, 26)
    return day + "z" * tens + chr(ord("a") + ones)
