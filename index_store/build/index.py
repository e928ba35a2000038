"""Choosing, training and writing the indexes of a version, each choice by measurement."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_store.build.tuning import MeasuredSetting, RelativeTimer, estimate_flat, find_fewest_probes
from index_store.errors import RecallTooLow, RecipeRefused, faiss_message
from index_store.float16 import to_float32
from index_store.search.probes import RECALL_K, ProbeQueries
from index_store.search.shard import BLOCK_ROWS, Shard, keys_file
from index_store.search.sharded import ShardedIndex
from index_store.storage.atomic import translate_write_errors
from index_store.storage.manifest import Manifest, index_file
from index_store.types import SIDES, Side

AUTO, FLAT = "auto", "Flat"
# up to here an exact search of 512-wide rows takes a few milliseconds of a core
FLAT_PAIRS = 50_000
# flat rows are float32 in memory: above this, lists are used even where they are no faster
MAX_FLAT_PAIRS = 2_000_000
SMALL_SHARD = 5_000  # a last shard this short is not worth lists of its own
REMEDY = "try auto, Flat, SQfp16 or IVF1024,SQfp16"
TRAIN_ROWS_PER_LIST = 64  # faiss warns below 39 and gains little above
# at least, for what else is learned: the 256 codes of a product quantizer want 39 rows each
TRAIN_ROWS = 1 << 14
# lists this many times faster than a flat search are good enough: finer ones build much longer
ENOUGH_SPEEDUP = 16


@dataclass(frozen=True, slots=True)
class IndexedShards:
    """Indexes on disk and their measurements; `best` is the setting that serves."""

    recipe: str
    files: list[str]
    probe_queries: Mapping[Side, ProbeQueries]
    best: MeasuredSetting
    curve: list[MeasuredSetting]


def candidate_recipes(asked: str, shard: int, memory: int) -> list[str]:
    """Faiss factory strings to try, the cheapest to build first: the given one, or for "auto" by
    number of pairs.

    "auto" is exact, or has about sqrt(N) lists, or four times as many. Rows are float16 as stored:
    the scores of "IVF…,Flat" from half the bytes in half the time, since search is bound by memory
    bandwidth.
    """
    if asked != AUTO:
        return [asked]
    if memory <= FLAT_PAIRS or shard < SMALL_SHARD:
        return [FLAT]
    lists = 1 << shard.bit_length() // 2
    return [f"IVF{lists},SQfp16", f"IVF{4 * lists},SQfp16"]


def check_recipe(asked: str, widths: Sequence[int]) -> None:
    """Raise RecipeRefused before hours of encoding.

    widths: Dk of each side.
    """
    for width in widths:
        empty_index(FLAT if asked == AUTO else asked, width)


def index_version(work: Path, draft: Manifest) -> tuple[Manifest, list[str]]:
    """Index every shard under `work` and store probe queries.

    Returns the draft with `index` and `recall` as measured, and the files written. Raises
    RecipeRefused, RecallTooLow.
    """
    try:
        done = _index_first_shard(work, draft)
        if len(draft.shards) > 1:
            done = _index_other_shards(work, draft, done)
    # a recipe that faiss makes, and then does not add to or search as others
    except RuntimeError as error:
        raise RecipeRefused(
            f"{draft.index['asked']} cannot be filled or searched ({faiss_message(error)}): {REMEDY}"
        ) from error
    floor = draft.recall["floor"]
    if done.best.worse_recall < floor:
        side = min(SIDES, key=done.best.recall.__getitem__)
        raise RecallTooLow(
            f"{done.recipe} finds {done.best.worse_recall:.4f} of the {side} side's best {RECALL_K}, the floor is {floor}: "
            "take a finer recipe, auto, or a lower floor"
        )
    with translate_write_errors("probes"):
        names = [name for side in SIDES for name in done.probe_queries[side].write(work, side)]
    curve = [point.manifest_entry() for point in done.curve]
    index = {"asked": draft.index["asked"], "recipe": done.recipe, "probes": done.best.probes, "curve": curve}
    recall = {
        **draft.recall,
        "k": min(RECALL_K, draft.pairs),
        **{str(side): share for side, share in done.best.recall.items()},
    }
    return dataclasses.replace(draft, index=index, recall=recall), [*done.files, *names]


def _index_first_shard(work: Path, draft: Manifest) -> IndexedShards:
    """Try the candidates on the first shard until one is fast enough; keep the fastest, or none
    where a flat search is as fast.
    """
    floor, shard = draft.recall["floor"], draft.shards[0]
    recipe, *finer = candidate_recipes(draft.index["asked"], shard["pairs"], draft.pairs)
    files = _write_indexes(work, draft, shard, recipe)
    indexes = _open_indexes(work, draft, [shard], files)
    probe_queries = _sample_probe_queries(indexes)
    timer = RelativeTimer(indexes, probe_queries)
    flat = [] if recipe == FLAT else [estimate_flat(indexes, timer, FLAT)]
    limit = flat[0].ms if finer and draft.pairs <= MAX_FLAT_PAIRS else math.inf
    best, points = find_fewest_probes(indexes, probe_queries, timer, recipe, floor=floor, limit_ms=limit)
    done = IndexedShards(recipe, files, probe_queries, best, [*flat, *points])
    if finer and (best.lower_bound < floor or best.ms * ENOUGH_SPEEDUP > flat[0].ms):
        done = _try_more_lists(work, draft, done, timer, finer[0], limit)
    if finer and (done.best.worse_recall < floor or done.best.ms >= limit):
        done = _remove_indexes(work, done)
    return done


def _try_more_lists(
    work: Path, draft: Manifest, coarse: IndexedShards, timer: RelativeTimer, recipe: str, limit_ms: float
) -> IndexedShards:
    """Try more lists on the first shard; rebuild the coarser index where that was faster."""
    shard, floor = draft.shards[0], draft.recall["floor"]
    files = _write_indexes(work, draft, shard, recipe)
    best, points = find_fewest_probes(
        _open_indexes(work, draft, [shard], files), coarse.probe_queries, timer, recipe, floor=floor, limit_ms=limit_ms
    )
    fine = IndexedShards(recipe, files, coarse.probe_queries, best, points)
    faster = min(coarse, fine, key=lambda tried: (tried.best.lower_bound < floor, tried.best.ms))
    if faster is coarse:
        # training is seeded: the same index as before
        _write_indexes(work, draft, shard, coarse.recipe)
    return dataclasses.replace(faster, curve=[*coarse.curve, *points])


def _remove_indexes(work: Path, done: IndexedShards) -> IndexedShards:
    """Remove the index files: a shard without them is searched flat."""
    for name in done.files:
        (work / name).unlink()
    return dataclasses.replace(done, recipe=FLAT, files=[], best=done.curve[0])


def _index_other_shards(work: Path, draft: Manifest, first: IndexedShards) -> IndexedShards:
    """Index the other shards with the first shard's recipe, then measure all shards together."""
    files = list(first.files)
    for shard in draft.shards[1:]:
        recipe = _recipe_for_shard(draft, shard, first.recipe)
        files += _write_indexes(work, draft, shard, recipe, may_stay_flat=shard is draft.shards[-1])
    indexes = _open_indexes(work, draft, draft.shards, files)
    probe_queries = _sample_probe_queries(indexes)
    timer = RelativeTimer(indexes, probe_queries)
    best, points = find_fewest_probes(indexes, probe_queries, timer, first.recipe, floor=draft.recall["floor"])
    flat = [] if first.recipe == FLAT else [estimate_flat(indexes, timer, FLAT)]
    return IndexedShards(first.recipe, files, probe_queries, best, [*flat, *points])


def _recipe_for_shard(draft: Manifest, shard: Mapping[str, Any], recipe: str) -> str:
    """The first shard's recipe, with the number of lists that fits this shard; the last one may be
    short.
    """
    asked = draft.index["asked"]
    if asked != AUTO or recipe == FLAT:
        return recipe
    nth = candidate_recipes(asked, draft.shards[0]["pairs"], draft.pairs).index(recipe)
    fitting = candidate_recipes(asked, shard["pairs"], draft.pairs)
    return fitting[min(nth, len(fitting) - 1)]


def _sample_probe_queries(indexes: Mapping[Side, ShardedIndex]) -> dict[Side, ProbeQueries]:
    return {side: ProbeQueries.sample(indexes[side]) for side in SIDES}


def _open_indexes(
    work: Path, draft: Manifest, shards: Sequence[Mapping[str, Any]], files: Sequence[str]
) -> dict[Side, ShardedIndex]:
    """Open shards as a reader would, with the index files written so far."""
    known = dataclasses.replace(draft, files={**draft.files, **{file: {} for file in files}})
    opened = [Shard(work, shard["folder"], shard["pairs"], known) for shard in shards]
    return {side: ShardedIndex(opened, side) for side in SIDES}


def _write_indexes(
    work: Path, draft: Manifest, shard: Mapping[str, Any], recipe: str, *, may_stay_flat: bool = False
) -> list[str]:
    """Write one index per side of one shard; returns the file names."""
    names = []
    for side in SIDES:
        file = work / shard["folder"] / keys_file(side, draft.key_kind(side))
        keys = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        names += _write_index(file.parent, side, keys, recipe, may_stay_flat=may_stay_flat)
    return names


def _write_index(path: Path, side: Side, keys: np.ndarray, recipe: str, *, may_stay_flat: bool) -> list[str]:
    """Train and write one index; returns its file name, or [] where the rows are searched flat.

    keys: (N, Dk) float16.  may_stay_flat: leave a shard with too few rows to train on flat.
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
    """An untrained faiss index of the recipe. Raises RecipeRefused."""
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
