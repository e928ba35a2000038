"""Photos of the starter's data sets and the trunk features of their views, cached on disk.

Alphabet: N photos, V views, B batch, Dt = 1280 features of MobileNetV2 before the projection.
"""

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.data.samples import Sample
from models.data.sources import read_samples
from models.encoder.encoder import Encoder
from models.encoder.image_io import read_image
from models.progress import progress

BATCH = 16  # the fastest for this trunk on two cores


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """One data set.

    ids: N strings.  captions: N lists of at least one.  fields: N dicts.  features: (N, V, Dt)
    float32, view 0 without augmentation.
    """

    ids: Sequence[str]
    captions: Sequence[Sequence[str]]
    fields: Sequence[Mapping[str, Any]]
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Iterable[int]) -> "DataSet":
        """The photos of these rows, in this order."""
        chosen = list(rows)
        captions, fields = [self.captions[row] for row in chosen], [self.fields[row] for row in chosen]
        return DataSet([self.ids[row] for row in chosen], captions, fields, self.features[chosen])

    def concatenate(self, others: "DataSet") -> "DataSet":
        """These photos, then the others."""
        features = np.concatenate([self.features, others.features])
        return DataSet(
            [*self.ids, *others.ids], [*self.captions, *others.captions], [*self.fields, *others.fields], features
        )

    def column(self, field: str) -> np.ndarray:
        """(N,) one field of every photo."""
        return np.array([record[field] for record in self.fields])

    @property
    def keys(self) -> np.ndarray:
        """(N, Dt) float32 unit: features of view 0 as search keys."""
        plain = self.features[:, 0]
        return np.asarray(plain / np.linalg.norm(plain, axis=1, keepdims=True))


class FeatureReader:
    """Reads data sets through one trunk.

    folder: the cache of features.
    """

    def __init__(self, encoder: Encoder, trunk: nn.Module, folder: Path, seed: int) -> None:
        self._encoder, self._trunk, self._folder, self._seed = encoder, trunk, folder, seed
        preprocess = encoder.module.visual.preprocess_cfg
        self._mean, self._std = (torch.tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, tars: Sequence[Path], *, caption: str | None = None, views: int = 1) -> DataSet:
        """Every photo of the tars with its captions (as read_samples gives them) and features of
        `views` views.
        """
        samples = [item for tar in tars for item in read_samples(tar, caption=caption) if isinstance(item, Sample)]
        photos = [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.id.split("#")[0])]
        kept = self._folder / f"{name}.npy"
        if not kept.exists():
            partial = self._folder / f"{name}.partial.npy"
            np.save(partial, np.concatenate(list(self._features(name, [group[0].image for group in photos], views))))
            partial.replace(kept)
        ids = [group[0].id.split("#")[0] for group in photos]
        captions = [[sample.caption for sample in group] for group in photos]
        return DataSet(ids, captions, [group[0].metadata for group in photos], np.load(kept))

    def _features(self, name: str, images: Sequence[bytes], views: int) -> Iterator[np.ndarray]:
        """(B, V, Dt) float32 blocks in order; the next batch is decoded while the network runs."""
        blocks = [range(at, min(at + BATCH, len(images))) for at in range(0, len(images), BATCH)]

        def decoded(rows: range) -> np.ndarray:
            return np.stack(
                [self._views(name, row, read_image(images[row]), views) for row in rows]
            )  # (B, V, 3, H, W) uint8

        with (
            ThreadPoolExecutor(1) as pool,
            progress(len(images), name, "photo") as meter,
            torch.inference_mode(),
        ):
            ahead = [pool.submit(decoded, rows) for rows in blocks[:2]]
            for number, rows in enumerate(blocks):
                pixels = torch.from_numpy(ahead.pop(0).result()).flatten(0, 1)  # (B*V, 3, H, W)
                ahead += [pool.submit(decoded, later) for later in blocks[number + 2 : number + 3]]
                features = self._trunk(
                    ((pixels / 255 - self._mean) / self._std).to(memory_format=torch.channels_last)
                )  # (B*V, Dt)
                yield features.view(len(rows), views, -1).numpy()
                meter.advance(len(rows))

    def _views(self, name: str, row: int, image: Image.Image, views: int) -> np.ndarray:
        """(V, 3, H, W) uint8: the view that serving uses, then mirrored random crops of 50-100 % of
        the photo.
        """
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode()), row])
        return np.stack(
            [self._encoder.preprocess(view) for view in (image, *(_crop(image, rng) for _ in range(1, views)))]
        )


def fold_batch_norms(trunk: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, in place: equal results, a quarter
    faster.
    """
    before: tuple[str, nn.Conv2d] | None = None
    for name, child in list(trunk.named_children()):
        if isinstance(child, nn.Conv2d):
            before = (name, child)
        elif isinstance(child, nn.BatchNorm2d) and before is not None:
            setattr(trunk, before[0], fuse_conv_bn_eval(before[1], child))
            # timm's BatchNorm carries the activation
            setattr(trunk, name, getattr(child, "act", nn.Identity()))
            before = None
        else:
            fold_batch_norms(child)
    return trunk


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    share = rng.uniform(0.5, 1.0) ** 0.5
    width, height = (round(edge * share) for edge in image.size)
    left, top = (int(rng.integers(edge - part + 1)) for edge, part in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
