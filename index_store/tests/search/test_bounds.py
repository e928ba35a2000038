import numpy as np
import pytest

from index_store.search.projection_bounds import WIDTH_REDUCTION, BoundProjection, inner_products
from index_store.tests.support.small import normalize, unit_rows


def rows_of(kind: str, n: int = 600, width: int = 64) -> np.ndarray:
    if kind == "everywhere":
        return unit_rows(n, width, 1)
    if kind == "few directions":
        rng = np.random.default_rng(2)
        return normalize(
            rng.standard_normal((n, 6)) @ rng.standard_normal((6, width)) + 0.05 * rng.standard_normal((n, width))
        )
    return np.repeat(unit_rows(1, width, 3), n, axis=0)


@pytest.mark.parametrize("kind", ["everywhere", "few directions", "all the same"])
def test_a_bound_is_never_below_the_score(kind: str) -> None:
    rows = rows_of(kind)
    projection = BoundProjection(rows[:300])
    for queries in (rows, unit_rows(200, 64, 9), 40 * rows[:50], -rows, np.zeros((1, 64), np.float32)):
        bounds = projection.project(queries) @ projection.project(rows).T
        assert bounds.dtype == np.float32
        assert (bounds >= queries @ rows.T).all()


def test_bounds_are_tight_where_rows_differ_in_few_directions() -> None:
    rows = rows_of("few directions")
    projection = BoundProjection(rows)
    assert projection.width == 64 // WIDTH_REDUCTION + 1
    assert (projection.project(rows) @ projection.project(rows).T - rows @ rows.T).mean() < 0.03


@pytest.mark.parametrize("width", [1, 7, 8])
def test_bounds_of_narrow_rows(width: int) -> None:
    rows = unit_rows(50, width, 0)
    projection = BoundProjection(rows)
    assert (projection.project(rows) @ projection.project(rows).T >= rows @ rows.T - 1e-6).all()


@pytest.mark.parametrize(
    ("n", "width", "count"), [(0, 8, 2), (5, 8, 0), (1000, 65, 1), (1023, 512, 33), (40, 9000, 70)]
)
def test_inner_products_in_blocks(n: int, width: int, count: int) -> None:
    rows, queries = unit_rows(n, width, 0), unit_rows(count, width, 1)
    found = inner_products(rows, queries)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows @ queries.T, atol=1e-6)
