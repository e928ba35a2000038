"""Small real things shared by the tests: dual encoders with random weights, made once."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.checkpoint import untrained_fusions
from models.clip import Encoder, EncoderSpec
from models.reco import Reco

VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 48, "head_width": 24, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MOBILENET = {
    "embed_dim": 32,
    "vision_cfg": {
        "timm_model_name": "mobilenetv2_100",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "image_size": 64,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and a busy machine makes many threads slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of open_clip configurations: tinyvit.json and tinymobile.json."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in (("tinyvit", VIT), ("tinymobile", MOBILENET)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def encoder(configs: Path) -> Encoder:
    """A two-layer ViT of width 32 with random weights."""
    return Encoder.load(EncoderSpec(str(configs / "tinyvit.json"), "random", device="cpu"))


@pytest.fixture(scope="session")
def reco(encoder: Encoder) -> Reco:
    """The tiny encoder with the training-free rule."""
    file = untrained_fusions(encoder.dim, alpha=2.0, k=4)
    return Reco(encoder, file.fusions, file.fusion_id, file.k)
