"""What online edits cost: durable adds per second, and searches with a tail of them beside searches without."""

import time
from typing import Any

import numpy as np

from index_store.benchmarks.turns import BATCHES, compare_rates, median, queries_per_second
from index_store.editor import Editor
from index_store.storage.manifest import Manifest
from index_store.store import Store
from index_store.types import Pairs

ADDED = 10_000
AT_ONCE = 100  # pairs of one edit: one record in the journal, one fsync


def measure_edits(
    store: Store, manifest: Manifest, pairs: Pairs, queries: np.ndarray, k: int, repeats: int
) -> dict[str, Any]:
    """Pairs with ready embeddings added, each batch on the disk before the next; then the search that sees them all against the base's."""
    journal = store.journal_path(manifest.name, manifest.version)
    adds = []
    for _ in range(repeats):
        journal.unlink(missing_ok=True)
        editor = Editor.open(store, manifest.name, manifest.version, encoder=manifest.encoder)
        base, seconds = editor.snapshot, _added(editor, pairs)
        adds.append(len(pairs) / seconds)
        editor.close()
    edited = editor.snapshot
    edited.retrieve(queries, "image", k)  # every page that a query touches is in memory from here on
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


def _added(editor: Editor, pairs: Pairs) -> float:
    """Seconds to add them all."""
    begun = time.perf_counter()
    for start in range(0, len(pairs), AT_ONCE):
        editor.put(pairs.take(np.arange(start, start + AT_ONCE)))
    return time.perf_counter() - begun
