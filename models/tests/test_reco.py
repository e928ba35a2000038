from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from index_store.errors import IncompatibleSnapshot
from index_store.search.filters import SearchParams
from index_store.snapshot import Snapshot
from index_store.types import Pairs, Side
from models.encoder.encoder import Encoded, Encoder
from models.errors import ConfigError
from models.fusion.checkpoint import training_free_fusions
from models.fusion.fusion import build_fusions
from models.reco import Reco
from models.tests.small import build_memory, picture, unit_rows

N = 40


@pytest.fixture(scope="module")
def pairs(encoder: Encoder) -> Pairs:
    rng = np.random.default_rng(0)
    image, text, key = (
        unit_rows(rng.standard_normal((N, width))) for width in (encoder.dim, encoder.dim, encoder.trunk_dim or 0)
    )
    records = [{"caption": f"caption {i}", "class": f"class {i % 4}"} for i in range(N)]
    return Pairs(np.array([f"id{i}" for i in range(N)]), image, text, records, image_key=key)


@pytest.fixture(scope="module")
def snapshot(pairs: Pairs, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A memory that compares images by trunk features, and texts by their vectors."""
    folder = tmp_path_factory.mktemp("store")
    return build_memory(folder, pairs, encoder.fingerprint, {"image": "trunk", "text": "vector"})


@pytest.fixture(scope="module")
def photos(encoder: Encoder) -> np.ndarray:
    return np.stack([encoder.preprocess(picture(seed)) for seed in range(5)])


def brute_force(
    encoded: Encoded, pairs: Pairs, side: Side, k: int, alpha: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """The rows (B, k) of the nearest pairs, and the training-free rule over their other side."""
    keys, values = (pairs.image_key, pairs.text) if side == "image" else (pairs.text, pairs.image)
    assert keys is not None
    queries = encoded.key("trunk" if side == "image" else "vector")
    rows = np.argsort(-(queries @ keys.astype(np.float16).astype(np.float32).T), axis=1)[:, :k]
    refined = encoded.vectors + alpha * values.astype(np.float16).astype(np.float32)[rows].mean(1)
    return rows, unit_rows(refined)


@pytest.mark.parametrize("side", ["image", "text"])
def test_embed_equals_encode_retrieve_fuse_by_brute_force(
    reco: Reco, snapshot: Snapshot, pairs: Pairs, photos: np.ndarray, side: Side
) -> None:
    batch = photos if side == "image" else reco.encoder.tokenize(["a", "b", "c", "d", "e"])
    encoded = reco.encode(batch, side)
    rows, refined = brute_force(encoded, pairs, side, k=4)
    found = reco.embed(batch, side, snapshot)
    assert found.neighbors is not None
    assert found.weights is not None
    np.testing.assert_array_equal(found.neighbors.ids, pairs.ids[rows])
    np.testing.assert_allclose(found.vectors, refined, atol=1e-5)
    np.testing.assert_array_equal(found.plain, encoded.vectors)
    np.testing.assert_allclose(found.weights, 0.25, atol=1e-6)
    assert found.enhanced.all()
    assert found.memory == snapshot.ref
    assert min(found.timings.encode, found.timings.retrieve, found.timings.fuse) > 0


def test_without_a_memory_the_vectors_stay_plain(reco: Reco, photos: np.ndarray) -> None:
    found = reco.embed(photos, "image", None)
    assert found.vectors is found.plain
    assert not found.enhanced.any()
    assert (found.neighbors, found.weights, found.memory) == (None, None, None)
    assert found.row(3).vectors.shape == (1, reco.encoder.dim)


def test_rows_of_one_batch_may_have_different_k(reco: Reco, snapshot: Snapshot, photos: np.ndarray) -> None:
    ks = np.array([1, 3, 2, 7, 1])
    together = reco.embed(photos, "image", snapshot, ks)
    assert together.neighbors is not None
    np.testing.assert_array_equal(together.neighbors.mask.sum(1), ks)
    for b, k in enumerate(ks):
        alone = reco.embed(photos[b : b + 1], "image", snapshot, int(k))
        one = together.row(b)
        assert one.neighbors is not None
        assert alone.neighbors is not None
        np.testing.assert_allclose(one.vectors, alone.vectors, atol=1e-6)
        assert one.neighbors.records(0) == alone.neighbors.records(0)
        np.testing.assert_array_equal(one.neighbors.ids[0, :k], alone.neighbors.ids[0])
        assert not one.neighbors.values[0, k:].any()
        assert not one.neighbors.scores[0, k:].any()


def test_excluded_and_too_similar_pairs_are_not_used(reco: Reco, snapshot: Snapshot, photos: np.ndarray) -> None:
    found = reco.embed(photos, "image", snapshot, 2)
    assert found.neighbors is not None
    first = found.neighbors.ids[:, 0].tolist()
    others = reco.embed(photos, "image", snapshot, 2, SearchParams(exclude=[{name} for name in first]))
    assert others.neighbors is not None
    np.testing.assert_array_equal(others.neighbors.ids[:, 0], found.neighbors.ids[:, 1])
    none_found = reco.embed(photos, "image", snapshot, 2, SearchParams(max_similarity=-1.0))
    np.testing.assert_array_equal(none_found.vectors, none_found.plain)  # bit for bit
    assert not none_found.enhanced.any()
    assert none_found.memory == snapshot.ref


def test_a_memory_of_another_encoder_is_refused(reco: Reco, pairs: Pairs, tmp_path: Path, photos: np.ndarray) -> None:
    foreign = build_memory(tmp_path, pairs, "other/model@ffffffffffff", {"image": "trunk", "text": "vector"})
    with pytest.raises(
        IncompatibleSnapshot, match=r"built by other/model@ffffffffffff, this service encodes with tinyvit/random@"
    ):
        reco.embed(photos, "image", foreign)


@pytest.mark.parametrize("k", [0, -1, 101, np.array([1, 2, 3, 0, 1]), np.array([1, 101, 1, 1, 1])])
def test_k_outside_the_range_of_the_fusion_is_refused(
    reco: Reco, snapshot: Snapshot, photos: np.ndarray, k: int | np.ndarray
) -> None:
    with pytest.raises(ConfigError, match="outside 1 to 100"):
        reco.embed(photos, "image", snapshot, k)


def test_a_fusion_of_another_width_or_k_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="width 64 cannot refine vectors of width 32"):
        Reco(encoder, training_free_fusions("mean", 64).fusions, "x", 10)
    with pytest.raises(ConfigError, match="k = 11 is outside 1 to 10"):
        Reco(encoder, build_fusions("paper", encoder.dim), "x", 11)


def test_each_row_is_the_batch_for_one_item(reco: Reco, snapshot: Snapshot, photos: np.ndarray) -> None:
    found = reco.embed(photos, "image", snapshot)
    assert found.neighbors is not None
    assert found.weights is not None
    for i in range(5):
        one = found.row(i)
        assert one.neighbors is not None
        assert one.weights is not None
        np.testing.assert_array_equal(one.vectors[0], found.vectors[i])
        np.testing.assert_array_equal(one.plain[0], found.plain[i])
        np.testing.assert_array_equal(one.weights[0], found.weights[i])
        assert one.neighbors.records(0) == found.neighbors.records(i)
        assert (one.memory, one.timings) == (found.memory, found.timings)


@pytest.mark.parametrize("enhanced", [False, True])
def test_label_vectors_are_the_mean_over_their_prompts(reco: Reco, snapshot: Snapshot, enhanced: bool) -> None:
    memory = snapshot if enhanced else None
    labels, templates = ["cat", "{odd} dog"], ["a {}.", "the {}, a {}!"]
    vectors = reco.embed_labels(labels, templates, memory, 3)
    for label, vector in zip(labels, vectors, strict=True):
        prompts = reco.encoder.tokenize([f"a {label}.", f"the {label}, a {label}!"])
        mean = torch.from_numpy(reco.embed(prompts, "text", memory, 3).vectors.mean(0))
        np.testing.assert_allclose(vector, normalize(mean, dim=0), atol=1e-6)
