"""Weights of CLIP and SigLIP by the names of transformers, converted to those of open_clip.

Only names and shapes change, never values.
Alphabet: W width of a tower, D width of the vectors, N patches.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.encoder.loading.huggingface import read_json
from models.errors import EncoderUnavailable

__all__ = ["load_weights"]

# Rules (pattern, replacement), applied in order to every name. "qkv" are the three projections of
# an attention, joined before.
OPEN_CLIP_BLOCK = [
    (r"(resblocks\.\d+)\.layer_norm([12])\.", r"\1.ln_\2."),
    (r"(resblocks\.\d+)\.self_attn\.qkv\.", r"\1.attn.in_proj_"),
    (r"(resblocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.out_proj."),
    (r"(resblocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"(resblocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
]
CLIP = [
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
    *OPEN_CLIP_BLOCK,
]
SIGLIP = [
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.trunk.pos_embed"),
    (r"^vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"^vision_model\.head\.probe$", "visual.trunk.attn_pool.latent"),
    (r"^vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"^vision_model\.head\.attention\.", "visual.trunk.attn_pool."),
    (r"^vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"^vision_model\.head\.mlp\.", "visual.trunk.attn_pool.mlp."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"visual.trunk.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual.trunk.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"visual.trunk.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual.trunk.blocks.\1.mlp."),
    (r"^text_model\.embeddings\.token_embedding\.", "text.token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "text.positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "text.ln_final."),
    (r"^text_model\.head\.", "text.text_projection."),
    (r"^text_model\.encoder\.layers\.", "text.transformer.resblocks."),
    *OPEN_CLIP_BLOCK,
]


def load_weights(model: Any, folder: Path) -> None:
    """Load the weights of a folder in the layout of Hugging Face into an open_clip model.

    Raises EncoderUnavailable.
    """
    config = read_json(folder / "config.json")
    state = (
        _convert_clip(_read_state(folder)) if config["model_type"] == "clip" else _convert_siglip(_read_state(folder))
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise EncoderUnavailable(
            f"model.safetensors of {folder.name} does not hold the weights that config.json describes ({reason}): "
            "save both again"
        ) from error
    if config["model_type"] == "siglip":
        _set_activation(model, config.get("vision_config", {}).get("hidden_act", "gelu_pytorch_tanh"))


def _read_state(folder: Path) -> dict[str, Tensor]:
    """The weights of all model*.safetensors, without the constants of older versions."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise EncoderUnavailable(f"{folder.name} has no model.safetensors: save it again with safe_serialization=True")
    state = dict[str, Tensor]()
    for path in files:
        try:
            state.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise EncoderUnavailable(f"{path.name} of {folder.name} is damaged ({error}): copy it again") from error
    return _join_projections({name: each.float() for name, each in state.items() if not name.endswith("position_ids")})


def _join_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Three layers q_proj, k_proj, v_proj -> one layer qkv, (3W, W) and (3W,)."""
    joined = dict[str, Tensor]()
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name:
            parts = [state.get(name.replace("q_proj", f"{part}_proj"), tensor) for part in "qkv"]
            joined[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            joined[name] = tensor
    return joined


def _rename(state: Mapping[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = dict[str, Tensor]()
    for name, tensor in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor.reshape(()) if new in ("logit_scale", "logit_bias") else tensor
    return renamed


def _convert_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = _rename(state, CLIP)
    projections = {name: renamed[name].T for name in ("visual.proj", "text_projection") if name in renamed}
    return renamed | projections  # (D, W) -> (W, D)


def _convert_siglip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The attention pool's input projection is (3W, W) in transformers, q and kv apart in timm."""
    renamed = _rename(state, SIGLIP)
    pool, positions = "visual.trunk.attn_pool", "visual.trunk.pos_embed"
    for kind in ("weight", "bias"):
        if (joined := renamed.pop(f"{pool}.in_proj_{kind}", None)) is not None:
            width = len(joined) // 3
            renamed[f"{pool}.q.{kind}"], renamed[f"{pool}.kv.{kind}"] = joined[:width], joined[width:]
    if positions in renamed:
        renamed[positions] = renamed[positions][None]  # (1, N, W)
    return renamed


def _set_activation(model: Any, activation: str) -> None:
    """Give the image tower the GELU of its configuration; timm's is the exact one."""
    for layer in model.visual.modules():
        if isinstance(layer, nn.GELU):
            layer.approximate = "tanh" if activation == "gelu_pytorch_tanh" else "none"
