"""Versions left behind by compactions, whose pairs and edits a served version contains."""

import hashlib
from collections.abc import Collection, Iterator

from index_store.edits.journal import read_records
from index_store.errors import StoreError
from index_store.store import Store


def redundant_versions(store: Store, name: str, served: Collection[str]) -> list[str]:
    """The versions made by compactions that a version of `served` contains completely, sorted.

    A version contains another one directly, or through versions in between. A version that was
    edited after it had been compacted holds edits found nowhere else and is not redundant.
    """
    compactions = dict(_read_compactions(store, name))
    contains = {
        pair
        for version, (base, folded) in compactions.items()
        for pair in _compare_versions(store, name, version, base, folded)
    }
    reached = set(served)
    while more := {contained for container, contained in contains if container in reached} - reached:
        reached |= more
    return sorted((reached - set(served)) & set(compactions))


def _read_compactions(store: Store, name: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """(new version, (compacted version, its edits folded in)) of every compaction."""
    for version in store.versions(name):
        try:
            source = store.manifest(name, version).source
        except StoreError:  # an unreadable manifest does not say what the version contains
            continue
        if "compacted" in source:
            yield version, (source["compacted"]["from"].partition("@")[2], source["compacted"]["edits"])


def _compare_versions(store: Store, name: str, version: str, base: str, folded: int) -> Iterator[tuple[str, str]]:
    """(container, contained) pairs of a compaction's version and its base.

    A compaction copies the edits made while it ran into the new version's journal. So each of the
    two contains the other one if its journal continues the other's.
    """
    try:
        own, later = _edit_digests(store, name, version), _edit_digests(store, name, base)[folded:]
    except StoreError:  # one of the two is deleted or damaged
        return
    if own[: len(later)] == later:
        yield version, base
    if later[: len(own)] == own:
        yield base, version


def _edit_digests(store: Store, name: str, version: str) -> list[bytes]:
    """The sha256 of each edit made on a version, in order."""
    records = read_records(store.journal_path(name, version), store.manifest(name, version).sha256)
    return [hashlib.sha256(payload).digest() for _, payload in records]
