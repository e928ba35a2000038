"""Choosing, training and writing the indexes of a version, each choice by measurement."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_store.build.tuning import Clock, Point, flat_point, settle
from index_store.errors import RecallTooLow, RecipeRefused, faiss_message
from index_store.float16 import to_float32
from index_store.search.probes import RECALL_K, ProbeQueries
from index_store.search.shard import BLOCK_ROWS, Shard, keys_file
from index_store.search.sharded import ShardedIndex
from index_store.storage.atomic import translate_write_errors
from index_store.storage.manifest import Manifest, index_file
from index_store.types import SIDES, Side

AUTO, FLAT = "auto", "Flat"
# up to here an exact search of 512-wide rows stays within a few milliseconds of a core
FLAT_PAIRS = 50_000
# flat rows are float32 in memory: beyond this, lists are kept even where they are no faster
FLAT_MOST = 2_000_000
SMALL_SHARD = 5_000  # a last shard this short is not worth lists of its own
REMEDY = "try auto, Flat, SQfp16 or IVF1024,SQfp16"
TRAIN_ROWS_PER_LIST = 64  # faiss warns below 39 and gains little above
# at least, for what else is learned: the 256 codes of a product quantizer want 39 rows each
TRAIN_ROWS = 1 << 14
CHEAP = (
    # lists this many times faster than a flat search need no finer ones, which take several times
    # as long to build
    16
)


@dataclass(frozen=True, slots=True)
class Indexed:
    """Indexes as they stand on disk, and what was measured of them: `best` is the setting that
    serves.
    """

    recipe: str
    files: list[str]
    questions: Mapping[Side, ProbeQueries]
    best: Point
    curve: list[Point]


def candidates(asked: str, shard: int, memory: int) -> list[str]:
    """Faiss factory strings to try, the cheapest to build first: what is asked for or, for "auto",
    by the pairs of shard and memory.

    Exact, or about sqrt(N) lists, and four times as many. Their rows are float16 as stored: the
    same scores as "IVF…,Flat" from half the bytes and, since a search waits for memory, in half the
    time.
    """
    if asked != AUTO:
        return [asked]
    if memory <= FLAT_PAIRS or shard < SMALL_SHARD:
        return [FLAT]
    lists = 1 << shard.bit_length() // 2
    return [f"IVF{lists},SQfp16", f"IVF{4 * lists},SQfp16"]


def check_recipe(asked: str, widths: Sequence[int]) -> None:
    """Refuse a recipe before hours of encoding rather than after.  widths: Dk of each side."""
    for width in widths:
        empty_index(FLAT if asked == AUTO else asked, width)


def index_version(work: Path, draft: Manifest) -> tuple[Manifest, list[str]]:
    """Index every shard under `work` and store probe queries; the draft with `index` and `recall`
    as measured, and the files written.
    """
    try:
        done = _first_shard(work, draft)
        if len(draft.shards) > 1:
            done = _other_shards(work, draft, done)
    # a recipe that faiss makes, and then does not add to or search as others
    except RuntimeError as error:
        raise RecipeRefused(
            f"{draft.index['asked']} cannot be filled or searched ({faiss_message(error)}): {REMEDY}"
        ) from error
    floor = draft.recall["floor"]
    if done.best.worst < floor:
        side = min(SIDES, key=done.best.recall.__getitem__)
        raise RecallTooLow(
            f"{done.recipe} finds {done.best.worst:.4f} of the {side} side's best {RECALL_K}, the floor is {floor}: "
            "take a finer recipe, auto, or a lower floor"
        )
    with translate_write_errors("probes"):
        names = [name for side in SIDES for name in done.questions[side].write(work, side)]
    curve = [point.described() for point in done.curve]
    index = {"asked": draft.index["asked"], "recipe": done.recipe, "probes": done.best.probes, "curve": curve}
    recall = {
        **draft.recall,
        "k": min(RECALL_K, draft.pairs),
        **{str(side): share for side, share in done.best.recall.items()},
    }
    return dataclasses.replace(draft, index=index, recall=recall), [*done.files, *names]


def _first_shard(work: Path, draft: Manifest) -> Indexed:
    """Try the candidates on the first shard until one is cheap; leave the faster one there, or none
    where a flat search is no slower.
    """
    floor, shard = draft.recall["floor"], draft.shards[0]
    recipe, *finer = candidates(draft.index["asked"], shard["pairs"], draft.pairs)
    files = _write_indexes(work, draft, shard, recipe)
    fans = _fans(work, draft, [shard], files)
    questions = _questions(fans)
    clock = Clock(fans, questions)
    flat = [] if recipe == FLAT else [flat_point(fans, clock, FLAT)]
    limit = flat[0].ms if finer and draft.pairs <= FLAT_MOST else math.inf
    best, points = settle(fans, questions, clock, recipe, floor=floor, limit_ms=limit)
    done = Indexed(recipe, files, questions, best, [*flat, *points])
    if finer and (best.sure < floor or best.ms * CHEAP > flat[0].ms):
        done = _finer(work, draft, done, clock, finer[0], limit)
    if finer and (done.best.worst < floor or done.best.ms >= limit):
        done = _flat(work, done)
    return done


def _finer(work: Path, draft: Manifest, coarse: Indexed, clock: Clock, recipe: str, limit_ms: float) -> Indexed:
    """Try more lists on the first shard, and go back to the fewer where these are not the
    faster.
    """
    shard, floor = draft.shards[0], draft.recall["floor"]
    files = _write_indexes(work, draft, shard, recipe)
    best, points = settle(
        _fans(work, draft, [shard], files), coarse.questions, clock, recipe, floor=floor, limit_ms=limit_ms
    )
    fine = Indexed(recipe, files, coarse.questions, best, points)
    faster = min(coarse, fine, key=lambda tried: (tried.best.sure < floor, tried.best.ms))
    if faster is coarse:
        # training is seeded: the same index as before
        _write_indexes(work, draft, shard, coarse.recipe)
    return dataclasses.replace(faster, curve=[*coarse.curve, *points])


def _flat(work: Path, done: Indexed) -> Indexed:
    """No lists after all: a shard without index files is searched flat."""
    for name in done.files:
        (work / name).unlink()
    return dataclasses.replace(done, recipe=FLAT, files=[], best=done.curve[0])


def _other_shards(work: Path, draft: Manifest, first: Indexed) -> Indexed:
    """The first shard's recipe for the others, and the whole memory measured: the curve is then of
    all shards together.
    """
    files = list(first.files)
    for shard in draft.shards[1:]:
        recipe = _likewise(draft, shard, first.recipe)
        files += _write_indexes(work, draft, shard, recipe, may_stay_flat=shard is draft.shards[-1])
    fans = _fans(work, draft, draft.shards, files)
    questions = _questions(fans)
    clock = Clock(fans, questions)
    best, points = settle(fans, questions, clock, first.recipe, floor=draft.recall["floor"])
    flat = [] if first.recipe == FLAT else [flat_point(fans, clock, FLAT)]
    return Indexed(first.recipe, files, questions, best, [*flat, *points])


def _likewise(draft: Manifest, shard: Mapping[str, Any], recipe: str) -> str:
    """The recipe of the first shard, in the size that suits another: a last shard may be short."""
    asked = draft.index["asked"]
    if asked != AUTO or recipe == FLAT:
        return recipe
    nth = candidates(asked, draft.shards[0]["pairs"], draft.pairs).index(recipe)
    fitting = candidates(asked, shard["pairs"], draft.pairs)
    return fitting[min(nth, len(fitting) - 1)]


def _questions(fans: Mapping[Side, ShardedIndex]) -> dict[Side, ProbeQueries]:
    return {side: ProbeQueries.sample(fans[side]) for side in SIDES}


def _fans(
    work: Path, draft: Manifest, shards: Sequence[Mapping[str, Any]], files: Sequence[str]
) -> dict[Side, ShardedIndex]:
    """Some shards opened as a reader would, searching the index files written so far."""
    known = dataclasses.replace(draft, files={**draft.files, **{file: {} for file in files}})
    opened = [Shard(work, shard["folder"], shard["pairs"], known) for shard in shards]
    return {side: ShardedIndex(opened, side) for side in SIDES}


def _write_indexes(
    work: Path, draft: Manifest, shard: Mapping[str, Any], recipe: str, *, may_stay_flat: bool = False
) -> list[str]:
    """One index per side of one shard; the names written."""
    names = []
    for side in SIDES:
        file = work / shard["folder"] / keys_file(side, draft.key_kind(side))
        keys = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        names += _write_index(file.parent, side, keys, recipe, may_stay_flat=may_stay_flat)
    return names


def _write_index(path: Path, side: Side, keys: np.ndarray, recipe: str, *, may_stay_flat: bool) -> list[str]:
    """Train and write one index; the names written, none where the rows are searched flat.

    keys: (N, Dk) float16.  may_stay_flat: a last, short shard with too few rows to train on is left
    flat.
    """
    if recipe == FLAT:
        return []
    index = empty_index(recipe, keys.shape[1])
    try:
        index.train(training_rows(keys, index))
    except RuntimeError as error:
        if may_stay_flat:
            return []
        raise RecipeRefused(
            f"{recipe} cannot be trained on {len(keys)} {side} rows: take fewer lists, or auto"
        ) from error
    for start in range(0, len(keys), BLOCK_ROWS):
        index.add(to_float32(keys[start : start + BLOCK_ROWS]))  # (BLOCK_ROWS, Dk)
    with translate_write_errors(f"{path.name}/{index_file(side)}"):
        faiss.write_index(index, str(path / index_file(side)))
    return [f"{path.name}/{index_file(side)}"]


def empty_index(recipe: str, width: int) -> faiss.Index:
    """What faiss makes of a recipe, untrained."""
    try:
        index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise RecipeRefused(f"{recipe!r} is no faiss index over rows of width {width}: {REMEDY}") from error
    if isinstance(index, faiss.IndexIDMap):
        raise RecipeRefused(
            f"{recipe!r} numbers its rows itself, which a shard does already: leave IDMap out, or {REMEDY}"
        )
    lists = faiss.try_extract_index_ivf(index)
    inner = None if lists is None else faiss.downcast_index(lists)
    if isinstance(inner, faiss.IndexIVFScalarQuantizer) and inner.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        # the rows are float16 already: less a centroid, they would be rounded once more
        inner.by_residual = False
    return index


def training_rows(keys: np.ndarray, index: faiss.Index) -> np.ndarray:
    """(R, Dk) float32, a seeded sample of the rows."""
    inverted = faiss.try_extract_index_ivf(index)
    wanted = max(TRAIN_ROWS, TRAIN_ROWS_PER_LIST * (inverted.nlist if inverted is not None else 0))
    if wanted >= len(keys):
        return to_float32(keys)
    rows = np.sort(np.random.default_rng(0).choice(len(keys), size=wanted, replace=False))
    return to_float32(keys[rows])
