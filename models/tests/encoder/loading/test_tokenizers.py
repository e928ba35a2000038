"""Tokenizers of Hugging Face: from a folder, without the hub, and without transformers."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file

from models.encoder.encoder import Encoder, EncoderSpec
from models.errors import EncoderUnavailable
from models.tests.conftest import VIT
from models.tests.tokenizer import train_tokenizer

TEXTS = ["A photo of a cat.", "two dogs on a beach", ""]
UNREACHABLE = "http://127.0.0.1:9"  # no server listens there


def siglip_config(tokens: int) -> dict[str, Any]:
    """A model like SigLIP with a tiny image tower: bidirectional text, a logit bias."""
    text = {
        "context_length": 12,
        "vocab_size": tokens,
        "width": 32,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "hf_tokenizer_name": "nobody/no-such-tokenizer",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    return {**VIT, "custom_text": True, "init_logit_bias": -10, "text_cfg": text}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with a tokenizer, and how many tokens it has."""
    folder = tmp_path_factory.mktemp("vocabulary")
    return folder, train_tokenizer(folder)


@pytest.fixture
def config(tmp_path: Path, vocabulary: tuple[Path, int]) -> Path:
    path = tmp_path / "tiny-hf.json"
    path.write_text(json.dumps(siglip_config(vocabulary[1])))
    return path


def refusal_message(spec: EncoderSpec) -> str:
    with pytest.raises(EncoderUnavailable) as refused:
        Encoder.load(spec)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_tokenizer_of_a_folder_is_used_as_open_clip_would(config: Path, vocabulary: tuple[Path, int]) -> None:
    encoder = Encoder.load(EncoderSpec(str(config), "random", device="cpu", packed=True, tokenizer=vocabulary[0]))
    own = HFTokenizer(str(vocabulary[0]), context_length=12, clean="canonicalize")(TEXTS)
    np.testing.assert_array_equal(encoder.tokenize(TEXTS), own.numpy())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(config.stem).eval()
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.encode_text(own), dim=-1).numpy()
    assert (encoder.encode(own.numpy(), "text").vectors * expected).sum(1).min() > 0.99999
    assert encoder.logit_bias == -10


def test_a_local_folder_brings_its_tokenizer(tmp_path: Path, config: Path, vocabulary: tuple[Path, int]) -> None:
    encoder = Encoder.load(EncoderSpec(str(config), "random", device="cpu", tokenizer=vocabulary[0]))
    folder = tmp_path / "exported"
    shutil.copytree(vocabulary[0], folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": siglip_config(vocabulary[1])}))
    save_file(encoder.module.state_dict(), folder / "open_clip_model.safetensors")
    local = Encoder.load(EncoderSpec(f"local-dir:{folder}", device="cpu"))
    assert local.fingerprint == f"exported@{encoder.fingerprint.rpartition('@')[2]}"
    np.testing.assert_array_equal(local.tokenize(TEXTS), encoder.tokenize(TEXTS))


def test_without_the_hub_the_error_names_the_tokenizer(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal_message(EncoderSpec(str(config), "random"))
    assert message.startswith("the tokenizer nobody/no-such-tokenizer of tiny-hf could not be fetched from the hub (")
    assert message.endswith("give its folder, as in --tokenizer DIR with a tokenizer.json")


def test_without_transformers_the_error_says_what_to_install(
    config: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: tuple[Path, int]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refusal_message(EncoderSpec(str(config), "random", tokenizer=vocabulary[0])) == (
        f"tiny-hf needs the tokenizer {vocabulary[0].name}, and transformers is not installed: "
        "pip install 'reco-serve[hf]'"
    )
    assert refusal_message(EncoderSpec("roberta-ViT-B-32", "random")) == (
        "roberta-ViT-B-32 needs the text tower roberta-base, and transformers is not installed: "
        "pip install 'reco-serve[hf]'"
    )


def test_bad_tokenizer_folders_are_refused_by_name(config: Path, tmp_path: Path, vocabulary: tuple[Path, int]) -> None:
    def refusal(folder: Path) -> str:
        return refusal_message(EncoderSpec(str(config), "random", tokenizer=folder))

    assert refusal(tmp_path / "gone").startswith("no tokenizer folder 'gone': give the folder that")
    empty, cut, larger = (tmp_path / name for name in ("empty", "cut", "larger"))
    empty.mkdir()
    for folder in (cut, larger):
        count = train_tokenizer(folder, extra=20)
    (cut / "tokenizer.json").write_text((cut / "tokenizer.json").read_text()[:100])
    for folder in (empty, cut):
        message = refusal(folder)
        assert message.startswith(f"the folder {folder.name} holds no tokenizer that transformers reads (")
        assert str(tmp_path) not in message
    assert refusal(larger) == (
        f"larger has {count} tokens, tiny-hf takes {vocabulary[1]}: give the tokenizer that the model was trained "
        "with, as in --tokenizer DIR"
    )


def test_a_vocabulary_that_open_clips_own_tokenizer_does_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other-words.json"
    path.write_text(json.dumps({**VIT, "text_cfg": {**VIT["text_cfg"], "vocab_size": 1000}}))  # type: ignore[dict-item]
    message = refusal_message(EncoderSpec(str(path), "random"))
    assert message.startswith("open_clip's own tokenizer has 49408 tokens, other-words takes 1000: give the tokenizer")
