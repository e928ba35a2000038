"""Editing a memory while it serves: durable first, visible next, folded into a new version in time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from index_store.build.build import build_version
from index_store.edits.changes import Change, Delete, encode_ids, make_put
from index_store.edits.journal import Journal, read_records
from index_store.edits.overlay import Overlay, decode_record, replay_journal
from index_store.errors import DamagedVersion, PairsRefused, StoreBusy, StoreUnwritable
from index_store.snapshot import Snapshot
from index_store.storage.manifest import Manifest
from index_store.store import Store
from index_store.types import SIDES, Id, Pairs

SHARD_PAIRS = 1_000_000

Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True, eq=False)
class CompactedVersion:
    """A compacted version, built and open but not yet serving.

    snapshot: the new version alone.  base: the one that it was made from.  edits, size: how much of the base's journal is in it.
    """

    snapshot: Snapshot
    base: Snapshot
    edits: int
    size: int


class Editor:
    """Whoever serves a version holds one of these and makes every edit through it; any thread may.

    Its state: the overlay, whose snapshot is what serves, and the journal once this process writes it. Both change under one lock.
    """

    def __init__(self, store: Store, overlay: Overlay, size: int, devices: Sequence[int]) -> None:
        self._store, self._overlay, self._size, self._devices = store, overlay, size, devices
        self._journal: Journal | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, store: Store, name: str, version: str | None = None, *, encoder: str, devices: Sequence[int] = ()
    ) -> "Editor":
        """A verified version, the current one where none is named, with every acknowledged edit.  devices: as in `Snapshot.open`.

        Takes no lock yet: the first edit does, and is refused with StoreBusy while another process edits this version.
        """
        version = store.current(name) if version is None else version
        base = Snapshot.open(store.path(name, version), encoder=encoder, devices=devices)
        return cls(store, *replay_journal(base, store.journal_path(name, version)), devices)

    @property
    def snapshot(self) -> Snapshot:
        """The version with all edits so far: what to serve."""
        return self._overlay.snapshot

    def put(self, pairs: Pairs) -> Snapshot:
        """Add pairs, replacing those of the same id; on the disk before this returns the snapshot that shows them.

        PairsRefused where they are not of this memory's kind, StoreUnwritable where the disk does not take them: then nothing changed.
        """
        manifest = self._overlay.base.manifest
        change = make_put(pairs, manifest, self._overlay.base.id_kind)
        if not len(change.ids):
            return self.snapshot
        with self._lock:
            return self._made(change)

    def delete(self, ids: Sequence[Id]) -> tuple[Snapshot, list[Id]]:
        """Remove pairs by id, as durable as put(); also those of the ids that no pair had."""
        base, wanted = self._overlay.base, list(dict.fromkeys(ids))
        names = encode_ids(wanted, base.id_kind, base.manifest.ref)
        with self._lock:
            self._writer()
            known = self._overlay.known(names)
            missing = [name for name, there in zip(wanted, known.tolist(), strict=True) if not there]
            return (self._made(Delete(names[known])) if known.any() else self.snapshot), missing

    def compact(self, version: str | None = None, on_progress: Progress | None = None) -> Snapshot:
        """Fold version and edits into a new version and serve that: compact_build(), then switch()."""
        return self.switch(self.compact_build(version, on_progress))

    def compact_build(self, version: str | None = None, on_progress: Progress | None = None) -> CompactedVersion:
        """Build a new version of what is there now; edits go on meanwhile, and nothing changes for them.

        version: None takes the next free name of today.  on_progress: told pairs written and pairs in all.
        It has the base's recipe, kinds and recall floor; `parent` says name@version+N.
        """
        with self._lock:
            journal, overlay = self._writer(), self._overlay
            snapshot, edits, size = overlay.snapshot, journal.edits, journal.size
        if not len(snapshot):
            raise PairsRefused(
                f"{snapshot.ref} holds no pair any more: a version needs at least one, add some or delete the memory"
            )
        base = overlay.base.manifest
        built = build_version(
            self._store,
            base.name,
            version,
            _reported(snapshot, on_progress),
            encoder=base.encoder,
            kinds={side: base.key_kind(side) for side in SIDES},
            index=base.index.get("asked", base.index["recipe"]),
            shard_pairs=max(shard["pairs"] for shard in base.shards) if len(base.shards) > 1 else SHARD_PAIRS,
            recall_floor=base.recall["floor"],
            parent=snapshot.ref,
            source={**base.source, "compacted": {"edits": edits, "from": base.ref}},
        )
        opened = Snapshot.open(self._store.path(base.name, built.version), encoder=base.encoder, devices=self._devices)
        return CompactedVersion(opened, overlay.base, edits, size)

    def switch(self, prepared: CompactedVersion) -> Snapshot:
        """Carry over the edits made since the build began, make the new version current, and serve and edit it from now on.

        Should the process die on the way, either version opens with every acknowledged edit. CURRENT is left alone where it names
        another version than the one that was compacted.
        """
        old, new = prepared.base.manifest, prepared.snapshot.manifest
        with self._lock:
            if self._overlay.base is not prepared.base:
                raise StoreBusy(
                    f"{new.ref} was compacted from {old.ref}, by now {self.snapshot.ref} is being edited: compact that again"
                )
            self._writer()
            fresh = Overlay(prepared.snapshot)
            payloads = [
                payload
                for _, payload in read_records(
                    self._store.journal_path(old.name, old.version), old.sha256, prepared.size
                )
            ]
            for number, payload in enumerate(payloads, prepared.edits + 1):
                fresh.apply(decode_record(payload, prepared.base, number))
            journal = Journal.create(self._store.journal_path(new.name, new.version), new.sha256, payloads)
            self._activate(new, old, journal)
            self._close()
            self._overlay, self._journal = fresh, journal
            return fresh.snapshot

    def close(self) -> None:
        """Let another process edit. Snapshots stay as they are; a later edit takes the journal again."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._journal is not None:
            self._size = self._journal.size
            self._journal.close()
            self._journal = None

    def _made(self, change: Change) -> Snapshot:
        """Durable, then visible."""
        self._writer().append(change.encode())
        return self._overlay.apply(change)

    def _writer(self) -> Journal:
        """The journal, taken for writing at the first edit; edits that another process made until then are read first."""
        if self._journal is None:
            base = self._overlay.base
            path = self._store.journal_path(base.manifest.name, base.manifest.version)
            journal = Journal.open(path, base.manifest.sha256)
            if journal.edits < self.snapshot.edits:
                journal.close()
                raise DamagedVersion(
                    f"{path.name} held {self.snapshot.edits} edits and now holds {journal.edits}: restore it from a copy"
                )
            if journal.size != self._size:
                self._overlay, self._size = replay_journal(base, path)
            self._journal = journal
        return self._journal

    def _activate(self, new: Manifest, old: Manifest, journal: Journal) -> None:
        """Point CURRENT at the new version if it names the old one; where that fails, everything is as before."""
        try:
            self._store.activate(new.name, new.version, instead_of=old.version)
        except StoreUnwritable:
            if self._store.current(new.name) != new.version:  # otherwise it was done, and only its sync was refused
                journal.remove()
                raise


def _reported(snapshot: Snapshot, on_progress: Progress | None) -> Iterator[Pairs]:
    """The pairs of a snapshot in blocks; how many have been handed out is told after each."""
    done = 0
    for block in snapshot.blocks():
        yield block
        done += len(block)
        if on_progress is not None:
            on_progress(done, len(snapshot))
