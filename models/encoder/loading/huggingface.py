"""Configurations of CLIP and SigLIP in the layout of Hugging Face, converted to open_clip's.

A folder as `save_pretrained` writes it: config.json, model*.safetensors, and for preprocessing
preprocessor_config.json. `huggingface_weights` converts the weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import EncoderUnavailable

__all__ = ["convert_config", "is_huggingface_folder", "read_json"]

CLIP_TOKENS = 49408  # of open_clip's own tokenizer, which equals that of CLIP
LEGACY_EOS = 2  # what transformers before 4.31 wrote for every CLIP, whatever its end token
# config.json holds what differs from the defaults of transformers' classes.
TOWER = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_TEXT = TOWER | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": CLIP_TOKENS,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_VISION = TOWER | {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SIGLIP_TEXT = TOWER | SIGLIP | {"vocab_size": 32000, "max_position_embeddings": 64}
SIGLIP_VISION = TOWER | SIGLIP | {"image_size": 224, "patch_size": 16}
SIGLIP_SIZES = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}  # W -> size in timm's names
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def is_huggingface_folder(folder: Path) -> bool:
    """Whether the folder holds a model in this layout and none in open_clip's."""
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises EncoderUnavailable."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EncoderUnavailable(
            f"{path.name} of {path.parent.name} is no JSON file ({reason}): save it again"
        ) from error
    if not isinstance(found, dict):
        raise EncoderUnavailable(f"{path.name} of {path.parent.name} holds no object: save it again")
    return found


def convert_config(folder: Path) -> dict[str, Any]:
    """The folder's configuration as open_clip's, {"model_cfg", "preprocess_cfg"}.

    Raises EncoderUnavailable for another architecture.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise EncoderUnavailable(
            f"config.json of {folder.name} has model_type {kind!r}: only 'clip' and 'siglip' are converted, "
            "export others as open_clip does"
        )
    model = _clip_config(config) if kind == "clip" else _siglip_config(config, folder)
    return {"model_cfg": model, "preprocess_cfg": _preprocess_config(folder, kind, model["vision_cfg"]["image_size"])}


def _clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = CLIP_TEXT | config.get("text_config", {}), CLIP_VISION | config.get("vision_config", {})
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            **_tower(vision),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": {**_text_tower(text), **({} if text["vocab_size"] == CLIP_TOKENS else _eos_pooling(text))},
    }


def _eos_pooling(text: Mapping[str, Any]) -> dict[str, Any]:
    """Of a CLIP with other tokens: its own tokenizer, and where the vector of a text is read.

    That is the end token, which need not be the greatest, but as in transformers the greatest where
    `eos_token_id` is LEGACY_EOS or absent.
    """
    end = text.get("eos_token_id", LEGACY_EOS)
    pooling = {"pool_type": "argmax"} if end == LEGACY_EOS else {"pool_type": "eos", "eos_id": end}
    return {"hf_tokenizer_name": ".", **pooling}


def _siglip_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    import timm

    text, vision = SIGLIP_TEXT | config.get("text_config", {}), SIGLIP_VISION | config.get("vision_config", {})
    size = SIGLIP_SIZES.get(vision["hidden_size"], f"width-{vision['hidden_size']}")
    name = f"vit_{size}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    if not timm.is_model(name):
        raise EncoderUnavailable(
            f"config.json of {folder.name} describes {name}, which timm does not know: upgrade timm"
        )
    tanh = {"act_kwargs": {"approximate": "tanh"}} if text["hidden_act"] == "gelu_pytorch_tanh" else {}
    image = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    return {
        "embed_dim": vision["hidden_size"],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**image, "image_size": vision["image_size"]},
        "text_cfg": {
            **_text_tower(text),
            **tanh,
            "hf_tokenizer_name": ".",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": text["layer_norm_eps"]},
        },
    }


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """What both towers have. open_clip rounds mlp_ratio * width down."""
    ratio = (config["intermediate_size"] + 0.5) / config["hidden_size"]
    return {"layers": config["num_hidden_layers"], "width": config["hidden_size"], "mlp_ratio": ratio}


def _text_tower(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"context_length": config["max_position_embeddings"], "vocab_size": config["vocab_size"]}
    return {**_tower(config), **sizes, "heads": config["num_attention_heads"]}


def _preprocess_config(folder: Path, kind: str, image_size: int) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    found = read_json(path) if path.is_file() else {}
    mean, std = (CLIP_MEAN, CLIP_STD) if kind == "clip" else ((0.5,) * 3, (0.5,) * 3)
    size = found.get("size", {})
    shortest = "shortest_edge" in size if isinstance(size, dict) and size else kind == "clip"
    return {
        "size": image_size,
        "mean": list(found.get("image_mean", mean)),
        "std": list(found.get("image_std", std)),
        "interpolation": RESAMPLING.get(found.get("resample", 3), "bicubic"),
        "resize_mode": "shortest" if shortest else "squash",
    }
