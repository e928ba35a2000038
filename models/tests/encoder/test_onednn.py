"""Packed layers compared with the same layers of torch and the same models of open_clip."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.encoder.encoder import Encoder, EncoderSpec
from models.encoder.onednn import PackedAttention, PackedLinear
from models.tests.conftest import MOBILENET, VIT
from models.tests.small import picture

TEXTS = ["a cat", "", "two dogs on a beach with a very long tail that goes on and on", "lemon"]
MODELS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "mobile": MOBILENET,
    "quick": {**VIT, "quick_gelu": True},
    "tanh": {**VIT, "vision_cfg": {**VIT["vision_cfg"], "act_kwargs": {"approximate": "tanh"}}},  # type: ignore[dict-item]
    "scaled": {**VIT, "vision_cfg": {**VIT["vision_cfg"], "ls_init_value": 0.1}},  # type: ignore[dict-item]
    "projected": {**VIT, "text_cfg": {**VIT["text_cfg"], "proj_bias": True}, "custom_text": True},  # type: ignore[dict-item]
    "two-way": {
        **VIT,
        "vision_cfg": {**MOBILENET["vision_cfg"], "timm_model_name": "vit_tiny_patch16_224", "image_size": 224},  # type: ignore[dict-item]
        "text_cfg": {**VIT["text_cfg"], "no_causal_mask": True, "pool_type": "last", "proj_bias": True},  # type: ignore[dict-item]
        "custom_text": True,
    },
}


def load_encoder(folder: Path, name: str, *, packed: bool, precision: Any = "fp32") -> Encoder:
    """An encoder with the same random weights in every call."""
    path = folder / f"{name}-to-pack.json"
    path.write_text(json.dumps(MODELS[name]))
    return Encoder.load(EncoderSpec(str(path), "random", precision, "cpu", packed=packed))


def min_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float((ours.astype(np.float64) * theirs).sum(1).min())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_packed_encoders_give_the_vectors_of_unpacked_ones(name: str, tmp_path: Path) -> None:
    ours, theirs = (load_encoder(tmp_path, name, packed=packed) for packed in (True, False))
    assert ours.fingerprint == theirs.fingerprint
    assert any(isinstance(module, PackedLinear) for module in ours.module.modules())
    assert not any(type(module) is nn.Linear for module in ours.module.modules())
    images, texts = np.stack([theirs.preprocess(picture(seed, 90, 70)) for seed in range(5)]), theirs.tokenize(TEXTS)
    for rows in (1, 3, len(images)):
        mine, own = ours.encode(images[:rows], "image"), theirs.encode(images[:rows], "image")
        assert min_cosine(mine.vectors, own.vectors) > 0.99999
        if own.trunk is not None:
            assert mine.trunk is not None
            assert min_cosine(mine.trunk, own.trunk) > 0.99999
    for rows in (1, len(texts)):
        assert (
            min_cosine(ours.encode(texts[:rows], "text").vectors, theirs.encode(texts[:rows], "text").vectors) > 0.99999
        )


def test_all_attention_layers_of_a_clip_model_are_packed(tmp_path: Path) -> None:
    module = load_encoder(tmp_path, "vit", packed=True).module
    assert sum(isinstance(part, PackedAttention) for part in module.modules()) == 4
    assert not any(isinstance(part, nn.MultiheadAttention) for part in module.modules())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_packed_half_precision_gives_vectors_similar_to_float32(precision: str, tmp_path: Path) -> None:
    exact = load_encoder(tmp_path, "vit", packed=False)
    pixels = np.stack([exact.preprocess(picture(seed, 90, 70)) for seed in range(3)])
    wanted = exact.encode(pixels, "image").vectors
    assert (
        min_cosine(
            load_encoder(tmp_path, "vit", packed=True, precision=precision).encode(pixels, "image").vectors, wanted
        )
        > 0.999
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "one", "per text and head"])
def test_packed_attention_equals_torchs(batch_first: bool, masks: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(24, 3, batch_first=batch_first).eval().requires_grad_(False)
    x = torch.randn(2, 5, 24) if batch_first else torch.randn(5, 2, 24)
    causal = torch.full((5, 5), float("-inf")).triu(1)
    mask = {"none": None, "one": causal, "per text and head": causal + torch.randn(2 * 3, 5, 5)}[masks]
    own = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
    assert torch.allclose(PackedAttention(attention)(x, x, x, need_weights=False, attn_mask=mask)[0], own, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    bias=st.booleans(),
    gelu=st.sampled_from([None, "none", "tanh"]),
)
def test_a_packed_linear_layer_equals_torchs_for_any_shape(
    shape: list[int], width: int, out: int, bias: bool, gelu: str | None
) -> None:
    torch.manual_seed(width)
    linear, x = nn.Linear(width, out, bias=bias).requires_grad_(False), torch.randn(*shape, width)
    own = linear(x) if gelu is None else F.gelu(linear(x), approximate=gelu)
    packed = PackedLinear(linear.weight, linear.bias, None if gelu is None else nn.GELU(gelu))
    assert torch.allclose(packed(x), own, atol=1e-5)
