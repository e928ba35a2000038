import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from skimage import data

from models.encoder.encoder import Encoder, EncoderSpec
from models.encoder.image_io import read_image
from models.errors import ConfigError, EncoderUnavailable
from models.tests.small import image_bytes, picture

TEXTS = [
    "a photo of a cat.",
    "",
    "two dogs on a beach, one of them with a very long tail that goes on and on and on",
    "naïve café 🍎",
]
UNREACHABLE = "http://127.0.0.1:9"  # no server listens there


def spec(configs: Path, name: str, **options: Any) -> EncoderSpec:
    return EncoderSpec(str(configs / f"{name}.json"), **{"pretrained": "random", "device": "cpu", **options})


@pytest.fixture(scope="module", params=["tinyvit", "tinymobile"])
def tower(request: pytest.FixtureRequest, configs: Path) -> tuple[Encoder, Any]:
    """Our encoder, and open_clip's own model from the same seed."""
    encoder = Encoder.load(spec(configs, request.param))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(request.param)
    return encoder, model.eval()


def cosines(ours: np.ndarray, theirs: torch.Tensor) -> np.ndarray:
    """(B,) cosine of each of our unit rows with theirs."""
    return np.asarray((ours * torch.nn.functional.normalize(theirs.float(), dim=-1).numpy()).sum(1))


def open_clip_transform(model: Any) -> Any:
    return image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)


@pytest.mark.parametrize("size", [(80, 64), (64, 200), (224, 224), (31, 37), (500, 64), (1, 1)])
def test_preprocessing_equals_open_clips(tower: tuple[Encoder, Any], size: tuple[int, int]) -> None:
    encoder, model = tower
    pixels = encoder.preprocess(picture(0, *size))
    assert pixels.shape == (3, *encoder.image_size)
    assert pixels.dtype == np.uint8
    own = open_clip_transform(model)(picture(0, *size))
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    np.testing.assert_array_equal(pixels, ((own * std + mean) * 255).round().to(torch.uint8).numpy())


def test_a_large_jpeg_decoded_at_a_smaller_scale_has_nearly_the_same_vector() -> None:
    """With trained weights, since random ones would hide a difference."""
    encoder = Encoder.load(EncoderSpec(device="cpu"))
    retina, *others = (
        Image.fromarray(getattr(data, name)()) for name in ("retina", "astronaut", "chelsea", "coffee", "rocket")
    )
    tiles = [photo.resize((480, 480)) for photo in others]
    busy = Image.new("RGB", (1920, 1920))
    for place in range(16):
        busy.paste(tiles[(place + place // 4) % 4], (place % 4 * 480, place // 4 * 480))
    for photo in (retina, busy, tiles[0].resize((4000, 3000))):
        jpeg = image_bytes(photo, "JPEG", quality=90)
        assert read_image(jpeg, target_size=encoder.image_size).width < photo.width
        both = encoder.encode(np.stack([encoder.read_image(jpeg), encoder.preprocess(read_image(jpeg))]), "image")
        assert both.vectors[0] @ both.vectors[1] > 0.999
        assert both.trunk is not None
        assert both.trunk[0] @ both.trunk[1] > 0.999


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_image_vectors_equal_open_clips_for_any_batch_size(tower: tuple[Encoder, Any], batch: int) -> None:
    encoder, model = tower
    images = [picture(seed, 90, 70) for seed in range(5)]
    with torch.inference_mode():
        own = model.encode_image(torch.stack([open_clip_transform(model)(image) for image in images]))
    pixels = np.stack([encoder.preprocess(image) for image in images])
    vectors = np.concatenate([encoder.encode(pixels[at : at + batch], "image").vectors for at in range(0, 5, batch)])
    assert vectors.dtype == np.float32
    assert cosines(vectors, own).min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_text_vectors_equal_open_clips_for_any_batch_size(tower: tuple[Encoder, Any], batch: int) -> None:
    encoder, model = tower
    tokens = encoder.tokenize(TEXTS)
    assert tokens.shape == (4, encoder.context_length)
    assert tokens.dtype == np.int64
    with torch.inference_mode():
        own = model.encode_text(open_clip.get_tokenizer(encoder.fingerprint.split("/")[0])(TEXTS))
    encoded = [encoder.encode(tokens[at : at + batch], "text") for at in range(0, 4, batch)]
    assert cosines(np.concatenate([each.vectors for each in encoded]), own).min() > 0.99999
    assert encoded[0].trunk is None


def test_trunk_features_are_the_input_of_the_projection(tower: tuple[Encoder, Any]) -> None:
    encoder, model = tower
    encoded = encoder.encode(np.stack([encoder.preprocess(picture(seed)) for seed in range(3)]), "image")
    trunk = encoded.key("trunk")
    assert trunk.shape == (3, encoder.trunk_dim)
    np.testing.assert_allclose(np.linalg.norm(trunk, axis=1), 1, atol=1e-6)
    with torch.inference_mode():
        pixels = torch.stack([open_clip_transform(model)(picture(seed)) for seed in range(3)])
        if hasattr(model.visual, "trunk"):
            own = model.visual.trunk(pixels)
        else:
            own = model.visual.forward_intermediates(pixels, normalize_intermediates=True, output_extra_tokens=True)
            own = own["image_intermediates_prefix"][-1][:, 0]
    assert cosines(trunk, own).min() > 0.99999
    np.testing.assert_array_equal(encoded.key("vector"), encoded.vectors)
    np.testing.assert_array_equal(encoded.take([2, 0]).key("trunk"), trunk[[2, 0]])


def test_asking_for_missing_trunk_features_is_a_config_error(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="vector keys"):
        encoder.encode(encoder.tokenize(["x"]), "text").key("trunk")


def test_a_resnet_tower_has_no_trunk_features(configs: Path) -> None:
    (configs / "tinyresnet.json").write_text(
        '{"embed_dim": 32, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},'
        ' "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}'
    )
    encoder = Encoder.load(spec(configs, "tinyresnet"))
    assert (encoder.dim, encoder.trunk_dim) == (32, None)
    assert encoder.encode(np.zeros((2, 3, 64, 64), np.uint8), "image").vectors.shape == (2, 32)


def test_concurrent_batches_give_the_right_vectors(encoder: Encoder) -> None:
    pixels = [np.stack([encoder.preprocess(picture(seed))]) for seed in range(12)]
    alone = [encoder.encode(each, "image").vectors for each in pixels]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: encoder.encode(each, "image").vectors, pixels))
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_similar_vectors_and_the_same_fingerprint(
    tower: tuple[Encoder, Any], configs: Path, precision: str
) -> None:
    encoder = tower[0]
    half = Encoder.load(spec(configs, encoder.fingerprint.split("/")[0], precision=precision))
    assert half.fingerprint == encoder.fingerprint
    assert half.logit_scale == encoder.logit_scale
    pixels = np.stack([encoder.preprocess(picture(seed)) for seed in range(3)])
    for side, batch in (("image", pixels), ("text", encoder.tokenize(TEXTS))):
        near = (half.encode(batch, side).vectors * encoder.encode(batch, side).vectors).sum(1)  # type: ignore[arg-type]
        assert near.min() > 0.99
        assert half.encode(batch, side).vectors.dtype == np.float32  # type: ignore[arg-type]


def test_a_lone_surrogate_is_tokenized_as_a_question_mark(encoder: Encoder) -> None:
    np.testing.assert_array_equal(encoder.tokenize(["a \ud800 b"]), encoder.tokenize(["a ? b"]))


def test_the_logit_scale_is_the_inverse_temperature(encoder: Encoder) -> None:
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize("size", [(50_000, 1), (1, 50_000), (3_000, 2)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_very_long_images_are_cropped_to_the_image_size(encoder: Encoder, size: tuple[int, int], mode: str) -> None:
    from models.encoder.image_tower import build_crop

    config = {**encoder._model.visual.preprocess_cfg, "resize_mode": mode}
    cropped = build_crop(config)(Image.new("L", size))
    assert (cropped.size, cropped.mode) == ((64, 64), "RGB")


def test_crop_then_resize_gives_open_clips_pixels(tower: tuple[Encoder, Any]) -> None:
    encoder, model = tower
    for size in ((70, 900), (900, 70)):
        image = picture(3, *size)
        own = open_clip_transform(model).transforms[0](image)
        expected = np.asarray(open_clip_transform(model).transforms[1](own)).transpose(2, 0, 1).astype(int)
        assert np.abs(encoder.preprocess(image) - expected).max() <= 3


# --- loading


def write_weights(encoder: Encoder, path: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in encoder._model.state_dict().items()}, path)
    return path


def test_a_local_file_gives_the_same_encoder(encoder: Encoder, configs: Path, tmp_path: Path) -> None:
    path = write_weights(encoder, tmp_path / "mine.safetensors")
    local = Encoder.load(spec(configs, "tinyvit", pretrained=str(path)))
    assert local.fingerprint == f"tinyvit/mine@{encoder.fingerprint.rpartition('@')[2]}"
    tokens = encoder.tokenize(TEXTS)
    np.testing.assert_array_equal(local.encode(tokens, "text").vectors, encoder.encode(tokens, "text").vectors)
    torch.save(encoder._model.state_dict(), tmp_path / "mine.pt")
    assert Encoder.load(spec(configs, "tinyvit", pretrained=str(tmp_path / "mine.pt"))).fingerprint == local.fingerprint


def test_weights_beside_the_configuration_are_loaded(encoder: Encoder, tmp_path: Path, configs: Path) -> None:
    (tmp_path / "both.json").write_text((configs / "tinyvit.json").read_text())
    write_weights(encoder, tmp_path / "both.safetensors")
    assert Encoder.load(EncoderSpec(str(tmp_path / "both.json"))).fingerprint.startswith("both/both@")


def test_one_changed_weight_changes_the_fingerprint(encoder: Encoder, configs: Path, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in encoder._model.state_dict().items()}
    state["ln_final.bias"][0] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    other = Encoder.load(spec(configs, "tinyvit", pretrained=str(tmp_path / "other.safetensors")))
    assert other.fingerprint.rpartition("@")[2] != encoder.fingerprint.rpartition("@")[2]


def refusal_message(spec: EncoderSpec) -> str:
    with pytest.raises(EncoderUnavailable) as refused:
        Encoder.load(spec)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_unknown_names_are_refused_with_the_nearest_known_ones(configs: Path, tmp_path: Path) -> None:
    assert "ViT-B-32" in refusal_message(EncoderSpec("ViT-B-33", "openai"))
    assert "laion2b_s34b_b79k" in refusal_message(EncoderSpec("ViT-B-32", "laion9b"))
    assert "a local .safetensors file, or one of its tags (openai, " in refusal_message(EncoderSpec("ViT-B/32"))
    missing = refusal_message(spec(configs, "tinyvit", pretrained=str(tmp_path / "gone.safetensors")))
    assert missing.startswith("'gone.safetensors' is neither a file nor a hub tag of tinyvit")
    assert "no model configuration gone.json" in refusal_message(EncoderSpec(str(tmp_path / "gone.json")))


def test_bad_weights_files_are_refused_without_their_folder(encoder: Encoder, configs: Path, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in encoder._model.state_dict().items()}
    save_file({**state, "text_projection": torch.zeros(32, 31)}, tmp_path / "shape.safetensors")
    save_file({name: state[name] for name in list(state)[1:]}, tmp_path / "less.safetensors")
    whole = write_weights(encoder, tmp_path / "cut.safetensors")
    whole.write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("hello")
    for name in ("shape.safetensors", "less.safetensors", "cut.safetensors", "text.pt"):
        message = refusal_message(spec(configs, "tinyvit", pretrained=str(tmp_path / name)))
        assert message.startswith(f"{name} does not hold weights of tinyvit (")
        assert str(tmp_path) not in message


def test_a_pickle_is_never_executed(configs: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    assert "evil.pt" in refusal_message(spec(configs, "tinyvit", pretrained=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "executed").exists()


def test_a_tag_trained_with_quick_gelu_is_loaded_with_it(
    encoder: Encoder, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip alone only logs a warning, as for ViT-B-32 with the openai weights."""
    from huggingface_hub import constants

    path = write_weights(encoder, tmp_path / "mine.safetensors")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tinyvit", {"mine": {"file": str(path), "quick_gelu": True}})
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    tagged = Encoder.load(spec(configs, "tinyvit", pretrained="mine"))
    assert tagged.fingerprint.startswith("tinyvit/mine@")
    model = open_clip.create_model("tinyvit", str(path), force_quick_gelu=True).eval()
    with torch.inference_mode():
        own = model.encode_text(torch.from_numpy(tagged.tokenize(TEXTS)))
    assert cosines(tagged.encode(tagged.tokenize(TEXTS), "text").vectors, own).min() > 0.99999


def test_without_the_hub_the_error_proposes_a_local_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal_message(EncoderSpec("ViT-B-32", "laion2b_s34b_b79k"))
    assert message.endswith("give the file, as in --model ViT-B-32 --pretrained weights.safetensors")
    assert not constants.HF_HUB_OFFLINE


def test_a_missing_device_is_refused(configs: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "sees no CUDA device: use cpu or auto" in refusal_message(spec(configs, "tinyvit", device="cuda"))
    assert Encoder.load(spec(configs, "tinyvit", device="auto")).device == "cpu"


def test_importing_the_module_imports_neither_torch_nor_open_clip() -> None:
    code = (
        "import sys, models.encoder.encoder; sys.exit(bool({'torch', 'open_clip', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
