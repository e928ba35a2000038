"""Editor: durable online edits of a served version, and its compaction into a new version."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from index_store.build.build import build_version
from index_store.edits.changes import Change, Delete, encode_ids, make_put
from index_store.edits.journal import Journal, log, read_records
from index_store.edits.overlay import Overlay, decode_record, replay_journal
from index_store.errors import DamagedVersion, PairsRefused, StoreBusy, StoreError, StoreUnwritable
from index_store.snapshot import Snapshot
from index_store.storage.manifest import Manifest
from index_store.store import Store
from index_store.types import SIDES, Id, Pairs

SHARD_PAIRS = 1_000_000  # pairs per shard of a compacted version whose base has one shard


@dataclass(frozen=True, slots=True, eq=False)
class CompactedVersion:
    """A version that a compaction built and opened, before it is served.

    snapshot: the new version.  base: the version it was made from.
    edits, size: how many edits, and bytes of the base's journal, it contains.
    """

    snapshot: Snapshot
    base: Snapshot
    edits: int
    size: int


class Editor:
    """The editor of the version that a process serves; all its threads edit through one Editor.

    State under one lock: the overlay, whose snapshot is the one to serve, and the journal, which is
    open from the first edit on.
    """

    def __init__(self, store: Store, overlay: Overlay, size: int, devices: Sequence[int]) -> None:
        self._store, self._overlay, self._size, self._devices = store, overlay, size, devices
        self._journal: Journal | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, store: Store, name: str, version: str | None = None, *, encoder: str, devices: Sequence[int] = ()
    ) -> "Editor":
        """Open a version with all acknowledged edits, by default the current version.

        encoder, devices: as in `Snapshot.open`.
        The first edit locks the journal, and raises StoreBusy while another process holds it.
        """
        version = store.current(name) if version is None else version
        base = Snapshot.open(store.path(name, version), encoder=encoder, devices=devices)
        return cls(store, *replay_journal(base, store.journal_path(name, version)), devices)

    @property
    def snapshot(self) -> Snapshot:
        """The version with all edits so far, which is the snapshot to serve."""
        return self._overlay.snapshot

    def put(self, pairs: Pairs) -> Snapshot:
        """Add pairs, replacing those with the same ids; returns the snapshot that shows them.

        The edit is on disk before this returns.
        Raises PairsRefused for pairs not of this memory's kind, StoreUnwritable, StoreBusy; then
        nothing has changed.
        """
        manifest = self._overlay.base.manifest
        change = make_put(pairs, manifest, self._overlay.base.id_kind)
        if not len(change.ids):
            return self.snapshot
        with self._lock:
            return self._apply(change)

    def delete(self, ids: Sequence[Id]) -> tuple[Snapshot, list[Id]]:
        """Remove pairs by id, as durably as `put`; returns the snapshot and the unknown ids."""
        base, wanted = self._overlay.base, list(dict.fromkeys(ids))
        names = encode_ids(wanted, base.id_kind, base.manifest.ref)
        with self._lock:
            self._open_journal()
            known = self._overlay.contains(names)
            missing = [name for name, found in zip(wanted, known.tolist(), strict=True) if not found]
            return (self._apply(Delete(names[known])) if known.any() else self.snapshot), missing

    def compact(self, version: str | None = None, on_progress: Callable[[int, int], object] | None = None) -> Snapshot:
        """Build a new version from the version and its edits and serve it: returns its snapshot.

        A failure leaves no new version behind.
        """
        compacted = self.compact_build(version, on_progress)
        try:
            return self.switch(compacted)
        except Exception:
            self.discard(compacted.snapshot.manifest)
            raise

    def compact_build(
        self, version: str | None = None, on_progress: Callable[[int, int], object] | None = None
    ) -> CompactedVersion:
        """Build a new version of the pairs as they are now; edits continue meanwhile.

        version: name of the new version, None = the next free name of today.
        on_progress: called with pairs written and pairs in all.
        The new version has the base's recipe, key kinds and recall floor, and `parent`
        name@version+N. Raises PairsRefused where no pair is left.
        """
        with self._lock:
            journal, overlay = self._open_journal(), self._overlay
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
            _read_blocks(snapshot, on_progress),
            encoder=base.encoder,
            kinds={side: base.key_kind(side) for side in SIDES},
            index=base.index.get("asked", base.index["recipe"]),
            shard_pairs=max(shard["pairs"] for shard in base.shards) if len(base.shards) > 1 else SHARD_PAIRS,
            recall_floor=base.recall["floor"],
            parent=snapshot.ref,
            source={**base.source, "compacted": {"edits": edits, "from": base.ref}},
        )
        try:
            path = self._store.path(base.name, built.version)
            opened = Snapshot.open(path, encoder=base.encoder, devices=self._devices)
        except Exception:
            self.discard(built)
            raise
        return CompactedVersion(opened, overlay.base, edits, size)

    def switch(self, compacted: CompactedVersion) -> Snapshot:
        """Serve and edit the compacted version from now on; returns its snapshot.

        Copies the edits made since the build began into the new version's journal, then makes the
        version current, unless CURRENT has moved to another version than the base. If the process
        dies in between, both versions open with every acknowledged edit.
        Raises StoreBusy where the editor has switched to another version since the build began.
        """
        old, new = compacted.base.manifest, compacted.snapshot.manifest
        with self._lock:
            if self._overlay.base is not compacted.base:
                raise StoreBusy(
                    f"{new.ref} was compacted from {old.ref}, by now {self.snapshot.ref} is being edited: "
                    "compact that again"
                )
            self._open_journal()
            overlay = Overlay(compacted.snapshot)
            old_journal = self._store.journal_path(old.name, old.version)
            payloads = [payload for _, payload in read_records(old_journal, old.sha256, compacted.size)]
            for number, payload in enumerate(payloads, compacted.edits + 1):
                overlay.apply(decode_record(payload, compacted.base, number))
            journal = Journal.create(self._store.journal_path(new.name, new.version), new.sha256, payloads)
            self._activate(new, old, journal)
            self._close_journal()
            self._overlay, self._journal = overlay, journal
            return overlay.snapshot

    def discard(self, built: Manifest) -> None:
        """Delete the version of a compaction that failed; the current version always stays.

        A version that cannot be deleted is logged: the next compaction deletes it as redundant.
        """
        try:
            self._store.delete(built.name, built.version)
        except StoreError as error:
            log.warning("%s of a failed compaction stays: %s", built.ref, error)

    def close(self) -> None:
        """Unlock the journal for other processes; a later edit locks it again."""
        with self._lock:
            self._close_journal()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._size = self._journal.size
            self._journal.close()
            self._journal = None

    def _apply(self, change: Change) -> Snapshot:
        """Write an edit to the journal, then apply it in memory."""
        self._open_journal().append(change.encode())
        return self._overlay.apply(change)

    def _open_journal(self) -> Journal:
        """The journal, locked for writing. The first call reads edits made by other processes."""
        if self._journal is None:
            base = self._overlay.base
            path = self._store.journal_path(base.manifest.name, base.manifest.version)
            journal = Journal.open(path, base.manifest.sha256)
            if journal.edits < self.snapshot.edits:
                journal.close()
                raise DamagedVersion(
                    f"{path.name} held {self.snapshot.edits} edits and now holds {journal.edits}: "
                    "restore it from a copy"
                )
            if journal.size != self._size:
                self._overlay, self._size = replay_journal(base, path)
            self._journal = journal
        return self._journal

    def _activate(self, new: Manifest, old: Manifest, journal: Journal) -> None:
        """Make the new version current if the old one is; on failure, remove the new journal."""
        try:
            self._store.activate(new.name, new.version, instead_of=old.version)
        except StoreUnwritable:
            if self._store.current(new.name) != new.version:  # if it is current, only the fsync has failed
                journal.remove()
                raise


def _read_blocks(snapshot: Snapshot, on_progress: Callable[[int, int], object] | None) -> Iterator[Pairs]:
    """The pairs of a snapshot in blocks; on_progress gets pairs read and in all after each."""
    done = 0
    for block in snapshot.blocks():
        yield block
        done += len(block)
        if on_progress is not None:
            on_progress(done, len(snapshot))
