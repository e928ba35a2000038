"""Benchmarks: their synthetic data, and the verdicts they print."""

from pathlib import Path

import numpy as np

from index_store.benchmarks.constants import table
from index_store.benchmarks.editing import measure_edits
from index_store.benchmarks.memory import verdicts
from index_store.benchmarks.synthetic import SyntheticPairs
from index_store.build.build import build_version
from index_store.store import Store
from index_store.tests.support.small import ENCODER


def test_the_collection_is_reproducible_and_contains_no_query() -> None:
    one, two = SyntheticPairs(700, 48), SyntheticPairs(700, 48)
    np.testing.assert_array_equal(one.rows["text"], two.rows["text"])
    (block,) = one.blocks()  # Pairs checks that the rows have unit length
    assert (len(block), block.ids[-1]) == (700, "item-000000699")
    near = one.queries("image", 50) @ block.image.astype(np.float32).T
    assert 0.5 < near.max(axis=1).mean() < 0.99
    assert near.max() < 0.9999


def test_missed_targets_are_reported() -> None:
    rates = {"retrieve_vs_flat": 11.0, "retrieve_vs_bare": 0.89}
    report = {
        "search": {"recall_at_10": 0.99, "batch_1": rates, "batch_32": rates},
        "edits": {"durable_adds_per_s": 499.0, "batch_1": {"slowed": 1.15}, "batch_32": {"slowed": 1.16}},
        "open": {"seconds": 2.0},
        "resident": {"of_allowed": 1.0},
        "build": {"speed_vs_bare": 0.5},
    }
    missed = [row["figure"] for row in verdicts(report) if not row["reached"]]
    assert missed == [
        "retrieve / bare, batch_1",
        "retrieve / bare, batch_32",
        "slowed by a delta, batch_32",
        "durable adds per s",
    ]


def test_measuring_edits_leaves_no_edit(tmp_path: Path) -> None:
    collection, store = SyntheticPairs(3000, 32), Store(tmp_path)
    manifest = build_version(
        store, "b", "v", collection.blocks(), encoder=ENCODER, kinds={"image": "vector", "text": "vector"}, index="Flat"
    )
    store.activate("b", "v")
    found = measure_edits(
        store, manifest, collection.additional_pairs(300), collection.queries("image", 64), k=5, repeats=1
    )
    assert found["durable_adds_per_s"] > 10
    assert 0.2 < found["batch_1"]["slowed"] < 20
    assert store.count_edits("b", "v") == 0


def test_the_tables_grow_with_the_pairs() -> None:
    ns = {"flat32": 1.0, "flat16": 1.0, "list16": 1.0, "pq": 1.0, "gather": 1.0}
    rows = table({"cpu_ns": {"512": ns, "768": ns}, "disk": {"read_us_of_32": 50.0}}).splitlines()
    assert len(rows) == 2 + 3 * 2 * 4
    flat = [row for row in rows if "| flat fp16 |" in row and "| 512 |" in row]
    assert [row.split(" | ")[6] for row in flat] == ["1.00", "100.00", "1,000.00"]
    assert ["2.05 GB" in flat[0], "205 GB" in flat[1], "2.05 TB" in flat[2]] == [True] * 3
