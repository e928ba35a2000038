"""Choosing, training and measuring the indexes of a version."""

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from index_store.durable import writing
from index_store.errors import RecallTooLow, RecipeRefused
from index_store.pairs import SIDES, Side
from index_store.probes import DEPTH, Probes
from index_store.search import Fan
from index_store.shard import BLOCK_ROWS, index_file

FLAT_PAIRS = 50_000  # up to here an exact search of 512-wide rows stays within a few milliseconds of a core
SMALL_SHARD = 5_000  # a last shard this short is not worth lists of its own
TRAIN_ROWS_PER_LIST = 64  # faiss warns below 39 and gains little above
FLAT = "Flat"


def recipe_for(index: str, shard: int, memory: int) -> str:
    """The faiss factory string of a shard, as asked, or by the pairs of shard and memory where "auto": exact, or about sqrt(N) lists."""
    if index != "auto":
        return index
    return FLAT if memory <= FLAT_PAIRS or shard < SMALL_SHARD else f"IVF{1 << shard.bit_length() // 2},Flat"


def check_recipe(recipe: str, widths: Sequence[int]) -> None:
    """Refuse a recipe before hours of encoding rather than after.  widths: Dk of each side."""
    for width in widths:
        _empty(recipe, width)


def write_index(path: Path, side: Side, keys: np.ndarray, recipe: str, *, may_stay_flat: bool) -> list[str]:
    """Train and write one index; the names written, none where the rows are searched flat.

    keys: (N, Dk) float16.  may_stay_flat: a last, short shard with too few rows to train on is left flat.
    """
    if recipe == FLAT:
        return []
    index = _empty(recipe, keys.shape[1])
    try:
        index.train(_training_rows(keys, index))
    except RuntimeError as error:
        if may_stay_flat:
            return []
        raise RecipeRefused(f"{recipe} cannot be trained on {len(keys)} {side} rows: take fewer lists, or auto") from error
    for start in range(0, len(keys), BLOCK_ROWS):
        index.add(keys[start : start + BLOCK_ROWS].astype(np.float32))  # (BLOCK_ROWS, Dk)
    with writing(f"{path.name}/{index_file(side)}"):
        faiss.write_index(index, str(path / index_file(side)))
    return [f"{path.name}/{index_file(side)}"]


def measure(fans: dict[Side, Fan], floor: float, recipe: str) -> tuple[int, dict[Side, float], dict[Side, Probes]]:
    """(probes, recall per side, probe queries): the fewest lists to visit, a power of two, that reach the floor on both sides."""
    questions = {side: Probes.sample(fans[side]) for side in SIDES}
    lists = max(_lists(fans[side]) for side in SIDES)
    for probes in [1 << step for step in range(lists.bit_length())] if lists else [0]:
        recall = {side: questions[side].recall(fans[side], probes) for side in SIDES}
        if min(recall.values()) >= floor:
            return probes, recall, questions
    worst = min(SIDES, key=lambda side: recall[side])
    raise RecallTooLow(
        f"{recipe} finds {recall[worst]:.4f} of the {worst} side's best {DEPTH}, the floor is {floor}: take a finer recipe, or auto"
    )


def _empty(recipe: str, width: int) -> faiss.Index:
    try:
        return faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise RecipeRefused(f"{recipe!r} is no faiss index over rows of width {width}: try auto, Flat, SQfp16 or IVF1024,Flat") from error


def _training_rows(keys: np.ndarray, index: faiss.Index) -> np.ndarray:
    """(R, Dk) float32, a seeded sample of the rows."""
    inverted = faiss.try_extract_index_ivf(index)
    wanted = max(BLOCK_ROWS, TRAIN_ROWS_PER_LIST * (inverted.nlist if inverted is not None else 0))
    if wanted >= len(keys):
        return keys.astype(np.float32)
    rows = np.sort(np.random.default_rng(0).choice(len(keys), size=wanted, replace=False))
    return keys[rows].astype(np.float32)


def _lists(fan: Fan) -> int:
    """The most inverted lists of any shard's index, 0 where none has lists."""
    inverted = [faiss.try_extract_index_ivf(shard.indexes[fan.side]) for shard in fan.shards]
    return max((index.nlist for index in inverted if index is not None), default=0)
