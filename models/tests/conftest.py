"""Fixtures: small encoders with random weights, images, and a training configuration."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from index_store.build.build import build_version
from index_store.store import Store
from models.data.encode import encode_samples
from models.data.sources import read_samples
from models.encoder.encoder import Encoder, EncoderSpec
from models.fusion.checkpoint import training_free_fusions
from models.reco import Reco
from models.tests.small import image_bytes, picture, write_tar
from models.training.episodes import concatenate_pairs

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
def _single_thread() -> Iterator[None]:
    """Run torch in one thread: small matrices gain nothing from more, least on a busy machine."""
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
    file = training_free_fusions("mean", encoder.dim, alpha=2.0, k=4)
    return Reco(encoder, file.fusions, file.fusion_id, file.k)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A tar of 24 images of 8 classes, and one that does not decode."""
    members: list[tuple[str, bytes | Mapping[str, object]]] = []
    for row in range(24):
        members += [
            (f"p{row}.jpg", image_bytes(picture(row % 8), "JPEG")),
            (f"p{row}.json", {"class": f"thing {row % 8}"}),
        ]
    return write_tar(
        tmp_path / "photos.tar", [*members, ("broken.jpg", b"\xff\xd8\xff no"), ("broken.json", {"class": "none"})]
    )


@pytest.fixture
def recipe(photos: Path, encoder: Encoder, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training configuration on disk, with the memory that it names."""
    samples = read_samples(photos, caption="a photo of {class}")
    block = concatenate_pairs(list(encode_samples(samples, encoder, kinds={"image": "vector", "text": "vector"})))
    store = Store(tmp_path / "store")
    build_version(
        store, "things", "v1", [block], encoder=encoder.fingerprint, kinds={"image": "vector", "text": "vector"}
    )
    store.activate("things", "v1")
    monkeypatch.setenv("PHOTOS", str(photos.parent))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'''output = "{tmp_path}/made/fusion.safetensors"
store = "{tmp_path}/store"
model = "{configs}/tinyvit.json"
pretrained = "random"
device = "cpu"
k = 3
steps = 6
batch = 16
held_out = 0.25

[[episodes]]
sources = ["${{PHOTOS}}/photos.tar"]
caption = "a photo of {{class}}"
memory = "things@v1"
'''
    )
    return path
