"""The data sets that the starter is made of, read once through the frozen trunk."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from models.encoder.encoder import Encoder
from models.starter.photos import Photos, Reader, folded

SEED = 0
# photos of Flickr8k val that the encoder never sees, for the lessons of the fusion
SENTENCES_KEPT = 300


@dataclass(frozen=True, slots=True, eq=False)
class Everything:
    """The data sets, read once."""

    flickr: Photos
    flickr_unseen: Photos
    flickr_test: Photos
    imagenet: Photos
    caltech: Photos
    caltech_test: Photos
    imagen: Photos
    grocery: Photos
    grocery_test: Photos


def load_trunk(encoder: Encoder, data: Path) -> None:
    """MobileNetV2 into the image tower, as it will be served: its own input scaling folded away, in
    float16.

    It wants pixels in [-1, 1], open_clip gives (pixel - mean) / std: the first convolution takes
    the difference.
    """
    weights = load_file(data / "mobilenetv2" / "mobilenetv2_100.safetensors")
    preprocess = encoder.module.visual.preprocess_cfg
    mean, std = (torch.tensor(preprocess[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    stem = weights["conv_stem.weight"].float()  # (32, 3, 3, 3)
    weights["conv_stem.weight"] = stem * 2 * std
    weights["bn1.running_mean"] = weights["bn1.running_mean"].float() - (stem * (2 * mean - 1)).sum((1, 2, 3))
    kept = {name: value.half().float() for name, value in weights.items() if not name.startswith("classifier")}
    # num_batches_tracked alone is missing
    encoder.module.visual.trunk.load_state_dict(kept, strict=False)


def read_all(encoder: Encoder, data: Path, folder: Path) -> Everything:
    """Every data set through the trunk; what the encoder learns from in two views."""
    trunk = folded(copy.deepcopy(encoder.module.visual.trunk)).to(memory_format=torch.channels_last)
    reader = Reader(encoder, trunk, folder, SEED)

    def read(name: str, pattern: str, caption: str | None, views: int = 1) -> Photos:
        return reader.read(name, sorted(data.glob(pattern)), caption=caption, views=views)

    caltech = read("caltech101", "caltech101/*.tar", "{class}")
    split, thing = caltech.column("split"), caltech.column("class") != "BACKGROUND_Google"
    val = read("flickr8k-val", "flickr8k/val-*.tar", None, views=2)
    return Everything(
        flickr=read("flickr8k-train", "flickr8k/train-*.tar", None, views=2).with_(
            val.take(range(SENTENCES_KEPT, len(val)))
        ),
        flickr_unseen=val.take(range(SENTENCES_KEPT)),
        flickr_test=read("flickr8k-test", "flickr8k/test-*.tar", None),
        imagenet=read("imagenet_sample", "imagenet_sample/*.tar", "{class}", views=2),
        caltech=caltech.take(np.flatnonzero(thing & (split == "train"))),
        caltech_test=caltech.take(np.flatnonzero(thing & (split == "test"))),
        imagen=read("imagen", "imagen/*.tar", "{class}"),
        grocery=read("grocery-train", "grocery/train-*.tar", "{class}"),
        grocery_test=read("grocery-test", "grocery/test-*.tar", "{class}"),
    )
