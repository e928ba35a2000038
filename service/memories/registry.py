"""The live memories: which snapshot answers a name, and the one hand that edits it."""

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
from service.errors import NotServing, RetiredVersion
from service.memories.budget import afford
from service.observability.metrics import Metrics

log = logging.getLogger("reco")
T = TypeVar("T")


class MemoryRegistry:
    """Every memory being served, by name.

    State: one Memory per name with the Editor of its version and a lock for those who replace either, and the names whose current
    version could not be opened with the reason. It changes on the event loop only; readers take `resolve`'s snapshot and keep it.
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
            self._start(name)
        self.default = default or (next(iter(self._live)) if len(self._live) == 1 else None)
        if default is not None:
            self.resolve(default)  # the one memory asked for must answer, or the service does not start

    def resolve(self, wanted: str | None) -> Snapshot:
        """The snapshot that answers `name`, `name@version`, `name@version+edits`, or the default.

        Raises NotServing without any memory, UnknownMemory, UnknownVersion, RetiredVersion for a version that is not the one served,
        and the reason why a memory could not be opened.
        """
        if wanted is None and self.default is None:
            known = ", ".join(sorted(self._live)) or "none: build one with `reco memory build`"
            raise NotServing(
                f"no default memory (live: {known}): name one in `memory`, or send enhance=false", "memory"
            )
        name, _, pinned = (wanted or self.default or "").partition("@")
        snapshot = self._serving(name).current
        version, _, edits = pinned.partition("+")
        if version and version != snapshot.manifest.version:
            self._store.path(name, version)  # raises UnknownVersion
            raise RetiredVersion(
                f"{name}@{version} is not being served, {snapshot.ref} is: pin that, or activate {version}", "memory"
            )
        if edits and edits != str(snapshot.edits):
            raise RetiredVersion(
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
        """Whether this very version answers."""
        return name in self._live and self._live[name].current.manifest.version == version

    def names(self) -> list[str]:
        """The memories that answer, sorted."""
        return sorted(self._live)

    def current_versions(self) -> dict[str, str]:
        """The version served by each memory that answers."""
        return {name: self._live[name].current.manifest.version for name in self.names()}

    def table(self) -> list[dict[str, Any]]:
        """One row per memory of the store, live or not."""
        return [self.row(name) for name in self._store.names()]

    def row(self, name: str) -> dict[str, Any]:
        """What GET /memories/{name} tells."""
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
        """The version itself. Raises UnknownMemory, UnknownVersion."""
        return self._store.path(name, version).name

    def previous(self, name: str) -> str:
        """The version served before the current one. Raises UnknownMemory, UnknownVersion."""
        version = self._store.previous(name)
        if version is None:
            raise UnknownVersion(f"memory {name!r} has no previous version to roll back to")
        return version

    def afford(self, name: str, version: str) -> None:
        """Raise BudgetExceeded where a version does not fit beside all that is served. Blocking."""
        held = sum(
            memory.current.bytes["resident"] for memory in list(self._live.values())
        )  # a list: the loop may add one meanwhile
        afford(self._store.manifest(name, version), held, self._budget)

    def open(self, name: str, version: str) -> Editor:
        """A verified version with its edits, not served yet. Blocking."""
        return Editor.open(self._store, name, version, encoder=self._encoder, devices=self._devices)

    def reverify(self, name: str, version: str) -> None:
        """Read every byte of a version again. Blocking; raises DamagedVersion."""
        self._store.verify(name, version, threads=1)

    def drop_compacted(self, name: str) -> None:
        """Delete what earlier compactions made and others repeat to the last edit, since a disk is finite. Blocking.

        Neither what is served nor what a rollback goes to. A failure is logged: the compaction itself has succeeded.
        """
        try:
            pointed = {self._store.current(name), self._store.previous(name)}
            served = {self._live[name].current.manifest.version, *filter(None, pointed)}
            for version in redundant_versions(self._store, name, served):
                self._store.delete(name, version)
                log.info("%s@%s was made by a compaction, and a later one holds all of it: deleted", name, version)
        except StoreError as error:
            log.warning("%s: what earlier compactions left stays: %s", name, error)

    def point(self, name: str, version: str) -> None:
        """Make it the one that the next start serves. Blocking."""
        self._store.activate(name, version)

    def editing(self, name: str) -> AbstractAsyncContextManager[None]:
        """Held while an edit is made or what serves is replaced, so that no edit is ever undone by a swap, nor a swap by an edit."""
        return self._locks.setdefault(name, asyncio.Lock())

    def editor(self, name: str) -> Editor:
        """The hand that edits what `name` serves. Raises UnknownMemory, NotServing."""
        self._serving(name)
        return self._editors[name]

    def publish(self, name: str, editor: Editor) -> Snapshot | None:
        """Serve what `editor` shows: one assignment. The snapshot that was served before, None for a memory new to the service."""
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
        self._describe(snapshot)
        return retired

    async def edit(self, name: str, change: Callable[[Editor], T]) -> tuple[T, Snapshot, Snapshot]:
        """Make a change durable, then visible: what it gave, the snapshots before and after. A caller who leaves stops nothing half-way."""
        self._serving(name)
        return await asyncio.shield(self._edit(name, change))

    def close(self) -> None:
        """Let other processes edit."""
        for editor in self._editors.values():
            editor.close()

    def damaged(self, name: str, error: DamagedVersion) -> None:
        """Tell that a file of what serves was found altered on the disk; it goes on serving what is mapped."""
        self._refused[name] = _bare(error)
        log.error("memory %s is being served, but its files are no longer as they were built: %s", name, error)

    async def _edit(self, name: str, change: Callable[[Editor], T]) -> tuple[T, Snapshot, Snapshot]:
        async with self.editing(name):
            memory, editor = self._serving(name), self._editors[name]
            before = memory.current
            result = await asyncio.to_thread(self._changed, before, editor, change)
            memory.swap(editor.snapshot)
            self._describe(editor.snapshot)
            return result, before, editor.snapshot

    def _changed(self, served: Snapshot, editor: Editor, change: Callable[[Editor], T]) -> T:
        """In a thread. An edit of a version that the next start will not serve would be acknowledged, and then be missed."""
        name, version = served.manifest.name, self._store.current(served.manifest.name)
        if version != served.manifest.version:
            raise StoreBusy(
                f"another process made {name}@{version} current, {served.ref} is served here: activate that here, then edit"
            )
        return change(editor)

    def _serving(self, name: str) -> Memory:
        if name in self._live:
            return self._live[name]
        if name in self._refused:
            raise _bare(self._refused[name])
        self._store.versions(name)  # raises UnknownMemory or NameRefused
        raise NotServing(f"memory {name!r} is in the store but not live: activate one of its versions", "memory")

    def _start(self, name: str) -> None:
        """Serve a memory's current version, or keep the reason why not: one bad memory does not stop the others."""
        try:
            version = self._store.current(name)
            self.afford(name, version)
            self._editors[name] = editor = self.open(name, version)
        except StoreError as error:
            self._refused[name] = _bare(error)
            log.warning("memory %s is not served: %s", name, self._refused[name])
            return
        self._live[name] = Memory(editor.snapshot)
        self._describe(editor.snapshot)

    def _describe(self, snapshot: Snapshot) -> None:
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


def _bare(error: StoreError) -> StoreError:
    """The same refusal without its history: frames keep what they had opened, and an error that is raised again collects more of them."""
    return type(error)(*error.args)
