"""Verification of a version's files by reading every byte or by trusting an unchanged stat.

A large file's stat is trusted if it equals the stat under which the file was last read in full
and found intact. `FORMAT.md` says why no write can leave the stat unchanged.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index_store.errors import DamagedVersion
from index_store.storage.atomic import READ_THREADS, file_digest, first_difference, fsync_path
from index_store.storage.manifest import Manifest

SMALL_BYTES = 1 << 20  # files up to this size are read at every opening: a millisecond each
CLOCK_TICK_S = 0.05  # two writes within one tick of a file system's clock may leave the same ctime


@dataclass(frozen=True, slots=True)
class FileStats:
    """The stat of each large file of a version, taken before the files were read.

    by_name: {name: [bytes, mtime_ns, ctime_ns, inode, device]}; every write, copy or restore
    changes at least one of the five.  at_ns: when they were taken, nanoseconds since the epoch.
    """

    by_name: Mapping[str, list[int]]
    at_ns: int

    @classmethod
    def collect(cls, path: Path, names: Collection[str]) -> "FileStats":
        """The stats of the large files under `path`, waiting one clock tick after a recent write.

        A missing file is left out.
        """
        found = cls._collect_now(path, names)
        if not found.settled:
            time.sleep(CLOCK_TICK_S)
            found = cls._collect_now(path, names)
        return found

    @classmethod
    def _collect_now(cls, path: Path, names: Collection[str]) -> "FileStats":
        at_ns, found = time.time_ns(), {}
        for name in names:
            with suppress(OSError):
                stat = (path / name).stat()
                if stat.st_size > SMALL_BYTES:
                    found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        return cls(found, at_ns)

    @property
    def settled(self) -> bool:
        """True where a later write is certain to change ctime.

        False after a write within the last clock tick, or where a file server's clock runs ahead.
        """
        return all(self.at_ns - ctime >= CLOCK_TICK_S * 1e9 for _, _, ctime, _, _ in self.by_name.values())


def verify(
    path: Path,
    manifest: Manifest,
    *,
    trust: bool = False,
    threads: int = READ_THREADS,
    on_progress: Callable[[int], object] = lambda _: None,
) -> frozenset[str]:
    """Verify the files of the version at `path` against its manifest; returns the names not read.

    trust: do not read large files whose stat equals the recorded one; these are returned.
    on_progress: called with the bytes of each file that was read.
    An intact version is recorded for the next opening, a damaged one loses its record.
    Raises DamagedVersion, which names each file that differs and the bytes.
    """
    stats = FileStats.collect(path, manifest.files)
    recorded = _read_record(path, manifest) if trust else {}
    unread = frozenset(name for name, stat in stats.by_name.items() if recorded.get(name) == stat)
    names = [name for name in manifest.files if name not in unread]
    faults = _find_faults(path, manifest, names, threads, on_progress)
    if faults:
        with suppress(OSError):
            verified_record_path(path).unlink()
        raise DamagedVersion(f"{manifest.ref}: {'; '.join(faults)}: restore or rebuild the version")
    if recorded != stats.by_name:
        record_verified(path, manifest, stats)
    return unread


def record_verified(path: Path, manifest: Manifest, stats: FileStats) -> None:
    """Record that the files were intact under these stats.

    Nothing is recorded where a file has changed since, or where its stat might hide a change.
    """
    if not stats.by_name or not stats.settled:
        return
    with suppress(OSError):  # in a read-only store every opening reads every byte
        for name in stats.by_name:
            fsync_path(path / name)  # otherwise a power cut may restore older bytes
        if FileStats.collect(path, stats.by_name).by_name == stats.by_name:
            text = json.dumps({"manifest": _manifest_text_sha256(manifest), "files": stats.by_name}, indent=1)
            record = f"{_sha256(text)}\n{text}"  # the digest makes a torn record invalid
            verified_record_path(path).write_text(record, "utf-8")


def verified_record_path(path: Path) -> Path:
    """STORE/name/.VERSION.verified, beside the version: it describes this disk, not the version."""
    return path.with_name(f".{path.name}.verified")


def _read_record(path: Path, manifest: Manifest) -> dict[str, list[int]]:
    """The stats under which the files were last found intact.

    Empty where the record is missing, torn or of another manifest.
    """
    try:
        digest, text = verified_record_path(path).read_text("utf-8").split("\n", 1)
        found = json.loads(text) if digest == _sha256(text) else {}
    except (OSError, ValueError):
        return {}
    files: dict[str, list[int]] = found["files"] if found.get("manifest") == _manifest_text_sha256(manifest) else {}
    return files


def _find_faults(
    path: Path, manifest: Manifest, names: Collection[str], threads: int, on_progress: Callable[[int], object]
) -> list[str]:
    """One description per file that differs from the manifest, in the manifest's order."""
    faults = list[str]()
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: _find_fault(path, name, manifest.files[name]), names)
        for name, fault in zip(names, found, strict=True):
            on_progress(int(manifest.files[name]["bytes"]))
            if fault is not None:
                faults.append(fault)
    return faults


def _find_fault(path: Path, name: str, expected: Mapping[str, Any]) -> str | None:
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


def _manifest_text_sha256(manifest: Manifest) -> str:
    return _sha256(manifest.to_json())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
