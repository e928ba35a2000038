"""What an edited memory must be: a dict of pairs, searched by brute force."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from index_store.search.filters import DEFAULT_PARAMS, SearchParams
from index_store.snapshot import Snapshot
from index_store.types import Id, Pairs, Side, other

SLACK = 4e-6  # scores nearer than this may be ranked either way: float32 sums differ by order


class Oracle:
    """The surviving pairs, as float32 of what float16 holds."""

    def __init__(self, pairs: Pairs) -> None:
        self.there: dict[Id, dict[str, Any]] = {}
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
            self.there.pop(name, None)
            self.there[name] = {
                **{column: rows[i] for column, rows in columns.items()},
                "record": dict(pairs.records[i]),
            }

    def delete(self, ids: Sequence[Id]) -> list[Id]:
        """The ids that were not there."""
        return [name for name in dict.fromkeys(ids) if self.there.pop(name, None) is None]

    def expected(
        self, query: np.ndarray, side: Side, *, ceiling: float, exclude: Collection[Id]
    ) -> list[tuple[float, Id]]:
        """(score, id) of every pair that one query may see, nearest first."""
        if not self.there:
            return []
        scores = zip(
            (np.stack([pair[f"{side}_key"] for pair in self.there.values()]) @ query).tolist(), self.there, strict=True
        )
        allowed = [(score, name) for score, name in scores if score <= ceiling and name not in exclude]
        return sorted(allowed, key=lambda found: -found[0])

    def agrees(
        self, snapshot: Snapshot, queries: np.ndarray, side: Side, k: int, params: SearchParams = DEFAULT_PARAMS
    ) -> None:
        """Assert that a search returns what brute force over these pairs returns."""
        assert len(snapshot) == len(self.there)
        found = snapshot.retrieve(queries, side, k, params)
        ceilings = np.broadcast_to(params.max_similarity, len(queries))
        for b, query in enumerate(queries):
            exclude = params.exclude[b] if params.exclude else ()
            every = np.array([score for score, _ in self.expected(query, side, ceiling=9, exclude=())])
            if (np.abs(every - ceilings[b]) < SLACK).any():
                continue  # rounding may decide otherwise at a threshold
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
                np.testing.assert_array_equal(found.values[b, i], self.there[name][other(side)])
                assert record == {"id": name, **self.there[name]["record"]}
            assert not found.values[b, count:].any()
