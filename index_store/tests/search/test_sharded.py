"""Filtered searches against brute force, on memories with many near-duplicates."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_store.errors import QueryRefused
from index_store.search.filters import MAX_BROADCAST_IDS, SearchParams
from index_store.snapshot import Snapshot
from index_store.tests.support.small import normalize, open_memory, some_pairs, unit_rows
from index_store.types import Id, Pairs

N, D = 400, 8


def near_duplicates(ints: bool) -> Pairs:
    """Pairs half of whose images are near-copies of image 0, so that filters reject many rows."""
    plain = some_pairs(N, D, ints=ints)
    image = plain.image.copy()
    image[: N // 2] = normalize(image[0] + 0.02 * unit_rows(N // 2, D, 7)).astype(np.float16)
    return Pairs(plain.ids, image, plain.text, plain.records)


@pytest.fixture(scope="module", params=["flat", "flat shards", "lists", "ints"])
def memory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, Snapshot]:
    pairs = near_duplicates(request.param == "ints")
    index = "IVF4,Flat" if request.param == "lists" else "Flat"
    shard_pairs = 90 if request.param == "flat shards" else N
    return pairs, open_memory(tmp_path_factory.mktemp("store"), pairs, index=index, shard_pairs=shard_pairs)


def expected(
    pairs: Pairs, query: np.ndarray, k: int, ceiling: float, exclude: Collection[Id]
) -> tuple[list[Id], np.ndarray, bool]:
    """Ids and scores by brute force for one query, and whether a score is at the threshold.

    There, rounding may decide either way.
    """
    scores = (pairs.image @ query).astype(np.float64)
    close = bool((np.abs(scores - ceiling) < 1e-5).any())
    allowed = (scores <= ceiling) & ~np.isin(pairs.ids, list(exclude))
    rows = np.flatnonzero(allowed)
    rows = rows[np.argsort(-scores[rows], kind="stable")][:k]
    return pairs.ids[rows].tolist(), scores[rows], close


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_filtered_searches_agree_with_brute_force(memory: tuple[Pairs, Snapshot], data: st.DataObject) -> None:
    pairs, snapshot = memory
    batch, k = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 5, 20, N]))
    some = st.lists(st.integers(0, N - 1), max_size=30).map(lambda rows: pairs.ids[rows].tolist())
    exclude = data.draw(st.none() | st.lists(some, min_size=batch, max_size=batch))
    ceilings = data.draw(
        st.lists(st.sampled_from([np.inf, 0.9999, 0.97, 0.4, -0.2, -2.0]), min_size=batch, max_size=batch)
    )
    near = data.draw(st.booleans())
    queries = normalize(pairs.image[:batch] + 0.001) if near else unit_rows(batch, D, data.draw(st.integers(0, 50)))
    params = SearchParams(probes=4, exclude=exclude, max_similarity=np.array(ceilings, np.float32))
    found = snapshot.retrieve(queries, "image", k, params)
    for b in range(batch):
        ids, scores, close = expected(pairs, queries[b], k, ceilings[b], exclude[b] if exclude else ())
        if close:
            continue
        count = len(ids)
        assert found.mask[b].tolist() == [True] * count + [False] * (k - count)
        np.testing.assert_allclose(found.scores[b, :count], scores, atol=2e-6)
        assert (np.diff(found.scores[b, :count]) <= 0).all()
        assert not found.scores[b, count:].any()
        assert not found.values[b, count:].any()
        distinct = [
            i for i in range(count) if np.sum(np.abs(scores - scores[i]) < 4e-6) == 1 and scores[i] - scores[-1] > 4e-6
        ]
        assert [found.ids[b, i] for i in distinct] == [ids[i] for i in distinct]
        assert len(set(found.ids[b, :count].tolist())) == count
        assert not set(found.ids[b, :count].tolist()) & set(exclude[b] if exclude else ())
        of = {name: row for row, name in enumerate(pairs.ids.tolist())}
        np.testing.assert_array_equal(
            found.values[b, :count], pairs.text[[of[name] for name in found.ids[b, :count].tolist()]]
        )


def test_max_similarity_for_all_queries_or_per_query(memory: tuple[Pairs, Snapshot]) -> None:
    pairs, snapshot = memory
    queries = pairs.image[[0, 300]]
    one = snapshot.retrieve(queries, "image", 5, SearchParams(probes=4, max_similarity=0.5))
    assert (one.scores <= 0.5).all()
    assert one.mask.all()
    each = snapshot.retrieve(queries, "image", 5, SearchParams(probes=4, max_similarity=np.array([0.5, np.inf])))
    np.testing.assert_array_equal(each.ids[0], one.ids[0])
    assert each.ids[1, 0] == pairs.ids[300]


def test_more_filtered_rows_than_any_index_search_returns(tmp_path: Path) -> None:
    n = 6000
    pairs = some_pairs(n, D)
    image = pairs.image.copy()
    image[: n - 3] = image[0]
    snapshot = open_memory(tmp_path, Pairs(pairs.ids, image, pairs.text, pairs.records))
    found = snapshot.retrieve(image[:2], "image", 10, SearchParams(max_similarity=0.99))
    assert found.mask.sum(axis=1).tolist() == [3, 3]
    assert set(found.ids[0, :3].tolist()) == set(pairs.ids[-3:].tolist())


def test_exclusion_lists_below_and_above_the_broadcast_limit(tmp_path: Path) -> None:
    pairs = some_pairs(100, D)
    snapshot = open_memory(tmp_path, pairs)
    lists = [
        pairs.ids[:MAX_BROADCAST_IDS].tolist(),
        pairs.ids[: MAX_BROADCAST_IDS + 1].tolist(),
        [],
        pairs.ids[90:].tolist(),
    ]
    found = snapshot.retrieve(pairs.image[:4], "image", 20, SearchParams(exclude=lists))
    for row, names in enumerate(lists):
        allowed = ~np.isin(pairs.ids, names)
        scores = np.where(allowed, pairs.image.astype(np.float32) @ pairs.image[row].astype(np.float32), -9)
        assert found.ids[row].tolist() == pairs.ids[np.argsort(-scores)[:20]].tolist()


def test_all_ids_excluded(tmp_path: Path) -> None:
    pairs = some_pairs(12, D)
    snapshot = open_memory(tmp_path, pairs)
    params = SearchParams(exclude=[pairs.ids.tolist(), pairs.ids[:10].tolist()])
    found = snapshot.retrieve(pairs.image[:2], "image", 5, params)
    assert found.mask.sum(axis=1).tolist() == [0, 2]
    assert not found.values[0].any()


def test_unknown_ids_exclude_nothing(tmp_path: Path) -> None:
    words, numbers = (
        open_memory(tmp_path, some_pairs(9, D)),
        open_memory(tmp_path, some_pairs(9, D, ints=True), name="numbers"),
    )
    queries = some_pairs(9, D).image[:1]
    plain = words.retrieve(queries, "image", 3).ids[0].tolist()
    strange: list[Id] = ["pair-0" + "x" * 500, "pair-0\0", "\udc80", "", 7, 2**80, "pair"]
    assert words.retrieve(queries, "image", 3, SearchParams(exclude=[strange])).ids[0].tolist() == plain
    nearest = numbers.retrieve(queries, "image", 3).ids[0].tolist()
    assert nearest[0] == 0
    for none in ("00x", "0.0", "", "9" * 30, str(2**63), 2**80):
        assert numbers.retrieve(queries, "image", 3, SearchParams(exclude=[[none]])).ids[0].tolist() == nearest
    for zero in (0, "0"):  # a form can only send text
        assert numbers.retrieve(queries, "image", 2, SearchParams(exclude=[[zero]])).ids[0].tolist() == nearest[1:]


@pytest.mark.parametrize(
    "params",
    [
        SearchParams(exclude=[["a"]]),
        SearchParams(max_similarity=np.zeros(3)),
        SearchParams(max_similarity=np.zeros((2, 1))),
        SearchParams(max_similarity=float("nan")),
    ],
)
def test_parameters_that_do_not_fit_the_queries(memory: tuple[Pairs, Snapshot], params: SearchParams) -> None:
    with pytest.raises(QueryRefused, match="2 queries"):
        memory[1].retrieve(unit_rows(2, D, 0), "image", 3, params)


def test_a_stacked_batch_returns_what_each_query_alone_returns(memory: tuple[Pairs, Snapshot]) -> None:
    pairs, snapshot = memory
    queries = pairs.image[[0, 300, 1]].astype(np.float32)
    singles = [
        SearchParams(probes=4, max_similarity=0.5),
        SearchParams(probes=4, exclude=[[pairs.ids[300], pairs.ids[301]]]),
        SearchParams(probes=4, max_similarity=np.array([0.97]), exclude=[frozenset()]),
    ]
    stacked = snapshot.retrieve(queries, "image", 5, SearchParams.stack(singles))
    for b, single in enumerate(singles):
        alone = snapshot.retrieve(queries[b : b + 1], "image", 5, single)
        np.testing.assert_array_equal(stacked.ids[b], alone.ids[0])
        np.testing.assert_allclose(stacked.scores[b], alone.scores[0], atol=1e-6)


def test_queries_with_different_probes_are_not_stacked() -> None:
    with pytest.raises(ValueError, match="4, None"):
        SearchParams.stack([SearchParams(), SearchParams(probes=4)])
