"""Optimised encoders compared with open_clip, for architectures that do not fit as a whole."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoder.encoder import Encoder, EncoderSpec
from models.encoder.onednn import PackedAttention, PackedLinear
from models.tests.conftest import VIT
from models.tests.small import picture

TEXTS = ["two dogs on a beach with a very long tail that goes on and on", "", "a cat", "lemon"]
TEXT_TOWER = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "resnet": {**VIT, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}},
    "coca": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 64,
            "layers": 2,
            "width": 48,
            "head_width": 24,
            "patch_size": 16,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TEXT_TOWER, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT_TOWER, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "custom-blocks": {**VIT, "text_cfg": {**TEXT_TOWER, "qk_norm": True}, "custom_text": True},
}


def save_config(folder: Path, name: str, config: dict[str, Any]) -> Path:
    path = folder / f"{name}-to-optimize.json"
    path.write_text(json.dumps(config))
    return path


def create_model(config: Path) -> Any:
    """open_clip's own model with the random weights that `Encoder.load` gives."""
    open_clip.add_model_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(config.stem).eval()


def min_cosine(ours: np.ndarray, theirs: Tensor) -> float:
    return float((ours * F.normalize(theirs.double(), dim=-1).numpy()).sum(1).min())


def assert_equals_open_clip(encoder: Encoder, model: Any, rows: int) -> None:
    """Compare both towers of an encoder with an unoptimised model, on a batch of 1 to 4 rows."""
    pixels = np.stack([encoder.preprocess(picture(seed, 90, 70)) for seed in range(rows)])
    tokens = encoder.tokenize(TEXTS[:rows])
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        images = model.encode_image((torch.from_numpy(pixels) / 255 - mean) / std)
        texts = model.encode_text(torch.from_numpy(tokens))
    assert min_cosine(encoder.encode(pixels, "image").vectors, images) > 0.99999
    assert min_cosine(encoder.encode(tokens, "text").vectors, texts) > 0.99999


def optimizer_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our log lines, without open_clip's."""
    return [record.getMessage() for record in caplog.records if record.name == "reco"]


def packed_layers(module: nn.Module) -> int:
    return sum(isinstance(layer, PackedLinear | PackedAttention) for layer in module.modules())


@pytest.mark.parametrize("fixed_shapes", ["off", "on"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_architectures_that_fit_in_part_give_open_clips_vectors(
    name: str, fixed_shapes: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = save_config(tmp_path, name, CONFIGS[name])
    with caplog.at_level(logging.WARNING, "reco"):
        spec = EncoderSpec(str(config), "random", device="cpu", fixed_shapes=fixed_shapes, max_batch=4, packed=True)
        encoder, model = Encoder.load(spec), create_model(config)
    for rows in (1, 2, 4):
        assert_equals_open_clip(encoder, model, rows)
    assert not optimizer_messages(caplog)
    assert packed_layers(encoder.module) > 0


def test_only_the_layers_that_a_resnets_attention_pool_calls_are_packed(tmp_path: Path) -> None:
    config = save_config(tmp_path, "resnet", CONFIGS["resnet"])
    module = Encoder.load(EncoderSpec(str(config), "random", device="cpu", packed=True)).module
    assert packed_layers(module.visual) == 0  # the attention pool hands its weights to a functional call
    assert sum(isinstance(layer, PackedAttention) for layer in module.transformer.modules()) == 2


class TiedLinear(nn.Module):
    """A layer that is called and whose weight is used again, so that it cannot be packed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.linear(x), self.linear.weight)


class PaddingReader(open_clip.CLIP):  # type: ignore[misc]
    """A causal CLIP whose text vectors depend on the padding."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        padding = (text == 0).float().mean(1, keepdim=True)  # (B, 1)
        vectors: Tensor = super().encode_text(text, normalize)
        direction: Tensor = self.text_projection[0]  # (D,)
        return vectors + padding * direction


def full_length_only(_: nn.Module, inputs: tuple[Tensor]) -> None:
    if inputs[0].shape[1] != VIT["text_cfg"]["context_length"]:  # type: ignore[index]
        raise ValueError("this tower needs texts of the context length")


def load_both(folder: Path, change: Any) -> tuple[Encoder, Any]:
    """A changed ViT: our packed encoder of it, and the unoptimised model."""
    config = save_config(folder, "changed", VIT)
    models = [create_model(config) for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        change(model)
    tokenizer = open_clip.get_tokenizer(config.stem)
    return Encoder(EncoderSpec(device="cpu", packed=True), models[0], tokenizer, "changed/vit@0"), models[1]


def tie_the_image_tower(model: Any) -> None:
    model.visual.ln_post = nn.Sequential(model.visual.ln_post, TiedLinear(VIT["vision_cfg"]["width"]))  # type: ignore[index]


def tie_the_text_tower(model: Any) -> None:
    model.ln_final = nn.Sequential(model.ln_final, TiedLinear(TEXT_TOWER["width"]))


def read_the_padding(model: Any) -> None:
    model.__class__ = PaddingReader


def refuse_short_texts(model: Any) -> None:
    model.transformer.register_forward_pre_hook(full_length_only)


def test_a_tower_that_fails_with_packed_layers_stays_unpacked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "reco"):
        encoder, model = load_both(tmp_path, tie_the_image_tower)
    assert_equals_open_clip(encoder, model, 3)
    assert packed_layers(encoder.module.visual) == 0
    assert packed_layers(encoder.module.transformer) > 0
    assert encoder.trims_texts
    (message,) = optimizer_messages(caplog)
    assert message.startswith("the image tower of changed/vit@0 keeps unpacked weights")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (read_the_padding, "its vectors have a cosine of 0."),
        (refuse_short_texts, "it fails with ValueError (this tower"),
    ],
)
def test_texts_of_a_tower_that_needs_its_padding_are_not_trimmed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, reason: str
) -> None:
    with caplog.at_level(logging.WARNING, "reco"):
        encoder, model = load_both(tmp_path, change)
    assert_equals_open_clip(encoder, model, 3)
    assert not encoder.trims_texts
    assert packed_layers(encoder.module.transformer) > 0
    (message,) = optimizer_messages(caplog)
    assert "the text tower of changed/vit@0 encodes whole texts" in message
    assert reason in message


def test_a_coca_is_packed_and_its_texts_are_not_trimmed(tmp_path: Path) -> None:
    config = save_config(tmp_path, "coca", CONFIGS["coca"])
    encoder = Encoder.load(EncoderSpec(str(config), "random", device="cpu", packed=True))
    assert not encoder.trims_texts
    assert sum(isinstance(layer, PackedAttention) for layer in encoder.module.text.modules()) == TEXT_TOWER["layers"]
    assert_equals_open_clip(encoder, create_model(config), 4)


@pytest.mark.parametrize("change", [read_the_padding, refuse_short_texts])
def test_a_text_tower_that_neither_fits_is_open_clips_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    def both(model: Any) -> None:
        tie_the_text_tower(model)
        change(model)

    with caplog.at_level(logging.WARNING, "reco"):
        encoder, model = load_both(tmp_path, both)
    assert_equals_open_clip(encoder, model, 3)
    assert not encoder.trims_texts
    assert packed_layers(encoder.module.transformer) == 0
    assert packed_layers(encoder.module.visual) > 0
    trimmed, packed = optimizer_messages(caplog)
    assert trimmed.startswith(
        "the text tower of changed/vit@0 encodes whole texts, slower than trimmed ones: trimmed, "
    )
    assert packed.startswith(
        "the text tower of changed/vit@0 keeps unpacked weights, slower than packed ones: packed, "
    )


@pytest.mark.parametrize("change", [lambda _: None, read_the_padding, tie_the_text_tower])
def test_trimming_and_packing_are_compared_with_one_plain_pass(tmp_path: Path, change: Any) -> None:
    lengths: list[tuple[int, ...]] = []

    def counted(model: Any) -> None:
        change(model)
        model.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(tuple(inputs[0].shape[:2])))

    encoder, _ = load_both(tmp_path, counted)
    whole = [shape for shape in lengths if shape == (2, encoder.context_length)]
    untrimmed = 0 if encoder.trims_texts else 1  # whole texts with packed layers
    assert len(whole) == 1 + untrimmed, lengths
    assert len(lengths) == 3, lengths
