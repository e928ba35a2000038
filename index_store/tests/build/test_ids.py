import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_store.build.ids import SeenIds
from index_store.errors import PairsRefused


@given(st.lists(st.lists(st.integers(-30, 30), max_size=6), max_size=12), st.booleans())
def test_agrees_with_a_set(blocks: list[list[int]], words: bool) -> None:
    seen, known = SeenIds(), set[int]()
    for block in blocks:
        ids = np.array([f"ä{i}" for i in block] if words else block, np.str_ if words else np.int64)
        twice = len(set(block)) < len(block) or known & set(block)
        if twice:
            with pytest.raises(PairsRefused, match="comes twice"):
                seen.add(ids)
            return
        seen.add(ids)
        known |= set(block)


def test_words_of_every_length_and_ids_as_stored() -> None:
    seen = SeenIds()
    seen.add(np.array(["a", "b" * 200]))
    seen.add(np.array([b"c", b"dd"]))
    with pytest.raises(PairsRefused, match="id 'dd' comes twice"):
        seen.add(np.array(["dd"]))


def test_runs_stay_few() -> None:
    seen = SeenIds()
    for start in range(0, 100_000, 100):
        seen.add(np.arange(start, start + 100))
    assert len(seen._runs) < 12
    assert sum(map(len, seen._runs)) == 100_000
