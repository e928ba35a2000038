"""Fusion files: one safetensors file with a JSON header, without pickled code.

The header holds the encoder for which the fusion was trained, the default number of neighbours, and
whether both sides share one layer (the paper's layout), which is then stored once.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from index_store.storage.manifest import same_encoder
from index_store.types import SIDES, Side
from models.errors import ConfigError, IncompatibleFusion
from models.fusion.fusion import RULES, Fusion, FusionConfig, build_fusions, share_metrics

FORMAT = "2"  # format 1 had another pool


@dataclass(frozen=True, slots=True, eq=False)
class FusionFile:
    """The fusions of both sides, with the header of their file.

    k: neighbours by default.  fusion_id: 12 hex digits of the weights.  card: free JSON about the
    training.
    """

    fusions: Mapping[Side, Fusion]
    k: int
    fusion_id: str
    card: Mapping[str, Any]


def save_fusions(path: Path, fusions: Mapping[Side, Fusion], *, encoder: str, k: int, card: Mapping[str, Any]) -> str:
    """Write a fusion file atomically. Returns the fusion_id. encoder: its fingerprint."""
    layers = _distinct_layers(fusions)
    header = {
        "format": FORMAT,
        "encoder": encoder,
        "k": str(k),
        "configs": json.dumps({name: asdict(layer.config) for name, layer in layers.items()}),
        "card": json.dumps(card),
    }
    write_tensors(path, _distinct_tensors(layers), header)
    return _fusion_id(layers)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    """Write one safetensors file atomically. Tensors that share memory are written separately."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(save(copies, metadata=dict(header)))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(header, tensors) of a safetensors file. Raises OSError or SafetensorError."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_fusions(path: Path, *, encoder: str) -> FusionFile:
    """Read a fusion file. IncompatibleFusion unless it is whole and trained on this encoder."""
    try:
        header, tensors = read_tensors(path)
        if header.get("format") != FORMAT:
            raise IncompatibleFusion(
                f"{path.name} is format {header.get('format')!r}, this version reads {FORMAT}: train it again"
            )
        if not same_encoder(header["encoder"], encoder):
            raise IncompatibleFusion(
                f"{path.name} was trained on {header['encoder']}, this is {encoder}: "
                "train a fusion for it, or serve its encoder"
            )
        layers = {name: Fusion(FusionConfig(**config)).eval() for name, config in json.loads(header["configs"]).items()}
        _load_weights(layers, tensors)
        fusions: dict[Side, Fusion] = {side: layers.get("shared") or layers[side] for side in SIDES}
        return FusionFile(fusions, int(header["k"]), _fusion_id(layers), json.loads(header["card"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise IncompatibleFusion(
            f"{path.name} is not a fusion file ({type(error).__name__}): give the file that training wrote"
        ) from error


def training_free_fusions(name: str, dim: int, *, alpha: float = 1.0, k: int = 10) -> FusionFile:
    """Fusions without training, for one of RULES as in `preset_config`. Raises ConfigError."""
    if name not in RULES:
        raise ConfigError(f"no training-free rule {name!r}: choose one of {', '.join(RULES)}")
    fusions = build_fusions(name, dim, alpha=alpha)
    fusion_id = _fusion_id(_distinct_layers(fusions))
    return FusionFile(fusions, k, fusion_id, {"trained": False, "rule": name, "alpha": alpha})


def fusions_by_name(name: str, *, encoder: str, dim: int) -> FusionFile:
    """The fusions named by `--fusion`: a file, or one of RULES with its alpha as in "mean:2".

    Raises ConfigError or IncompatibleFusion.
    """
    rule, _, alpha = name.partition(":")
    if rule not in RULES or Path(name).is_file():
        return load_fusions(Path(name), encoder=encoder)
    try:
        return training_free_fusions(rule, dim, alpha=float(alpha or 1))
    except ValueError as error:
        raise ConfigError(f"fusion {name!r}: after the colon stands a number above 0, as in {rule}:2") from error


def _distinct_layers(fusions: Mapping[Side, Fusion]) -> dict[str, Fusion]:
    """The layers by the name under which they are stored; a shared layer once."""
    return (
        {"shared": fusions["image"]}
        if fusions["image"] is fusions["text"]
        else {str(side): fusions[side] for side in SIDES}
    )


def _load_weights(layers: Mapping[str, Fusion], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights into the layers. KeyError or RuntimeError where they do not fit."""
    if set(layers) == set(SIDES):
        share_metrics(layers["image"], layers["text"])
    # strict=False: a tensor that both layers share has two names and is stored under one
    result = nn.ModuleDict(layers).load_state_dict(tensors, strict=False)
    if result.unexpected_keys or not set(result.missing_keys).isdisjoint(_distinct_tensors(layers)):
        raise KeyError(f"{result}")


def _distinct_tensors(layers: Mapping[str, Fusion]) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; a shared one once."""
    module = nn.ModuleDict(layers)
    return {name: value.detach().cpu() for name, value in (*module.named_parameters(), *module.named_buffers())}


def _fusion_id(layers: Mapping[str, Fusion]) -> str:
    digest = hashlib.sha256(
        json.dumps({name: asdict(layer.config) for name, layer in layers.items()}, sort_keys=True).encode()
    )
    for name, tensor in sorted(_distinct_tensors(layers).items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()[:12]
