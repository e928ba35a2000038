"""Data sets of the starter, with the features of its frozen image trunk."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from models.encoder.encoder import Encoder
from models.starter.photos import DataSet, FeatureReader, fold_batch_norms

SEED = 0
# rows of Flickr8k val withheld from the encoder, on which the fusion is trained
UNSEEN_ROWS = 300


@dataclass(frozen=True, slots=True, eq=False)
class DataSets:
    """The data sets with their features."""

    flickr: DataSet
    flickr_unseen: DataSet
    flickr_test: DataSet
    imagenet: DataSet
    caltech: DataSet
    caltech_test: DataSet
    imagen: DataSet
    grocery: DataSet
    grocery_test: DataSet


def load_trunk(encoder: Encoder, data: Path) -> None:
    """Load MobileNetV2 into the image tower, with its input scaling folded into the first
    convolution, in float16.

    MobileNetV2 expects pixels in [-1, 1], open_clip gives (pixel - mean) / std.
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


def read_all(encoder: Encoder, data: Path, folder: Path) -> DataSets:
    """Read every data set through the trunk; those that the encoder is trained on in two views."""
    trunk = fold_batch_norms(copy.deepcopy(encoder.module.visual.trunk)).to(memory_format=torch.channels_last)
    reader = FeatureReader(encoder, trunk, folder, SEED)

    def read(name: str, pattern: str, caption: str | None, views: int = 1) -> DataSet:
        return reader.read(name, sorted(data.glob(pattern)), caption=caption, views=views)

    caltech = read("caltech101", "caltech101/*.tar", "{class}")
    split, is_object = caltech.column("split"), caltech.column("class") != "BACKGROUND_Google"
    val = read("flickr8k-val", "flickr8k/val-*.tar", None, views=2)
    return DataSets(
        flickr=read("flickr8k-train", "flickr8k/train-*.tar", None, views=2).concatenate(
            val.take(range(UNSEEN_ROWS, len(val)))
        ),
        flickr_unseen=val.take(range(UNSEEN_ROWS)),
        flickr_test=read("flickr8k-test", "flickr8k/test-*.tar", None),
        imagenet=read("imagenet_sample", "imagenet_sample/*.tar", "{class}", views=2),
        caltech=caltech.take(np.flatnonzero(is_object & (split == "train"))),
        caltech_test=caltech.take(np.flatnonzero(is_object & (split == "test"))),
        imagen=read("imagen", "imagen/*.tar", "{class}"),
        grocery=read("grocery-train", "grocery/train-*.tar", "{class}"),
        grocery_test=read("grocery-test", "grocery/test-*.tar", "{class}"),
    )
