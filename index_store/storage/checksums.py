"""Is a version what was built? Every byte read again, or, for a large file that nothing has written to since, its stat."""

import hashlib
import json
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index_store.errors import DamagedVersion
from index_store.storage.atomic import READ_THREADS, file_digest, first_difference, fsync_path
from index_store.storage.manifest import Manifest

SMALL_BYTES = 1 << 20  # files up to here are read at every opening: a millisecond each
TICK_S = 0.05  # a file system's clock may stand still this long: two writes within it can leave one and the same ctime


@dataclass(frozen=True, slots=True)
class FileStats:
    """What stat said of the large files before they were read.

    stats: {name: [bytes, mtime_ns, ctime_ns, inode, device]}: no write, copy or restore leaves all five as they were.
    """

    stats: Mapping[str, list[int]]
    at_ns: int

    @classmethod
    def of(cls, path: Path, names: Collection[str]) -> "FileStats":
        """The large ones of the files under `path`, once the last write to them lies a tick back; a missing file is left out."""
        sight = cls._now(path, names)
        if not sight.settled:
            time.sleep(TICK_S)
            sight = cls._now(path, names)
        return sight

    @classmethod
    def _now(cls, path: Path, names: Collection[str]) -> "FileStats":
        at_ns, found = time.time_ns(), {}
        for name in names:
            with suppress(OSError):
                stat = (path / name).stat()
                if stat.st_size > SMALL_BYTES:
                    found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        return cls(found, at_ns)

    @property
    def settled(self) -> bool:
        """True where a later write must show in ctime; not so under a clock of another machine that runs ahead."""
        return all(self.at_ns - ctime >= TICK_S * 1e9 for _, _, ctime, _, _ in self.stats.values())


def verify(path: Path, manifest: Manifest, *, trust: bool = False, threads: int = READ_THREADS) -> frozenset[str]:
    """Compare the files of the version at `path` with its manifest; DamagedVersion names each that differs, and where.

    trust: large files whose stat is as it was when they were last read whole are not read again; they are what is returned.
    A version found whole is recorded as such for the next opening, a damaged one loses its record.
    """
    sight = FileStats.of(path, manifest.files)
    known = _recorded(path, manifest) if trust else {}
    unread = frozenset(name for name, stat in sight.stats.items() if known.get(name) == stat)
    found = _faults(path, manifest, [name for name in manifest.files if name not in unread], threads)
    if found:
        with suppress(OSError):
            verified_record_path(path).unlink()
        raise DamagedVersion(f"{manifest.ref}: {'; '.join(found)}: restore or rebuild the version")
    if known != sight.stats:
        record_verified(path, manifest, sight)
    return unread


def record_verified(path: Path, manifest: Manifest, sight: FileStats) -> None:
    """Note that the files were whole when they were `sight`; nothing is noted where one has changed since, or may do so unseen."""
    if not sight.stats or not sight.settled:
        return
    with suppress(OSError):  # a store that may only be read is read whole each time
        for name in sight.stats:
            fsync_path(
                path / name
            )  # what was read may so far be in memory only, and a power cut would bring older bytes back
        if FileStats.of(path, sight.stats).stats == sight.stats:
            text = json.dumps({"manifest": _seal(manifest), "files": sight.stats}, indent=1)
            verified_record_path(path).write_text(
                f"{_sha256(text)}\n{text}", "utf-8"
            )  # half a record is no record: its own sum tells


def verified_record_path(path: Path) -> Path:
    """STORE/name/.VERSION.verified, beside the version: it tells about files on this disk and is no part of the version."""
    return path.with_name(f".{path.name}.verified")


def _recorded(path: Path, manifest: Manifest) -> dict[str, list[int]]:
    """The stats under which files were last found whole; none where the record is missing, torn or of another manifest."""
    try:
        seal, text = verified_record_path(path).read_text("utf-8").split("\n", 1)
        found = json.loads(text) if seal == _sha256(text) else {}
    except (OSError, ValueError):
        return {}
    files: dict[str, list[int]] = found["files"] if found.get("manifest") == _seal(manifest) else {}
    return files


def _faults(path: Path, manifest: Manifest, names: Collection[str], threads: int) -> list[str]:
    """What is wrong with each file that is not as the manifest says, in its order."""
    with ThreadPoolExecutor(threads) as pool:
        faults = pool.map(lambda name: _fault(path, name, manifest.files[name]), names)
        return [fault for fault in faults if fault is not None]


def _fault(path: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    try:
        found = file_digest(path / name)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    there, wanted = int(found["bytes"]), int(expected["bytes"])
    if found["sha256"] == expected["sha256"] and there == wanted:
        return None
    size = "" if there == wanted else f"has {there} bytes, the manifest says {wanted}, and "
    where = first_difference(str(found["crc32"]), expected["crc32"])
    if where is None:
        return f"{name} {size}does not have the sha256 of its manifest"
    return f"{name} {size}differs in bytes {where[0]}-{min(where[1], max(there, wanted) - 1)}"


def _seal(manifest: Manifest) -> str:
    return _sha256(manifest.to_json())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
