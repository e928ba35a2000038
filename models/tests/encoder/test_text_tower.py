"""Trimmed texts compared with open_clip's own encode_text at the full context length."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from models.encoder.encoder import STARTER, Encoder, EncoderSpec
from models.encoder.text_tower import TrimmedText, build_text_encoder
from models.tests.conftest import VIT

TEXTS = [
    "a cat",
    "",
    "two dogs on a beach with a very long tail that goes on and on",
    "naïve café 🍎",
    "lemon",
    "x " * 100,
]
TOWERS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "plain": (True, {}, {}),
    "custom": (True, {}, {"custom_text": True}),
    "custom-eos": (True, {"pool_type": "eos", "eos_id": 49407, "proj_bias": True}, {"custom_text": True}),
    "no-projection": (True, {"proj_type": "none"}, {"custom_text": True}),
    "two-way": (False, {"no_causal_mask": True, "pool_type": "last"}, {"custom_text": True}),
    "two-way-argmax": (False, {"no_causal_mask": True}, {"custom_text": True}),
    "last": (False, {"pool_type": "last"}, {"custom_text": True}),
    "class-token": (False, {"embed_cls": True}, {"custom_text": True}),
}


@pytest.fixture(params=sorted(TOWERS))
def tower(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[bool, Any]:
    """Whether this kind of text tower can be trimmed, and an open_clip model that has one."""
    can_be_trimmed, text, rest = TOWERS[request.param]
    config = {**VIT, "text_cfg": {**VIT["text_cfg"], **text}, **rest}  # type: ignore[dict-item]
    path = tmp_path / f"tower-{request.param}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return can_be_trimmed, open_clip.create_model(path.stem).eval()


def min_cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(torch.cosine_similarity(ours.double(), theirs.double()).min())


def test_vectors_equal_open_clips_and_padding_is_left_out_where_possible(tower: tuple[bool, Any]) -> None:
    can_be_trimmed, model = tower
    tokens = open_clip.tokenize(TEXTS, context_length=16)
    encode = build_text_encoder(model)
    assert isinstance(encode, TrimmedText) is can_be_trimmed
    seen: list[int] = []
    transformer = getattr(model, "text", model).transformer
    with torch.inference_mode():
        own = model.encode_text(tokens)
        transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        for rows in ([0], [1, 4], [0, 4, 0, 3], list(range(len(TEXTS)))):
            assert min_cosine(encode(tokens[rows]), own[rows]) > 0.99999
    assert (seen[0] == len(["start", "a", "cat", "end"])) is can_be_trimmed


def test_long_texts_do_not_add_padding_to_short_ones(tower: tuple[bool, Any]) -> None:
    can_be_trimmed, model = tower
    if not can_be_trimmed:
        pytest.skip("this tower cannot be trimmed")
    tokens = open_clip.tokenize(["a cat"] * 20 + ["word " * 30] * 2, context_length=16)
    seen: list[tuple[int, ...]] = []
    getattr(model, "text", model).transformer.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
    )
    with torch.inference_mode():
        build_text_encoder(model)(tokens)
    assert seen == [(20, 4), (2, 16)]


@pytest.mark.parametrize("name", [str(STARTER), "ViT-B-32"])
def test_encoders_of_whole_models_give_open_clips_vectors(name: str) -> None:
    encoder = Encoder.load(EncoderSpec(name, None if name == str(STARTER) else "random", device="cpu"))
    tokens = encoder.tokenize(TEXTS)
    with torch.inference_mode():
        own = encoder.module.encode_text(torch.from_numpy(tokens))
    assert min_cosine(torch.from_numpy(encoder.encode(tokens, "text").vectors), own) > 0.99999
