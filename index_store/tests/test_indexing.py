import pytest

from index_store.errors import RecipeRefused
from index_store.indexing import check_recipe, recipe_for


@pytest.mark.parametrize(
    ("shard", "memory", "recipe"),
    [
        (1, 1, "Flat"),
        (50_000, 50_000, "Flat"),
        (50_001, 50_001, "IVF256,Flat"),
        (65_536, 65_536, "IVF256,Flat"),
        (1_000_000, 1_000_000, "IVF1024,Flat"),
        (1_000_000, 9_000_000, "IVF1024,Flat"),
        (30_000, 1_030_000, "IVF128,Flat"),
        (400, 1_000_400, "Flat"),
    ],
)
def test_auto_goes_by_size(shard: int, memory: int, recipe: str) -> None:
    assert recipe_for("auto", shard, memory) == recipe


def test_what_is_asked_for_is_taken() -> None:
    assert recipe_for("SQfp16", 3, 10**9) == "SQfp16"


def test_both_widths_must_suit() -> None:
    check_recipe("PQ8", [16, 24])
    with pytest.raises(RecipeRefused, match="'PQ8' is no faiss index over rows of width 20"):
        check_recipe("PQ8", [16, 20])
