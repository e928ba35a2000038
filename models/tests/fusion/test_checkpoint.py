import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.errors import ConfigError, IncompatibleFusion
from models.fusion.checkpoint import fusions_by_name, load_fusions, save_fusions, training_free_fusions
from models.fusion.fusion import PRESETS, build_fusions

ENCODER = "tiny/random@0123456789ab"


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_fusion_is_loaded_with_equal_weights(name: str, tmp_path: Path) -> None:
    fusions = build_fusions(name, 32)
    with torch.no_grad():
        for parameter in fusions["text"].parameters():
            parameter.add_(torch.randn_like(parameter))
    fusion_id = save_fusions(
        tmp_path / "f.safetensors", fusions, encoder=ENCODER, k=7, card={"steps": 3, "on": ["a", "é"]}
    )
    file = load_fusions(tmp_path / "f.safetensors", encoder=ENCODER)
    assert (file.k, file.card, file.fusion_id) == (7, {"steps": 3, "on": ["a", "é"]}, fusion_id)
    assert len(fusion_id) == 12
    assert (file.fusions["image"] is file.fusions["text"]) == (name == "paper")
    for side in ("image", "text"):
        assert file.fusions[side].config == fusions[side].config
        assert not file.fusions[side].training
        for key, value in fusions[side].state_dict().items():
            assert torch.equal(file.fusions[side].state_dict()[key], value)
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]  # no partial file is left


def test_a_shared_layer_is_stored_once(tmp_path: Path) -> None:
    save_fusions(tmp_path / "shared", build_fusions("paper", 512), encoder=ENCODER, k=10, card={})
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "shared").values()) == 3_158_016


def test_tensors_of_both_sides_are_stored_once_and_shared_when_loaded(tmp_path: Path) -> None:
    save_fusions(tmp_path / "f", build_fusions("default", 64), encoder=ENCODER, k=10, card={})
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "f").values()) == 2 * (64 * 64 + 64) + 2 * 3
    fusions = load_fusions(tmp_path / "f", encoder=ENCODER).fusions
    image, text = fusions["image"].pool, fusions["text"].pool
    assert image is not None
    assert text is not None
    assert (image.own, image.other) == (text.other, text.own)


def test_a_renamed_encoder_is_accepted_and_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_fusions(path, build_fusions("default", 32), encoder=ENCODER, k=10, card={})
    load_fusions(path, encoder="renamed/elsewhere@0123456789ab")
    with pytest.raises(
        IncompatibleFusion, match=r"trained on tiny/random@0123456789ab, this is tiny/random@ffffffffffff: .*\bencoder$"
    ):
        load_fusions(path, encoder="tiny/random@ffffffffffff")


def test_the_fusion_id_depends_on_the_weights() -> None:
    rule = training_free_fusions("mean", 32)
    assert rule.fusion_id == training_free_fusions("mean", 32).fusion_id
    assert rule.fusion_id != training_free_fusions("mean", 32, alpha=2.0).fusion_id
    assert rule.card == {"trained": False, "rule": "mean", "alpha": 1.0}


def damage(path: Path, how: str) -> None:
    """Damage a valid fusion file in one way."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "a pickle":
        torch.save({"weights": torch.zeros(3)}, path)
    elif how == "no header":
        save_file(tensors, path)
    elif how == "a tensor less":
        save_file(dict(list(tensors.items())[1:]), path, metadata=header)
    elif how == "another width":
        save_file(tensors, path, metadata={**header, "configs": header["configs"].replace('"dim": 32', '"dim": 64')})
    elif how == "an unknown option":
        configs = {side: {**config, "magic": 1} for side, config in json.loads(header["configs"]).items()}
        save_file(tensors, path, metadata={**header, "configs": json.dumps(configs)})


@pytest.mark.parametrize(
    "how", ["missing", "cut", "a pickle", "no header", "a tensor less", "another width", "an unknown option"]
)
def test_a_bad_file_is_refused_in_one_line_without_its_folder(how: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_fusions(path, build_fusions("default", 32), encoder=ENCODER, k=10, card={})
    damage(path, how)
    with pytest.raises(IncompatibleFusion, match=r"^f\.safetensors is ") as refused:
        load_fusions(path, encoder=ENCODER)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_fusions_are_found_by_rule_or_by_file(tmp_path: Path) -> None:
    def fusion_id(name: str) -> str:
        return fusions_by_name(name, encoder=ENCODER, dim=32).fusion_id

    assert len({fusion_id("none"), fusion_id("mean"), fusion_id("mean:2"), fusion_id("core"), fusion_id("core:2")}) == 5
    assert fusion_id("core:2") == training_free_fusions("core", 32, alpha=2.0).fusion_id
    saved = save_fusions(tmp_path / "f.safetensors", build_fusions("mlp", 32), encoder=ENCODER, k=7, card={})
    assert fusion_id(str(tmp_path / "f.safetensors")) == saved
    for name, why in (("mean:much", "number above 0"), ("mean:-1", "alpha > 0")):
        with pytest.raises(ConfigError, match=why):
            fusion_id(name)
    with pytest.raises(IncompatibleFusion, match="median"):
        fusion_id("median")
