"""Brute-force oracle of an edited memory: a dict of pairs, all compared by every search."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from index_store.search.filters import DEFAULT_PARAMS, SearchParams
from index_store.snapshot import Snapshot
from index_store.types import Id, Pairs, Side, other

SLACK = 4e-6  # scores this near may be ranked either way, since float32 sums depend on their order


class Oracle:
    """The live pairs by id, with the float32 values of their float16 rows."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs_by_id: dict[Id, dict[str, Any]] = {}
        self.put(pairs)

    def put(self, pairs: Pairs) -> None:
        columns = {
            "image": pairs.image,
            "text": pairs.text,
            "image_key": pairs.keys("image"),
            "text_key": pairs.keys("text"),
        }
        columns = {name: rows.astype(np.float16).astype(np.float32) for name, rows in columns.items()}
        for i, name in enumerate(pairs.ids.tolist()):
            self.pairs_by_id.pop(name, None)
            self.pairs_by_id[name] = {
                **{column: rows[i] for column, rows in columns.items()},
                "record": dict(pairs.records[i]),
            }

    def delete(self, ids: Sequence[Id]) -> list[Id]:
        """Remove pairs by id; returns the ids without a pair."""
        return [name for name in dict.fromkeys(ids) if self.pairs_by_id.pop(name, None) is None]

    def expected(
        self, query: np.ndarray, side: Side, *, ceiling: float, exclude: Collection[Id]
    ) -> list[tuple[float, Id]]:
        """(score, id) of every pair that one query may see, nearest first."""
        if not self.pairs_by_id:
            return []
        scores = zip(
            (np.stack([pair[f"{side}_key"] for pair in self.pairs_by_id.values()]) @ query).tolist(),
            self.pairs_by_id,
            strict=True,
        )
        allowed = [(score, name) for score, name in scores if score <= ceiling and name not in exclude]
        return sorted(allowed, key=lambda found: -found[0])

    def assert_agrees(
        self, snapshot: Snapshot, queries: np.ndarray, side: Side, k: int, params: SearchParams = DEFAULT_PARAMS
    ) -> None:
        """Assert that a search returns what brute force over these pairs returns."""
        assert len(snapshot) == len(self.pairs_by_id)
        found = snapshot.retrieve(queries, side, k, params)
        ceilings = np.broadcast_to(params.max_similarity, len(queries))
        for b, query in enumerate(queries):
            exclude = params.exclude[b] if params.exclude else ()
            every = np.array([score for score, _ in self.expected(query, side, ceiling=9, exclude=())])
            if (np.abs(every - ceilings[b]) < SLACK).any():
                continue  # at a threshold rounding may decide either way
            best = self.expected(query, side, ceiling=float(ceilings[b]), exclude=exclude)
            count = min(k, len(best))
            assert found.mask[b].tolist() == [True] * count + [False] * (k - count)
            np.testing.assert_allclose(found.scores[b, :count], [score for score, _ in best[:count]], atol=SLACK / 2)
            names = found.ids[b, :count].tolist()
            assert len(set(names)) == count
            near = {name for score, name in best if not count or score >= best[count - 1][0] - SLACK}
            assert set(names) <= near
            assert {name for score, name in best[:count] if score > best[count - 1][0] + SLACK} <= set(names)
            for i, (name, record) in enumerate(zip(names, found.records(b), strict=True)):
                np.testing.assert_array_equal(found.values[b, i], self.pairs_by_id[name][other(side)])
                assert record == {"id": name, **self.pairs_by_id[name]["record"]}
            assert not found.values[b, count:].any()
