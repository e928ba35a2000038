"""Fixed batch sizes compared with unpadded batches, with CUDA graphs where there is a GPU."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from index_store.types import Side
from models.encoder.cuda_graphs import FixedSizeRunner, GraphStream, fixed_batch_sizes
from models.encoder.encoder import Encoder, EncoderSpec
from models.tests.small import picture

TEXTS = ["a cat", "", "word " * 40, "two dogs on a beach", "lemon", "one two three four five six", "naïve café 🍎"]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS_GPU])]


def spec(configs: Path, name: str, **options: Any) -> EncoderSpec:
    return EncoderSpec(str(configs / f"{name}.json"), "random", **options)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["tinyvit", "tinymobile"])
def pair(request: pytest.FixtureRequest, configs: Path, device: str) -> tuple[Encoder, Encoder]:
    """The same encoder twice: with unpadded batches, and at fixed sizes of 1 to 6 items."""
    plain = Encoder.load(spec(configs, request.param, device=device, fixed_shapes="off"))
    return plain, Encoder.load(spec(configs, request.param, device=device, fixed_shapes="on", max_batch=6))


def make_batch(encoder: Encoder, side: Side, count: int) -> np.ndarray:
    if side == "text":
        return encoder.tokenize([TEXTS[i % len(TEXTS)] for i in range(count)])
    return np.stack([encoder.preprocess(picture(seed)) for seed in range(count)])


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 14])
def test_vectors_equal_those_of_the_unpadded_batch(pair: tuple[Encoder, Encoder], side: Side, count: int) -> None:
    plain, fixed = pair
    batch = make_batch(plain, side, count)
    expected, found = plain.encode(batch, side), fixed.encode(batch, side)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=2e-6)
    assert (found.trunk is None) is (expected.trunk is None)
    if expected.trunk is not None:
        np.testing.assert_allclose(found.key("trunk"), expected.trunk, atol=2e-6)
    assert fixed.fingerprint == plain.fingerprint


def test_rows_of_an_earlier_batch_in_the_padding_change_no_vector(pair: tuple[Encoder, Encoder]) -> None:
    _, fixed = pair
    batch = make_batch(fixed, "image", 6)
    first = fixed.encode(batch[:5], "image").vectors.copy()
    fixed.encode(255 - batch, "image")
    np.testing.assert_array_equal(fixed.encode(batch[:5], "image").vectors, first)


def test_returned_vectors_are_not_overwritten_by_the_next_batch(pair: tuple[Encoder, Encoder]) -> None:
    _, fixed = pair
    batch = make_batch(fixed, "image", 4)
    first = fixed.encode(batch[:2], "image").vectors
    kept = first.copy()
    fixed.encode(batch[2:], "image")
    np.testing.assert_array_equal(first, kept)


def test_concurrent_image_and_text_batches_give_the_right_vectors(pair: tuple[Encoder, Encoder]) -> None:
    plain, fixed = pair
    images, texts = make_batch(plain, "image", 5), make_batch(plain, "text", 5)
    expected = {"image": plain.encode(images, "image").vectors, "text": plain.encode(texts, "text").vectors}

    def max_error(turn: int) -> float:
        side: Side = "image" if turn % 2 else "text"
        rows = slice(turn % 4, turn % 4 + 1 + turn % 2)
        found = fixed.encode((images if turn % 2 else texts)[rows], side).vectors
        return float(np.abs(found - expected[side][rows]).max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(max_error, range(40))) < 2e-6


def test_the_function_is_called_with_few_shapes_in_constant_buffers(device: str) -> None:
    stream, calls = GraphStream(device), set()

    def double_and_sum(batch: torch.Tensor) -> list[torch.Tensor]:
        calls.add((tuple(batch.shape), batch.data_ptr()))
        return [batch * 2, batch.sum(1)]

    with torch.inference_mode():
        run = FixedSizeRunner(double_and_sum, torch.zeros(3, dtype=torch.int64), fixed_batch_sizes(4), stream)
        for count in range(12):
            rows = np.arange(3 * count).reshape(count, 3)
            twice, total = run(rows)
            np.testing.assert_array_equal(twice, rows * 2)
            np.testing.assert_array_equal(total, rows.sum(1))
    assert len(calls) == 4
    assert {shape for shape, _ in calls} == {(1, 3), (2, 3), (3, 3), (4, 3)}


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 32, 100])
def test_fixed_batch_sizes_end_at_the_largest_and_pad_by_less_than_half(largest: int) -> None:
    sizes = fixed_batch_sizes(largest)
    assert sizes[-1] == largest
    assert list(sizes) == sorted(set(sizes))
    for count in range(1, largest + 1):
        assert next(size for size in sizes if size >= count) < 1.5 * count


def test_a_text_tower_that_cannot_be_trimmed_runs_unpadded(tmp_path: Path) -> None:
    from models.tests.conftest import VIT

    text = {**VIT["text_cfg"], "no_causal_mask": True, "pool_type": "last"}  # type: ignore[dict-item]
    (tmp_path / "twoway.json").write_text(json.dumps({**VIT, "text_cfg": text, "custom_text": True}))
    plain, fixed = (
        Encoder.load(EncoderSpec(str(tmp_path / "twoway.json"), "random", device="cpu", fixed_shapes=shapes))
        for shapes in ("off", "on")
    )
    tokens = plain.tokenize(TEXTS)
    np.testing.assert_array_equal(fixed.encode(tokens, "text").vectors, plain.encode(tokens, "text").vectors)


@pytest.mark.cuda
@NEEDS_GPU
def test_on_a_gpu_every_batch_size_has_a_recorded_graph(configs: Path) -> None:
    auto = Encoder.load(spec(configs, "tinyvit", device="cuda", fixed_shapes="auto", max_batch=2))
    assert isinstance(auto._encode_images, FixedSizeRunner)
    assert all(shape._graph is not None for shape in auto._encode_images._buffers.values())
