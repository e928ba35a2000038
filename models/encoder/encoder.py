"""The encoder: any open_clip model, frozen. torch comes only where a model is really loaded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from index_store.types import KeyKind, Side
from models.encoder.image_io import MAX_PIXELS, read_image
from models.encoder.image_tower import ImageTower, build_crop, unit
from models.encoder.loading import STARTER, digest, found
from models.encoder.text_tower import TrimmedText, build_text_encoder
from models.errors import ConfigError, EncoderUnavailable

__all__ = ["STARTER", "Encoded", "Encoder", "EncoderSpec", "FixedShapes", "Precision", "concatenate_encoded"]

_Run = Callable[[np.ndarray], list[np.ndarray]]
Precision = Literal["fp32", "bf16", "fp16"]
FixedShapes = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Which model to load, and how.

    model: "starter", an open_clip name, or a path to an open_clip configuration (.json).
    pretrained: a hub tag, a local weights file, or "random" (seeded; for speed tests); None = what stands beside the configuration.
    device: "auto" is CUDA where there is one.
    fixed_shapes: whether batches are padded to a few sizes up to max_batch, recorded when the model is loaded (`replay`); "auto" on CUDA.
    packed: on the CPU, lay out the weights for speed once (`packed`); `module` is then good for nothing but encoding.
    """

    model: str = "starter"
    pretrained: str | None = None
    precision: Precision = "fp32"
    device: str = "auto"
    fixed_shapes: FixedShapes = "off"
    max_batch: int = 32
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder made of a batch.

    vectors: (B, D) float32 unit.  trunk: (B, Dt) float32 unit, the image tower's features before projection, where it shows them.
    """

    vectors: np.ndarray
    trunk: np.ndarray | None

    def key(self, kind: KeyKind) -> np.ndarray:
        """(B, Dk) float32 unit: what a memory with this kind of key is searched with."""
        if kind == "vector":
            return self.vectors
        if self.trunk is None:
            raise ConfigError("this encoder shows no trunk features on this side: build the memory with vector keys")
        return self.trunk

    def take(self, rows: Sequence[int]) -> "Encoded":
        """Some of the items, as a batch of their own."""
        chosen = list(rows)
        return Encoded(self.vectors[chosen], None if self.trunk is None else self.trunk[chosen])


def concatenate_encoded(blocks: Sequence[Encoded]) -> Encoded:
    """Several blocks as one."""
    trunks = [block.trunk for block in blocks if block.trunk is not None]
    return Encoded(
        np.concatenate([block.vectors for block in blocks]),
        np.concatenate(trunks) if len(trunks) == len(blocks) else None,
    )


class Encoder:
    """A loaded CLIP. Immutable, and `encode` may run in several threads at once."""

    def __init__(self, spec: EncoderSpec, model: Any, tokenizer: Any, fingerprint: str) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self.device = _device(spec.device)
        self.logit_scale = math.exp(model.logit_scale.item())  # before any rounding to half precision
        self._model = _frozen(model, self.device, spec.precision)
        if spec.packed and self.device == "cpu":
            from models.encoder.onednn import pack

            pack(self._model)
        self._tokenizer = tokenizer
        self._crop = build_crop(model.visual.preprocess_cfg)
        self.image_size = self._crop.size  # (H, W)
        self.context_length = int(self.tokenize([""]).shape[1])
        self._see, self._read = self._towers()
        probe = self.encode(np.zeros((1, 3, *self.image_size), np.uint8), "image")
        self.dim = probe.vectors.shape[1]
        self.trunk_dim = None if probe.trunk is None else probe.trunk.shape[1]

    @classmethod
    def load(cls, spec: EncoderSpec) -> "Encoder":
        """Load the model or raise EncoderUnavailable, in one line that names the way out."""
        return cls(spec, *found(spec.model, spec.pretrained))

    @property
    def module(self) -> Any:
        """The open_clip model itself, for a script that trains or takes it apart; serving has no use for it."""
        return self._model

    def with_model(self, model: Any) -> "Encoder":
        """This encoder with other weights: what training made of a copy of `module`. Its fingerprint is that of the weights."""
        return Encoder(self.spec, model, self._tokenizer, f"{self.fingerprint.partition('@')[0]}+tuned@{digest(model)}")

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """(3, H, W) uint8: open_clip's own resize and crop; normalising is left to `encode`, on the device."""
        return np.ascontiguousarray(np.asarray(self._crop(image)).transpose(2, 0, 1))

    def read_image(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """`preprocess` of an encoded image, which may come from anyone; or an ImageError."""
        return self.preprocess(read_image(data, max_pixels=max_pixels, frame=self.image_size))

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """(B, L) int64, cut at the context length. Half a surrogate pair, which no tokenizer survives, becomes a "?"."""
        tokens: np.ndarray = self._tokenizer([text.encode("utf-8", "replace").decode() for text in texts]).numpy()
        return tokens

    def encode(self, batch: np.ndarray, side: Side) -> Encoded:
        """The unit vectors of a batch.

        batch: (B, 3, H, W) uint8 from `preprocess`, or (B, L) int64 from `tokenize`.
        """
        import torch

        with torch.inference_mode():
            vectors, *trunk = self._see(batch) if side == "image" else self._read(batch)
        return Encoded(vectors, trunk[0] if trunk else None)

    @property
    def fixed_shapes(self) -> bool:
        """Whether batches are padded to a few recorded sizes."""
        return self.spec.fixed_shapes == "on" or (self.spec.fixed_shapes == "auto" and self.device.startswith("cuda"))

    def _towers(self) -> "tuple[_Run, _Run]":
        """What encodes images, and what encodes texts; each recorded here where shapes are fixed, texts only where they can be trimmed."""
        import torch

        from models.encoder.cuda_graphs import FixedTexts, Replay, Stage, as_they_come, sizes_to

        image, text = ImageTower(self._model, self.device), build_text_encoder(self._model)
        eager = as_they_come(lambda tokens: [unit(text(tokens))], self.device)
        if not self.fixed_shapes:
            return as_they_come(image, self.device), eager
        sizes = sizes_to(self.spec.max_batch)
        with torch.inference_mode():  # a stage for each, so that an image never waits for a list of labels
            see = Replay(image, torch.zeros(3, *self.image_size, dtype=torch.uint8), sizes, Stage(self.device))
            read = (
                FixedTexts(text, self.context_length, sizes, Stage(self.device))
                if isinstance(text, TrimmedText)
                else eager
            )
        return see, read


def _device(wanted: str) -> str:
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise EncoderUnavailable(f"device {wanted!r} was asked for, and torch sees no CUDA device: use cpu or auto")
    return wanted


def _frozen(model: Any, device: str, precision: Precision) -> Any:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return model.eval().requires_grad_(False).to(device=device, dtype=dtypes[precision])
