"""What compactions left behind: versions of which every pair and every edit stands in another one, so that nothing goes with them."""

import hashlib
from collections.abc import Collection, Iterator

from index_store.edits.journal import read_records
from index_store.errors import StoreError
from index_store.store import Store


def redundant_versions(store: Store, name: str, served: Collection[str]) -> list[str]:
    """The versions that compactions made and that repeat one of `served`, by way of others or not; none of `served` itself.

    One that was edited after a compaction had folded it away holds what no other does, and is not among them.
    """
    made = dict(_compactions(store, name))
    holdings = {
        holding for version, (base, folded) in made.items() for holding in _holdings(store, name, version, base, folded)
    }
    known = set(served)
    while more := {held for holder, held in holdings if holder in known} - known:
        known |= more
    return sorted((known - set(served)) & set(made))


def _compactions(store: Store, name: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """(version, (what it was made of, how many edits of that are folded in)) of every version that a compaction made."""
    for version in store.versions(name):
        try:
            source = store.manifest(name, version).source
        except StoreError:  # nothing is known of it, so it repeats nothing
            continue
        if "compacted" in source:
            yield version, (source["compacted"]["from"].partition("@")[2], source["compacted"]["edits"])


def _holdings(store: Store, name: str, version: str, base: str, folded: int) -> Iterator[tuple[str, str]]:
    """(holder, held): a compaction carries over the edits made meanwhile, so each holds the other up to where their edits part."""
    try:
        own, later = _edits(store, name, version), _edits(store, name, base)[folded:]
    except StoreError:  # one of them is gone, or damaged
        return
    if own[: len(later)] == later:
        yield version, base
    if later[: len(own)] == own:
        yield base, version


def _edits(store: Store, name: str, version: str) -> list[bytes]:
    """A digest of each edit made on a version."""
    records = read_records(store.journal_path(name, version), store.manifest(name, version).sha256)
    return [hashlib.sha256(payload).digest() for _, payload in records]
