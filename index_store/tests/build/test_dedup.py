from collections.abc import Iterator

import numpy as np
import pytest

from index_store.build import dedup
from index_store.build.dedup import Deduplicator
from index_store.build.source import Reject, SourceStep, StoredRows
from index_store.errors import PairsRefused
from index_store.tests.support.small import normalize, slice_pairs, some_pairs, unit_rows
from index_store.types import Pairs


def clustered(n: int, width: int = 16, seed: int = 0) -> Pairs:
    """Pairs of which many have twins: both sides lie near one of n/4 centres, or only one side
    does.
    """
    rng = np.random.default_rng(seed)
    pairs = some_pairs(n, width)
    centres = unit_rows(n // 4, width, seed + 1), unit_rows(n // 4, width, seed + 2)
    where = rng.integers(0, n // 4, n)
    elsewhere = np.where(rng.random(n) < 0.3, rng.integers(0, n // 4, n), where)
    far = rng.uniform(0.02, 0.3, (n, 1)) / np.sqrt(width)
    image = normalize(centres[0][where] + far * rng.standard_normal((n, width))).astype(np.float16)
    text = normalize(centres[1][elsewhere] + far * rng.standard_normal((n, width))).astype(np.float16)
    return Pairs(pairs.ids, image, text, pairs.records)


def steps(pairs: Pairs, size: int) -> Iterator[SourceStep]:
    for start in range(0, len(pairs), size):
        block = slice_pairs(pairs, slice(start, start + size))
        yield SourceStep(block, len(block) + 1, [Reject(f"bad-{start}", "no caption")])


def brute_force(pairs: Pairs, cosine: float) -> tuple[list[str], dict[str, str]]:
    """Ids kept, and for each one dropped its best twin among those kept before."""
    image, text = (normalize(rows.astype(np.float32)) for rows in (pairs.image, pairs.text))
    kept: list[int] = []
    dropped: dict[str, str] = {}
    for row in range(len(pairs)):
        both = np.minimum(image[kept] @ image[row], text[kept] @ text[row])
        if len(kept) and both.max() >= cosine - dedup.ROUNDING:
            dropped[pairs.ids[row]] = (
                f"near-duplicate of {pairs.ids[kept[int(both.argmax())]]} (cosine {min(both.max(), 1):.3f})"
            )
        else:
            kept.append(row)
    return [pairs.ids[row] for row in kept], dropped


@pytest.mark.parametrize("cosine", [0.9, 0.97, 0.99])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_as_brute_force_keeps_and_drops(cosine: float, size: int) -> None:
    pairs = clustered(400)
    kept, dropped = brute_force(pairs, cosine)
    found = list(Deduplicator(cosine).filter(steps(pairs, size)))
    assert [name for step in found if step.pairs is not None for name in step.pairs.ids.tolist()] == kept
    rejects = [reject for step in found for reject in step.rejects]
    assert {reject.item: reject.reason for reject in rejects if reject.reason != "no caption"} == dropped
    assert 20 < len(dropped) < 380
    assert sum(step.items for step in found) == 400 + len(found)
    assert [reject.item for reject in rejects if reject.reason == "no caption"] == [
        f"bad-{start}" for start in range(0, 400, size)
    ]


def test_equal_pairs_reach_a_cosine_of_one() -> None:
    pairs = some_pairs(20)
    again = np.array([f"again-{name}" for name in pairs.ids])
    image, text = np.tile(pairs.image, (2, 1)), np.tile(pairs.text, (2, 1))
    twice = Pairs(np.concatenate([pairs.ids, again]), image, text, [*pairs.records, *pairs.records])
    (step,) = Deduplicator(1.0).filter([SourceStep(twice, 40)])
    assert step.pairs is not None
    assert step.pairs.ids.tolist() == pairs.ids.tolist()
    assert step.rejects[3] == Reject("again-pair-3", "near-duplicate of pair-3 (cosine 1.000)")


def test_keys_of_their_own_and_records_stay_aligned() -> None:
    pairs = some_pairs(10, key_width=8)
    first, again = slice_pairs(pairs, slice(0, 4)), slice_pairs(pairs, slice(2, 10))
    deduplicator = Deduplicator(0.99)
    _, step = deduplicator.filter([SourceStep(first, 4), SourceStep(again, 8)])
    assert step.pairs is not None
    assert step.pairs.image_key is not None
    assert pairs.image_key is not None
    assert [record["caption"] for record in step.pairs.records] == [f"caption {i}" for i in range(4, 10)]
    np.testing.assert_array_equal(step.pairs.image_key, pairs.image_key[4:])
    assert len(deduplicator) == 10
    (last,) = deduplicator.filter([SourceStep(again, 8)])
    assert last.pairs is None


def test_what_was_restored_counts_as_kept() -> None:
    pairs = clustered(300)
    whole = list(Deduplicator(0.95).filter(steps(pairs, 50)))
    second = Deduplicator(0.95)
    second.restore(
        StoredRows(step.pairs.ids, step.pairs.image.astype(np.float16), step.pairs.text.astype(np.float16))
        for step in whole[:3]
        if step.pairs
    )
    rest = list(second.filter(list(steps(pairs, 50))[3:]))
    assert [step.rejects for step in rest] == [step.rejects for step in whole[3:]]


def test_beyond_the_exact_size_few_are_missed_and_none_is_wronged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "EXACT_PAIRS", 1000)
    monkeypatch.setattr(dedup, "LISTS", 32)
    monkeypatch.setattr(dedup, "PROBES", 4)
    pairs = clustered(6000)
    kept, dropped = brute_force(pairs, 0.95)
    found = list(Deduplicator(0.95).filter(steps(pairs, 256)))
    mine = {reject.item for step in found for reject in step.rejects if reject.reason != "no caption"}
    assert len(kept) > 1200
    assert len(mine & set(dropped)) >= 0.97 * len(dropped)


@pytest.mark.parametrize("cosine", [0.0, -0.5, 1.01, float("nan")])
def test_a_cosine_that_is_none_is_refused(cosine: float) -> None:
    with pytest.raises(PairsRefused, match="above 0 and be at most 1"):
        Deduplicator(cosine)
