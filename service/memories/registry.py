"""The registry of memories being served: which snapshot answers a name, and who may change it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, TypeVar

from index_store import Memory, Snapshot, Store
from index_store.compaction import redundant_versions
from index_store.editor import Editor
from index_store.errors import DamagedVersion, StoreBusy, StoreError, UnknownVersion
from service.errors import NotServing, VersionNotServed
from service.memories.budget import check_budget
from service.observability.metrics import Metrics

log = logging.getLogger("reco")
T = TypeVar("T")


class MemoryRegistry:
    """All memories being served, by name.

    State, changed on the event loop only: per name a Memory, the Editor of its version, and a lock
    for edits and swaps; and the reason for each memory whose current version could not be opened.
    Readers take the snapshot of `resolve` and keep it.
    """

    def __init__(
        self,
        store: Store,
        *,
        encoder: str,
        fusion: str,
        default: str | None,
        budget: int,
        devices: Sequence[int],
        metrics: Metrics,
    ) -> None:
        self._store, self._encoder, self._fusion, self._metrics = store, encoder, fusion, metrics
        self._budget, self._devices = budget, devices
        self._live: dict[str, Memory] = {}
        self._editors: dict[str, Editor] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._refused: dict[str, StoreError] = {}
        for name in store.names():
            self._open_current(name)
        self.default = default or (next(iter(self._live)) if len(self._live) == 1 else None)
        damaged = default is not None and isinstance(self._refused.get(default), DamagedVersion)
        if default is not None and not (damaged and self._live):
            # without the memory that was asked for the service must not start; where its files are
            # damaged the others are served, and readiness names the file
            self.resolve(default)

    def resolve(self, wanted: str | None) -> Snapshot:
        """Return the snapshot that answers `name`, `name@version`, `name@version+edits`, or the
        default.

        Raises NotServing without any memory, UnknownMemory, UnknownVersion, RetiredVersion for a
        version that is not served, and the StoreError of a memory that could not be opened.
        """
        if wanted is None and self.default is None:
            known = ", ".join(sorted(self._live)) or "none: build one with `reco memory build`"
            raise NotServing(
                f"no default memory (live: {known}): name one in `memory`, or send enhance=false", "memory"
            )
        name, _, pinned = (wanted or self.default or "").partition("@")
        snapshot = self._live_memory(name).current
        version, _, edits = pinned.partition("+")
        if version and version != snapshot.manifest.version:
            self._store.path(name, version)  # raises UnknownVersion
            raise VersionNotServed(
                f"{name}@{version} is not being served, {snapshot.ref} is: pin that, or activate {version}", "memory"
            )
        if edits and edits != str(snapshot.edits):
            raise VersionNotServed(
                f"{name}@{pinned[:80]} is not being served, {snapshot.ref} is: pin that, or {name}@{version}", "memory"
            )
        return snapshot

    def not_ready(self) -> str | None:
        """None, or why no memory answers by default."""
        try:
            self.resolve(None)
        except (NotServing, StoreError) as error:
            return str(error)
        return None

    def serves(self, name: str, version: str) -> bool:
        """Whether this version is being served."""
        return name in self._live and self._live[name].current.manifest.version == version

    def names(self) -> list[str]:
        """The memories that answer, sorted."""
        return sorted(self._live)

    def current_versions(self) -> dict[str, str]:
        """The version served by each memory that answers."""
        return {name: self._live[name].current.manifest.version for name in self.names()}

    def rows(self) -> list[dict[str, Any]]:
        """One row per memory of the store, served or not. Blocking: it reads the store."""
        return [self.row(name) for name in self._store.names()]

    def row(self, name: str) -> dict[str, Any]:
        """The fields of GET /memories/{name}. Blocking: it reads the store."""
        row: dict[str, Any] = {"name": name, "versions": self._store.versions(name), "live": name in self._live}
        if name in self._refused:
            row["error"] = str(self._refused[name])
        if name in self._live:
            snapshot = self._live[name].current
            found = snapshot.manifest
            row["previous"] = self._store.previous(name)
            row |= {
                "current": found.version,
                "ref": snapshot.ref,
                "edits": snapshot.edits,
                "pairs": len(snapshot),
                "dim": found.dim,
            }
            row |= {
                "encoder": found.encoder,
                "created": found.created,
                "recall": found.recall,
                "index": found.index,
                "keys": found.keys,
            }
            row["bytes"] = snapshot.bytes
        return row

    def version(self, name: str, version: str) -> str:
        """Check that a version exists and return its name. Raises UnknownMemory, UnknownVersion."""
        return self._store.path(name, version).name

    def previous(self, name: str) -> str:
        """The version that was current before. Raises UnknownMemory, UnknownVersion."""
        version = self._store.previous(name)
        if version is None:
            raise UnknownVersion(f"memory {name!r} has no previous version to roll back to")
        return version

    def check_budget(self, name: str, version: str) -> None:
        """Raise BudgetExceeded where a version does not fit beside what is served. Blocking."""
        held = sum(
            memory.current.bytes["resident"] for memory in list(self._live.values())
        )  # a list, since the event loop may add one
        check_budget(self._store.manifest(name, version), held, self._budget)

    def open(self, name: str, version: str) -> Editor:
        """Open and verify a version with its edits; it is not served yet. Blocking."""
        return Editor.open(self._store, name, version, encoder=self._encoder, devices=self._devices)

    def reverify(self, name: str, version: str) -> None:
        """Read every byte of a version again. Blocking; raises DamagedVersion."""
        self._store.verify(name, version, threads=1)

    def drop_compacted(self, name: str) -> None:
        """Delete versions of earlier compactions whose content a later version holds completely.

        Blocking.

        The version being served and the one that a rollback goes to stay. A failure is logged,
        since the compaction itself has succeeded.
        """
        try:
            pointed = {self._store.current(name), self._store.previous(name)}
            served = {self._live[name].current.manifest.version, *filter(None, pointed)}
            for version in redundant_versions(self._store, name, served):
                self._store.delete(name, version)
                log.info("%s@%s was made by a compaction, and a later one holds all of it: deleted", name, version)
        except StoreError as error:
            log.warning("%s: what earlier compactions left stays: %s", name, error)

    def write_current(self, name: str, version: str) -> None:
        """Write the pointer on disk: the next start serves this version. Blocking."""
        self._store.activate(name, version)

    def lock(self, name: str) -> AbstractAsyncContextManager[None]:
        """The lock of edits and swaps of one memory: neither undoes the other."""
        return self._locks.setdefault(name, asyncio.Lock())

    def editor(self, name: str) -> Editor:
        """The Editor of the version that `name` serves. Raises UnknownMemory, NotServing."""
        self._live_memory(name)
        return self._editors[name]

    def publish(self, name: str, editor: Editor) -> Snapshot | None:
        """Serve the snapshot of `editor`, by one assignment.

        Returns the retired snapshot, None for a memory that is new to the service.
        """
        snapshot, retired = editor.snapshot, None
        if name in self._live:
            retired = self._live[name].swap(snapshot)
        else:
            self._live[name] = Memory(snapshot)
        before = self._editors.get(name)
        self._editors[name] = editor
        if before is not None and before is not editor:
            before.close()
        self._refused.pop(name, None)
        if self.default is None and len(self._live) == 1:
            self.default = name
        self._set_gauges(snapshot)
        return retired

    async def edit(self, name: str, change: Callable[[Editor], T]) -> tuple[T, Snapshot, Snapshot]:
        """Make a change durable, then visible; a caller who leaves does not interrupt it.

        Returns the result of `change` and the snapshots before and after.
        """
        self._live_memory(name)
        return await asyncio.shield(self._edit_locked(name, change))

    def close(self) -> None:
        """Close all editors, so that other processes may edit."""
        for editor in self._editors.values():
            editor.close()

    def note_damage(self, name: str, error: DamagedVersion) -> None:
        """Note and log that a file of a served version was altered on disk; the mapped version goes
        on serving.
        """
        self._refused[name] = _without_traceback(error)
        log.error("memory %s is being served, but its files are no longer as they were built: %s", name, error)

    async def _edit_locked(self, name: str, change: Callable[[Editor], T]) -> tuple[T, Snapshot, Snapshot]:
        async with self.lock(name):
            memory, editor = self._live_memory(name), self._editors[name]
            before = memory.current
            result = await asyncio.to_thread(self._apply_change, before, editor, change)
            memory.swap(editor.snapshot)
            self._set_gauges(editor.snapshot)
            return result, before, editor.snapshot

    def _apply_change(self, served: Snapshot, editor: Editor, change: Callable[[Editor], T]) -> T:
        """In a thread: apply a change. Raises StoreBusy where another version is current on disk.

        An edit of a version that the next start does not serve would be acknowledged and then lost.
        """
        name, version = served.manifest.name, self._store.current(served.manifest.name)
        if version != served.manifest.version:
            raise StoreBusy(
                f"another process made {name}@{version} current, {served.ref} is served here: activate that here, then edit"
            )
        return change(editor)

    def _live_memory(self, name: str) -> Memory:
        if name in self._live:
            return self._live[name]
        if name in self._refused:
            raise _without_traceback(self._refused[name])
        self._store.versions(name)  # raises UnknownMemory or NameRefused
        raise NotServing(f"memory {name!r} is in the store but not live: activate one of its versions", "memory")

    def _open_current(self, name: str) -> None:
        """Serve the current version of a memory, or keep the reason why not; the others are not
        affected.
        """
        try:
            version = self._store.current(name)
            self.check_budget(name, version)
            self._editors[name] = editor = self.open(name, version)
        except StoreError as error:
            self._refused[name] = _without_traceback(error)
            log.warning("memory %s is not served: %s", name, self._refused[name])
            return
        self._live[name] = Memory(editor.snapshot)
        self._set_gauges(editor.snapshot)

    def _set_gauges(self, snapshot: Snapshot) -> None:
        name, found = snapshot.manifest.name, snapshot.manifest
        self._metrics.memory_info.labels(name).info(
            {"version": found.version, "encoder": found.encoder, "fusion": self._fusion}
        )
        self._metrics.memory_pairs.labels(name).set(len(snapshot))
        self._metrics.memory_created_timestamp_seconds.labels(name).set(
            datetime.fromisoformat(found.created).timestamp()
        )
        for tier, size in snapshot.bytes.items():
            self._metrics.memory_bytes.labels(name, tier).set(size)


def _without_traceback(error: StoreError) -> StoreError:
    """A copy of the error without traceback and context, which would keep the frames that raised
    it.
    """
    return type(error)(*error.args)
