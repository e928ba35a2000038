"""What the benchmarks stand on: their data, and the verdicts they print."""

import numpy as np

from index_store.benchmarks.constants import table
from index_store.benchmarks.memory import verdicts
from index_store.benchmarks.synthetic import Collection


def test_the_collection_is_the_same_each_time_and_its_queries_are_not_in_it() -> None:
    one, two = Collection(700, 48), Collection(700, 48)
    np.testing.assert_array_equal(one.rows["text"], two.rows["text"])
    (block,) = one.blocks()  # Pairs checks that the rows are unit
    assert (len(block), block.ids[-1]) == (700, "item-000000699")
    near = one.queries("image", 50) @ block.image.astype(np.float32).T
    assert 0.5 < near.max(axis=1).mean() < 0.99
    assert near.max() < 0.9999


def test_a_missed_target_is_called_so() -> None:
    rates = {"retrieve_vs_flat": 11.0, "retrieve_vs_bare": 0.89}
    report = {
        "search": {"recall_at_10": 0.99, "batch_1": rates, "batch_32": rates},
        "open": {"seconds": 2.0},
        "resident": {"of_allowed": 1.0},
        "build": {"speed_vs_bare": 0.5},
    }
    missed = [figure for figure, *_, reached in verdicts(report) if not reached]
    assert missed == ["retrieve / bare, batch 1", "retrieve / bare, batch 32"]


def test_the_tables_grow_with_the_pairs() -> None:
    ns = {"flat32": 1.0, "flat16": 1.0, "list16": 1.0, "pq": 1.0, "gather": 1.0}
    rows = table({"cpu_ns": {"512": ns, "768": ns}, "disk": {"read_us_of_32": 50.0}}).splitlines()
    assert len(rows) == 2 + 3 * 2 * 4
    flat = [row for row in rows if "| flat fp16 |" in row and "| 512 |" in row]
    assert [row.split(" | ")[6] for row in flat] == ["1.00", "100.00", "1,000.00"]
    assert ["2.05 GB" in flat[0], "205 GB" in flat[1], "2.05 TB" in flat[2]] == [True] * 3
