"""The encoder: any open_clip model, frozen, from images or texts to unit vectors.

torch and open_clip are imported when a model is loaded, not when this module is.
Alphabet: B batch, H W pixels, L tokens, D width, Dt trunk width, Dk key width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from index_store.types import KeyKind, Side
from models.encoder.image_io import MAX_PIXELS, read_image
from models.encoder.image_tower import build_crop, unit_vectors
from models.encoder.loading.load import STARTER, load_model, model_digest
from models.encoder.text_bounds import BoundedTokenizer
from models.encoder.text_tower import TrimmedText
from models.errors import ConfigError, EncoderUnavailable

if TYPE_CHECKING:
    from models.encoder.optimize import OptimizedTowers

__all__ = ["STARTER", "Encoded", "Encoder", "EncoderSpec", "FixedShapes", "Precision", "concatenate_encoded"]

_Runner = Callable[[np.ndarray], list[np.ndarray]]  # a batch -> unit vectors (B, D), and (B, Dt) where there is a trunk
Precision = Literal["fp32", "bf16", "fp16"]
FixedShapes = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Which model to load, and how to run it.

    model: "starter", an open_clip name, the path of an open_clip configuration (.json), or
    "local-dir:" with a folder in the layout of open_clip or, for CLIP and SigLIP, of Hugging Face.
    pretrained: a hub tag, a local weights file, or "random" (seeded; for speed tests); None = the
    .safetensors file beside the configuration.
    device: "auto" is CUDA where there is a GPU.
    fixed_shapes: whether batches are padded to a few sizes up to max_batch, recorded when the model
    is loaded (`cuda_graphs`); "auto" on CUDA alone.
    packed: on the CPU, reorder the weights once for speed (`onednn`); `Encoder.module` can then
    encode, but not be trained or saved.
    tokenizer: a folder with a tokenizer of Hugging Face, in place of the one that the model names.
    """

    model: str = "starter"
    pretrained: str | None = None
    precision: Precision = "fp32"
    device: str = "auto"
    fixed_shapes: FixedShapes = "off"
    max_batch: int = 32
    packed: bool = False
    tokenizer: Path | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """The vectors of an encoded batch.

    vectors: (B, D) float32 unit.  trunk: (B, Dt) float32 unit, the image tower's features before
    its projection; None for texts, and for architectures that do not expose them.
    """

    vectors: np.ndarray
    trunk: np.ndarray | None

    def key(self, kind: KeyKind) -> np.ndarray:
        """(B, Dk) float32 unit, the search keys for this kind of memory. Raises ConfigError."""
        if kind == "vector":
            return self.vectors
        if self.trunk is None:
            raise ConfigError("this encoder shows no trunk features on this side: build the memory with vector keys")
        return self.trunk

    def take(self, rows: Sequence[int]) -> "Encoded":
        """The given rows, as a batch of their own."""
        index = list(rows)
        return Encoded(self.vectors[index], None if self.trunk is None else self.trunk[index])


def concatenate_encoded(blocks: Sequence[Encoded]) -> Encoded:
    """Join batches into one, in order. The trunk is kept where all of them have one."""
    trunks = [block.trunk for block in blocks if block.trunk is not None]
    return Encoded(
        np.concatenate([block.vectors for block in blocks]),
        np.concatenate(trunks) if len(trunks) == len(blocks) else None,
    )


class Encoder:
    """A loaded CLIP model. It is immutable, and `encode` may run in several threads at once.

    fingerprint: MODEL/TAG@DIGEST, the digest being that of the weights.  device: "cpu" or
    "cuda[:n]".
    crop: the resizing of images.
    image_size: (H, W).  context_length: L.  dim: D.  trunk_dim: Dt or None.
    logit_scale: the model's inverse softmax temperature.
    logit_bias: of a model trained with a sigmoid loss (SigLIP), else None.
    trims_texts: whether texts are encoded without their padding (`text_tower`).
    """

    def __init__(self, spec: EncoderSpec, model: Any, tokenizer: Any, fingerprint: str) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self.device = _resolve_device(spec.device)
        self.logit_scale = math.exp(model.logit_scale.item())  # before any rounding to half precision
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else bias.item()
        self._model = _freeze(model, self.device, spec.precision)
        self._tokenizer, self._tokens = tokenizer, BoundedTokenizer(tokenizer)
        self.crop = build_crop(model.visual.preprocess_cfg)
        self.image_size = self.crop.size
        self.context_length = self._tokens.context_length
        towers = self._optimize()
        self.dim, self.trunk_dim = towers.dim, towers.trunk_dim
        self.trims_texts = isinstance(towers.text, TrimmedText)
        self._encode_images, self._encode_texts = self._build_runners(towers)

    @classmethod
    def load(cls, spec: EncoderSpec) -> "Encoder":
        """Load a model. Raises EncoderUnavailable, in one line with the remedy."""
        return cls(spec, *load_model(spec.model, spec.pretrained, spec.tokenizer))

    @property
    def module(self) -> Any:
        """The open_clip model itself, for training and inspection; serving does not use it."""
        return self._model

    def with_model(self, model: Any) -> "Encoder":
        """An encoder of the same kind with other weights, such as a fine-tuned copy of `module`.

        Its fingerprint carries the digest of the new weights.
        """
        label = self.fingerprint.partition("@")[0]
        return Encoder(self.spec, model, self._tokenizer, f"{label}+tuned@{model_digest(model)}")

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """(3, H, W) uint8, resized and cropped as by open_clip; not yet normalized."""
        return self.crop.pixels(image)

    def read_image(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Decode and preprocess untrusted image bytes: (3, H, W) uint8. Raises ImageError."""
        return self.preprocess(read_image(data, max_pixels=max_pixels, target_size=self.image_size))

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """(B, L) int64, cut at the context length, at a bounded cost (`text_bounds`)."""
        return self._tokens(texts)

    def encode(self, batch: np.ndarray, side: Side) -> Encoded:
        """Compute the unit vectors of a batch.

        batch: (B, 3, H, W) uint8 from `preprocess`, or (B, L) int64 from `tokenize`.
        """
        import torch

        with torch.inference_mode():
            vectors, *trunk = self._encode_images(batch) if side == "image" else self._encode_texts(batch)
        return Encoded(vectors, trunk[0] if trunk else None)

    @property
    def fixed_shapes(self) -> bool:
        """Whether batches are padded to a few recorded sizes."""
        return self.spec.fixed_shapes == "on" or (self.spec.fixed_shapes == "auto" and self.device.startswith("cuda"))

    def _optimize(self) -> "OptimizedTowers":
        from models.encoder.optimize import PROBE_TEXTS, optimize_towers

        pack, tokens = self.spec.packed and self.device == "cpu", self.tokenize(PROBE_TEXTS)
        return optimize_towers(self._model, self.device, self.image_size, tokens, name=self.fingerprint, pack=pack)

    def _build_runners(self, towers: "OptimizedTowers") -> "tuple[_Runner, _Runner]":
        """The functions that encode images and texts, recorded at fixed shapes where those are on.

        Texts have fixed shapes only where the text tower can be trimmed.
        """
        import torch

        from models.encoder.cuda_graphs import (
            FixedSizeRunner,
            FixedTextRunner,
            GraphStream,
            fixed_batch_sizes,
            run_unpadded,
        )

        image, text = towers.image, towers.text
        encode_texts = run_unpadded(lambda tokens: [unit_vectors(text(tokens))], self.device)
        if not self.fixed_shapes:
            return run_unpadded(image, self.device), encode_texts
        sizes = fixed_batch_sizes(self.spec.max_batch)
        pixels = torch.zeros(3, *self.image_size, dtype=torch.uint8)
        with torch.inference_mode():  # one stream for each side, so that an image never waits for a list of labels
            encode_images = FixedSizeRunner(image, pixels, sizes, GraphStream(self.device))
            if not isinstance(text, TrimmedText):
                return encode_images, encode_texts
            return encode_images, FixedTextRunner(text, self.context_length, sizes, GraphStream(self.device))


def _resolve_device(wanted: str) -> str:
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise EncoderUnavailable(f"device {wanted!r} was asked for, and torch sees no CUDA device: use cpu or auto")
    return wanted


def _freeze(model: Any, device: str, precision: Precision) -> Any:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return model.eval().requires_grad_(False).to(device=device, dtype=dtypes[precision])
