"""Checkpoints of transformers, loaded in their own layout and compared with transformers itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from models.encoder.encoder import Encoder, EncoderSpec
from models.encoder.image_tower import normalize_pixels
from models.encoder.loading.huggingface import convert_config
from models.errors import EncoderUnavailable
from models.tests.tokenizer import train_tokenizer

TEXTS = ["a photo of a cat", "two dogs on a beach, and a ripe banana", ""]
CLIP_VISION = {
    "hidden_size": 64,
    "intermediate_size": 130,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3}


def save_clip(folder: Path, *, act: str = "quick_gelu", **text: Any) -> Any:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={**TEXT, "hidden_act": act, "max_position_embeddings": 20, **text},
        vision_config={**CLIP_VISION, "hidden_act": act},
        projection_dim=24,
    )
    return save(CLIPModel, config, folder)


def save_siglip(folder: Path, tokens: int) -> Any:
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(  # timm has no image tower of SigLIP with fewer layers or patches
        text_config={**TEXT, "projection_size": 768, "vocab_size": tokens, "max_position_embeddings": 16},
        vision_config={"patch_size": 32, "image_size": 256},
    )
    return save(SiglipModel, config, folder)


def save(kind: Any, config: Any, folder: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
    model.save_pretrained(folder)
    return model


def assert_equal_vectors(encoder: Encoder, model: Any) -> None:
    size = (3, 3, *encoder.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    tokens = encoder.tokenize(TEXTS)
    with torch.inference_mode():
        images = model.get_image_features(
            normalize_pixels(torch.from_numpy(pixels), encoder.module.visual.preprocess_cfg)
        ).pooler_output
        texts = model.get_text_features(torch.from_numpy(tokens)).pooler_output
    assert (encoder.encode(pixels, "image").vectors * normalize(images, dim=-1).numpy()).sum(1).min() > 0.99999
    assert (encoder.encode(tokens, "text").vectors * normalize(texts, dim=-1).numpy()).sum(1).min() > 0.99999


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_clip_of_transformers_gives_its_vectors(tmp_path: Path, act: str) -> None:
    model = save_clip(tmp_path / "mine", act=act)
    encoder = Encoder.load(EncoderSpec(f"local-dir:{tmp_path / 'mine'}", device="cpu", packed=True))
    assert encoder.fingerprint.startswith("mine@")
    assert (encoder.dim, encoder.image_size, encoder.context_length) == (24, (32, 32), 20)
    assert encoder.logit_bias is None
    assert_equal_vectors(encoder, model)


@pytest.mark.parametrize("eos", [1, 2], ids=["end token", "legacy"])
def test_a_clip_with_a_vocabulary_of_its_own_is_read_where_transformers_reads_it(tmp_path: Path, eos: int) -> None:
    tokens = train_tokenizer(tmp_path / "mine")
    model = save_clip(tmp_path / "mine", vocab_size=tokens, eos_token_id=eos, pad_token_id=0)
    encoder = Encoder.load(EncoderSpec(f"local-dir:{tmp_path / 'mine'}", device="cpu", packed=True))
    assert encoder.trims_texts
    assert_equal_vectors(encoder, model)


def test_a_siglip_of_transformers_gives_its_vectors(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    model = save_siglip(folder, train_tokenizer(folder))
    encoder = Encoder.load(EncoderSpec(f"local-dir:{folder}", device="cpu", packed=True))
    assert encoder.logit_bias == pytest.approx(float(model.logit_bias))
    assert_equal_vectors(encoder, model)


def test_what_a_siglip_leaves_out_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    from transformers import SiglipConfig

    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    model: Any = convert_config(tmp_path)["model_cfg"]
    whole: Any = SiglipConfig()  # its towers have no exact type
    image, text = whole.vision_config, whole.text_config
    name = f"vit_base_patch{image.patch_size}_siglip_{image.image_size}"
    assert (model["embed_dim"], model["vision_cfg"]["timm_model_name"]) == (image.hidden_size, name)
    assert model["text_cfg"]["vocab_size"] == text.vocab_size
    assert model["text_cfg"]["context_length"] == text.max_position_embeddings
    assert model["text_cfg"]["layers"] == text.num_hidden_layers
    assert model["text_cfg"]["norm_kwargs"] == {"eps": text.layer_norm_eps}


def test_preprocessing_is_read_from_its_file(tmp_path: Path) -> None:
    save_clip(tmp_path)
    found = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2, "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    config = Encoder.load(EncoderSpec(f"local-dir:{tmp_path}", device="cpu")).module.visual.preprocess_cfg
    assert (config["mean"], config["std"]) == ([0.5] * 3, [0.25] * 3)
    assert (config["interpolation"], config["resize_mode"]) == ("bilinear", "squash")


def refusal_message(folder: Path) -> str:
    with pytest.raises(EncoderUnavailable) as refused:
        Encoder.load(EncoderSpec(f"local-dir:{folder}", device="cpu"))
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder) not in message
    return message


def test_bad_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert refusal_message(folder).startswith("no folder 'mine': give local-dir: the path")
    save_clip(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, described = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:2000])
    assert refusal_message(folder).startswith("model.safetensors of mine is damaged (")
    weights.unlink()
    assert refusal_message(folder).startswith("mine has no model.safetensors: save it again")
    weights.write_bytes(whole)
    config.write_text(described.replace('"hidden_size": 64', '"hidden_size": 32'))
    assert "does not hold the weights that config.json describes (" in refusal_message(folder)
    config.write_text(described.replace('"model_type": "clip"', '"model_type": "blip"', 1))
    message = "config.json of mine has model_type 'blip': only 'clip' and 'siglip' are converted"
    assert refusal_message(folder).startswith(message)
    config.write_text(described[:50])
    assert refusal_message(folder).startswith("config.json of mine is no JSON file (")
    config.rename(folder / "open_clip_config.json")
    (folder / "open_clip_config.json").write_text('{"embed_dim": 32}')
    assert refusal_message(folder).startswith("open_clip_config.json of mine has no model_cfg with text_cfg and")
