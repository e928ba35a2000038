"""The cost of online edits: durable adds per second, and searches with a delta against without."""

import time
from typing import Any

import numpy as np

from index_store.benchmarks.turns import BATCHES, compare_rates, median, queries_per_second
from index_store.editor import Editor
from index_store.storage.manifest import Manifest
from index_store.store import Store
from index_store.types import Pairs

ADDED_PAIRS = 10_000
PAIRS_PER_EDIT = 100  # one edit is one record in the journal and one fsync


def measure_edits(
    store: Store, manifest: Manifest, pairs: Pairs, queries: np.ndarray, k: int, repeats: int
) -> dict[str, Any]:
    """Add pairs in batches, each on disk before the next; then search with all and without any.

    Returns adds per second, and per batch size the rates and how much slower the edited search is.
    """
    journal = store.journal_path(manifest.name, manifest.version)
    adds = []
    for _ in range(repeats):
        journal.unlink(missing_ok=True)
        editor = Editor.open(store, manifest.name, manifest.version, encoder=manifest.encoder)
        base, seconds = editor.snapshot, _add_pairs(editor, pairs)
        adds.append(len(pairs) / seconds)
        editor.close()
    edited = editor.snapshot
    edited.retrieve(queries, "image", k)  # read every page that a query touches into memory
    searches = {
        "base": lambda batch: base.retrieve(batch, "image", k),
        "edited": lambda batch: edited.retrieve(batch, "image", k),
    }
    slowed = {
        f"batch_{batch}": compare_rates(
            queries_per_second(searches, queries, batch, repeats), {"slowed": ("base", "edited")}
        )
        for batch in BATCHES
    }
    journal.unlink()
    return {"durable_adds_per_s": median(adds), "slowest_adds_per_s": round(min(adds), 1), **slowed}


def _add_pairs(editor: Editor, pairs: Pairs) -> float:
    """Seconds to add all pairs."""
    begun = time.perf_counter()
    for start in range(0, len(pairs), PAIRS_PER_EDIT):
        editor.put(pairs.take(np.arange(start, start + PAIRS_PER_EDIT)))
    return time.perf_counter() - begun
