"""The photos the starter is made from: tar in, features of the frozen image trunk out, kept on disk so that a second run goes on.

Alphabet: N photos, V views, Dt = 1280 features of MobileNetV2 before the projection.
"""

import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

__all__ = ["Photos", "folded", "load_photos"]

SIDE = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 16  # the fastest for this trunk on two cores


@dataclass(frozen=True, slots=True)
class Photos:
    """One split. ids: N strings.  fields: N dicts, the json beside each photo.  features: (N, V, Dt) float32; view 0 is the plain one."""

    ids: list[str]
    fields: list[Mapping[str, Any]]
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Iterable[int]) -> "Photos":
        """The photos of these rows, in this order."""
        chosen = list(rows)
        return Photos([self.ids[row] for row in chosen], [self.fields[row] for row in chosen], self.features[chosen])


def load_photos(tars: list[Path], views: int, trunk: nn.Module, kept: Path, seed: int) -> Photos:
    """Every photo of `tars` through `trunk`; read back from the file `kept` where an earlier run wrote it."""
    ids, fields = _labels(tars)
    if not kept.exists():
        features = np.concatenate(list(_features(tars, len(ids), views, trunk, seed)))  # (N, V, Dt)
        partial = kept.with_suffix(".partial.npy")
        partial.parent.mkdir(parents=True, exist_ok=True)
        np.save(partial, features.astype(np.float16))
        partial.rename(kept)
    return Photos(ids, fields, np.load(kept).astype(np.float32))


def folded(trunk: nn.Module) -> nn.Module:
    """`trunk` with every BatchNorm folded into the convolution before it: the same numbers, a quarter faster. Changes it in place."""
    convolution: tuple[str, nn.Conv2d] | None = None
    for name, child in list(trunk.named_children()):
        if isinstance(child, nn.Conv2d):
            convolution = (name, child)
        elif isinstance(child, nn.BatchNorm2d) and convolution is not None:
            setattr(trunk, convolution[0], fuse_conv_bn_eval(convolution[1], child))
            setattr(trunk, name, getattr(child, "act", nn.Identity()))  # timm's BatchNorm carries the activation
            convolution = None
        else:
            folded(child)
    return trunk


def _members(tars: list[Path]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for path in tars:
        with tarfile.open(path) as archive:
            photo = b""
            for member in archive:
                content = archive.extractfile(member)
                data = content.read() if content else b""
                if member.name.endswith(".jpg"):
                    photo = data
                else:
                    yield member.name.removesuffix(".json"), photo, json.loads(data)


def _labels(tars: list[Path]) -> tuple[list[str], list[Mapping[str, Any]]]:
    keys, fields = [], []
    for key, _, field in _members(tars):
        keys.append(key)
        fields.append(field)
    return keys, fields


def _features(tars: list[Path], count: int, views: int, trunk: nn.Module, seed: int) -> Iterator[np.ndarray]:
    """Blocks of (B, V, Dt) float32 in the order of the tars; decoding overlaps with the network."""
    members = enumerate(_members(tars))
    shift = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1) * 255
    scale = torch.tensor(CLIP_STD).view(1, 3, 1, 1) * 255

    def pixels(numbered: tuple[int, tuple[str, bytes, dict[str, Any]]]) -> np.ndarray:
        row, (_, photo, _) = numbered
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        return np.stack([_plain(image), *(_varied(image, np.random.default_rng([seed, row, view])) for view in range(1, views))])

    with ThreadPoolExecutor(2) as pool, tqdm(total=count, unit="photo", desc=tars[0].stem) as bar, torch.inference_mode():
        ahead = pool.map(pixels, itertools.islice(members, BATCH))
        while block := list(ahead):
            ahead = pool.map(pixels, itertools.islice(members, BATCH))
            batch = torch.from_numpy(np.stack(block)).flatten(0, 1).permute(0, 3, 1, 2)  # (B*V, 3, H, W), channels last
            features = trunk((batch.float() - shift) / scale)  # (B*V, Dt)
            yield features.view(len(block), views, -1).numpy()
            bar.update(len(block))


def _plain(image: Image.Image) -> np.ndarray:
    """open_clip's own view: short side to 224, bicubic, centre crop. (H, W, 3) uint8."""
    shrink = SIDE / min(image.size)
    width, height = (max(SIDE, int(edge * shrink)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def _varied(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The mirror image of a random crop holding 50-100 % of the photo. (H, W, 3) uint8."""
    share = rng.uniform(0.5, 1.0) ** 0.5
    width, height = (edge * share for edge in image.size)
    left, top = rng.uniform(0, image.size[0] - width), rng.uniform(0, image.size[1] - height)
    crop = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
