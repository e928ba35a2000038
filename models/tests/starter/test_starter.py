import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from index_store.store import Store
from models.encoder.encoder import Encoder, EncoderSpec
from models.fusion.checkpoint import load_fusions
from models.starter import CONFIG, FOLDER, FUSION, MEMORY, VERSIONS, StarterMemory, install_starter
from models.starter.data_sets import load_trunk
from models.starter.learn import TokenizedPhotos, learn, project, pseudo_features
from models.starter.lessons import invented_name
from models.starter.photos import FeatureReader, fold_batch_norms
from models.tests.small import image_bytes, picture, unit_rows, write_tar


def test_the_bundled_parts_belong_together() -> None:
    encoder = Encoder.load(EncoderSpec(device="cpu"))
    assert load_fusions(FUSION, encoder=encoder.fingerprint).k == 10
    memory = StarterMemory.load()
    assert memory.encoder == encoder.fingerprint
    assert memory.image.shape == (len(memory.ids), encoder.dim)
    assert memory.image_key.shape == (len(memory.ids), encoder.trunk_dim)
    again = encoder.encode(encoder.tokenize([record["caption"] for record in memory.classes]), "text").vectors
    assert (again * memory.text).sum(1).min() > 0.9999


def test_the_weights_are_small_and_half_precision() -> None:
    assert (FOLDER / "clip.safetensors").stat().st_size <= 21_000_000
    header = (FOLDER / "clip.safetensors").read_bytes()[:100_000]
    assert b'"dtype":"F16"' in header
    assert b'"dtype":"F32"' not in header


def test_the_card_tells_what_a_user_must_know() -> None:
    card = (FOLDER / "CARD.md").read_text(encoding="utf-8")
    assert not re.search(r"\{\w", card)  # every place of CARD.in.md is filled in
    for needed in (
        "not for production",
        "WACV 2019",
        "CC BY 4.0",
        "python -m models.starter.make",
        "1-NN",
        StarterMemory.load().encoder,
    ):
        assert needed in card


def test_the_first_start_builds_two_versions_and_the_second_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    install_starter(store)
    assert sorted(store.versions(MEMORY)) == sorted(VERSIONS)
    assert store.current(MEMORY) == "all"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    store.activate(MEMORY, "fruit-and-vegetables")
    install_starter(store)
    assert store.current(MEMORY) == "fruit-and-vegetables"
    assert all(path.stat().st_mtime_ns == when for path, when in written.items() if path.name == "manifest.json")


def test_the_versions_differ_by_the_packaged_goods(tmp_path: Path) -> None:
    store, memory = Store(tmp_path), StarterMemory.load()
    install_starter(store)
    fresh, everything = (store.open(MEMORY, version, encoder=memory.encoder) for version in VERSIONS)
    assert len(everything) == len(memory.ids) > len(fresh) > 1000
    rows = np.flatnonzero([memory.classes[label]["coarse_class"] == "Milk" for label in memory.label])[:3]
    queries = memory.image_key[rows].astype(np.float32)
    found = [
        {record["coarse_class"] for record in snapshot.retrieve(queries, "image", 5).records(0)}
        for snapshot in (fresh, everything)
    ]
    assert "Milk" not in found[0]
    assert "Milk" in found[1]
    assert everything.key_kind("image") == "trunk"
    assert everything.check_recall() == {"image": 1.0, "text": 1.0}


def test_a_memory_survives_its_files(tmp_path: Path) -> None:
    text = unit_rows(np.eye(2, 8)).astype(np.float16)
    image = unit_rows(np.random.default_rng(0).standard_normal((3, 8))).astype(np.float16)
    classes = [{"caption": "a photo of Oatly, a kind of Milk", "class": "Oatly", "coarse_class": "Milk"}]
    classes += [{"caption": "a photo of Lime", "class": "Lime", "coarse_class": "Lime"}]
    made = StarterMemory("m@0", ["train/a", "train/b", "train/c"], np.array([1, 0, 1]), image, image, text, classes)
    made.save(tmp_path)
    read = StarterMemory.load(tmp_path)
    assert [record["class"] for record in read.pairs("all").records] == ["Lime", "Oatly", "Lime"]
    assert read.pairs("fruit-and-vegetables").ids.tolist() == ["train/a", "train/c"]
    np.testing.assert_array_equal(read.pairs("all").text, text[[1, 0, 1]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]


@pytest.fixture
def data() -> Path:
    """The folder of the data sets, or a skip."""
    folder = Path(os.environ.get("RECO_DATA", Path(__file__).parents[4] / "shared" / "data"))
    if not (folder / "mobilenetv2").is_dir():
        pytest.skip(f"no mobilenetv2 under {folder}: set RECO_DATA")
    return folder


@pytest.fixture(scope="session")
def mobile(configs: Path) -> Encoder:
    return Encoder.load(EncoderSpec(str(configs / "tinymobile.json"), "random", device="cpu"))


def test_features_are_those_of_the_encoder(mobile: Encoder, tmp_path: Path) -> None:
    members: list[tuple[str, bytes | dict[str, object]]] = []
    for row in range(5):
        members += [
            (f"{row}.jpg", image_bytes(picture(row), "PNG")),
            (f"{row}.json", {"captions": [f"one {row}", f"two {row}"]}),
        ]
    tar = write_tar(tmp_path / "photos.tar", members)
    photos = FeatureReader(mobile, mobile.module.visual.trunk, tmp_path / "kept", 0).read("photos", [tar], views=2)
    assert photos.captions[3] == ["one 3", "two 3"]
    assert photos.features.shape == (5, 2, 1280)
    expected = mobile.encode(np.stack([mobile.preprocess(picture(row)) for row in range(5)]), "image")
    assert expected.trunk is not None
    assert (photos.keys * expected.trunk).sum(1).min() > 0.9999
    assert (project(mobile.module, photos.features[:, 0]) * expected.vectors).sum(1).min() > 0.9999
    again = FeatureReader(mobile, torch.nn.Identity(), tmp_path / "kept", 0).read(
        "photos", [tar], views=2
    )  # kept: no network is asked
    np.testing.assert_array_equal(again.features, photos.features)


def test_folding_changes_no_feature() -> None:
    import timm

    torch.manual_seed(0)
    trunk = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    for name, buffer in trunk.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = trunk(pixels)
        after = fold_batch_norms(trunk)(pixels)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in trunk.modules())
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_learning_aligns_both_towers(mobile: Encoder, configs: Path) -> None:
    encoder = Encoder.load(EncoderSpec(str(configs / "tinymobile.json"), "random", device="cpu"))
    rng = np.random.default_rng(0)
    words = ["apple", "boat", "cloud", "door", "egg", "fish", "goat", "hat"]
    features = np.abs(rng.standard_normal((8, 2, 1280), np.float32))
    tokens = torch.from_numpy(np.stack([encoder.tokenize([word, f"a photo of a {word}"]) for word in words]))
    learn(encoder.module, [TokenizedPhotos(torch.from_numpy(features), tokens, np.arange(8), 8)], steps=40, seed=0)
    text = encoder.encode(encoder.tokenize(words), "text").vectors
    assert ((project(encoder.module, features[:, 0]) @ text.T).argmax(1) == np.arange(8)).all()


def test_no_two_of_a_group_share_a_batch() -> None:
    source = TokenizedPhotos(torch.randn(30, 1, 4), torch.arange(90).view(30, 3, 1), np.arange(30) % 5, share=4)
    # (4, 2, 1): item and caption of each, as 3 * item + caption
    _, tokens = source.draw(np.random.default_rng(0))
    one, another = tokens.squeeze(2).unbind(1)
    assert (one // 3 == another // 3).all()
    assert (one != another).all()
    groups = (one // 3 % 5).tolist()
    assert len(groups) == len(set(groups)) == 4


def test_pseudo_features_lie_near_the_photos_of_their_class() -> None:
    rng = torch.Generator().manual_seed(0)
    spread = torch.rand(16, generator=rng) * 3 + 0.1
    means = 3 * torch.randn(6, 16, generator=rng) * spread
    photos = (means[:, None] + torch.randn(6, 50, 16, generator=rng) * spread).flatten(0, 1)
    rows = (means - means.mean(0)) / spread**2
    made = pseudo_features(rows, photos)
    nearest = F.normalize(made - photos.mean(0), dim=1) @ F.normalize(means - means.mean(0), dim=1).T
    assert (nearest.argmax(1) == torch.arange(6)).all()


def test_invented_names_are_steady_and_different() -> None:
    names = [invented_name(str(label), "one") for label in range(100)]
    assert names == [invented_name(str(label), "one") for label in range(100)]
    assert len(set(names)) > 95
    assert names[0] != invented_name("0", "two")
    assert len({name.split()[0] for name in names}) <= 12


def test_the_folded_trunk_sees_what_the_original_sees(data: Path) -> None:
    import timm
    from safetensors.torch import load_file

    encoder = Encoder.load(EncoderSpec(str(CONFIG), "random", device="cpu"))
    load_trunk(encoder, data)
    original = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    weights = load_file(data / "mobilenetv2" / "mobilenetv2_100.safetensors")
    original.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    pixels = np.stack([encoder.preprocess(picture(row, 240, 230)) for row in range(4)])
    with torch.inference_mode():
        expected = F.normalize(original(torch.from_numpy(pixels) / 127.5 - 1), dim=-1).numpy()
    found = encoder.encode(pixels, "image").trunk
    assert found is not None
    assert (found * expected).sum(1).min() > 0.99


def test_the_memory_names_no_caption_of_the_data_set() -> None:
    names = json.loads((FOLDER / "memory.json").read_text())
    assert len(names["classes"]) == 81
    assert {"caption": "a photo of Avocado", "class": "Avocado", "coarse_class": "Avocado"} in names["classes"]
    assert all(set(record) == {"caption", "class", "coarse_class"} for record in names["classes"])
