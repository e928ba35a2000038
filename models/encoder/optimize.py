"""Optimisations of a loaded CLIP model, each verified on a probe batch before it is used.

    probe batch ─┬─ open_clip's own tower, once ─────────┬─ cosine >= MIN_COSINE: used
                 ├─ with trimmed texts ──────────────────┤  else: left off, one log line
                 └─ with packed layers ──────────────────┘

Packing (`onednn`) and trimming (`text_tower`) rely on how open_clip builds its towers. An
architecture that they do not fit must neither fail nor get other vectors.
Alphabet: B batch, L tokens, H W pixels, D width, Dt trunk width.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from models.encoder.image_tower import ImageTower, unit_vectors
from models.encoder.onednn import pack_layers, packs_dtype, record_layer_calls, unpack_layers
from models.encoder.text_tower import TrimmedText, trimmed_text

__all__ = ["PROBE_TEXTS", "OptimizedTowers", "optimize_towers"]

log = logging.getLogger("reco")

# Shorter than any context length, so that there is padding to trim, and of unequal lengths. Two
# texts, because some faults appear in batches alone (CoCa's mask of every text and head).
PROBE_TEXTS = ("two dogs run along a beach at dawn", "a cat")
# Cosine of optimised and plain vectors. Rounding alone leaves at least 0.999999 in float32 and
# float16, 0.99995 in bfloat16 (ViT-B-32 with trimmed texts).
MIN_COSINE = {torch.float32: 0.9999, torch.float16: 0.9999, torch.bfloat16: 0.999}
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)

Vectors = Sequence[Tensor]  # [(B, D)] or [(B, D), (B, Dt)], float32 unit


@dataclass(frozen=True, slots=True)
class OptimizedTowers:
    """The two functions by which a model encodes.

    text: (B, L) int64 -> (B, D), not normalized.  dim: D.
    trunk_dim: Dt, None where the image tower exposes no features before its projection.
    """

    image: ImageTower
    text: Callable[[Tensor], Tensor]
    dim: int
    trunk_dim: int | None


def optimize_towers(
    model: Any, device: str, image_size: tuple[int, int], tokens: np.ndarray, *, name: str, pack: bool
) -> OptimizedTowers:
    """Trim the texts of a frozen open_clip model and, with `pack`, pack its layers, where it fits.

    Layers are packed in place.  image_size: (H, W).  tokens: (2, L) int64, PROBE_TEXTS tokenized
    for this model.  name: what log lines call the model.
    """
    image, texts = ImageTower(model, device), torch.from_numpy(tokens).to(device)
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, *image_size), dtype=np.uint8)
    pixels = torch.from_numpy(noise).to(device)
    pack = pack and packs_dtype(image.dtype)
    with torch.inference_mode():
        text = _optimize_text(model, texts, name, pack=pack)
        if pack:
            vectors, layers = _run_recorded(model, lambda: image(pixels))
            _pack_if_equal(model, layers, lambda: image(pixels), vectors, f"the image tower of {name}")
        else:
            vectors = image(pixels)
    return OptimizedTowers(image, text, vectors[0].shape[1], vectors[1].shape[1] if len(vectors) > 1 else None)


def _optimize_text(model: Any, texts: Tensor, name: str, *, pack: bool) -> Callable[[Tensor], Tensor]:
    """The trimmed text tower if it gives equal vectors, else open_clip's own encode_text.

    With `pack` its layers are packed. One pass of the plain tower is what both are compared with.
    """
    trimmed, encode_text = trimmed_text(model), cast(Callable[[Tensor], Tensor], model.encode_text)
    if trimmed is None and not pack:
        return encode_text
    plain, layers = _run_recorded(model, lambda: [unit_vectors(encode_text(texts))])
    text = encode_text
    if trimmed is not None and _trims_equally(model, trimmed, texts, plain, name):
        text = trimmed
    if pack:
        _pack_if_equal(model, layers, lambda: [unit_vectors(text(texts))], plain, f"the text tower of {name}")
    return text


def _trims_equally(model: Any, trimmed: TrimmedText, texts: Tensor, plain: Vectors, name: str) -> bool:
    difference = _difference(lambda: [unit_vectors(trimmed(texts))], plain, model)
    if difference:
        log.warning("the text tower of %s encodes whole texts, slower than trimmed ones: trimmed, %s", name, difference)
    return not difference


def _run_recorded(model: Any, encode: Callable[[], Vectors]) -> tuple[Vectors, Collection[nn.Module]]:
    """The vectors of a tower, and the layers that it calls."""
    with record_layer_calls(model) as layers:
        return encode(), layers


def _pack_if_equal(
    model: Any, layers: Collection[nn.Module], encode: Callable[[], Vectors], plain: Vectors, name: str
) -> None:
    """Pack these layers of a tower, and unpack them if its vectors are not the plain ones."""
    replaced = pack_layers(model, layers)
    difference = _difference(encode, plain, model)
    if difference:
        unpack_layers(replaced)
        log.warning("%s keeps unpacked weights, slower than packed ones: packed, %s", name, difference)


def _difference(encode: Callable[[], Vectors], plain: Vectors, model: Any) -> str:
    """What is wrong with the vectors of an optimised tower; "" where they equal the plain ones."""
    needed = MIN_COSINE[model.logit_scale.dtype]
    try:
        cosine = min(float((ours * own).sum(1).min()) for ours, own in zip(encode(), plain, strict=True))
    except _FAILURES as error:
        return f"it fails with {type(error).__name__} ({' '.join(str(error).split())[:100]})"
    if cosine >= needed:  # False for NaN
        return ""
    return f"its vectors have a cosine of {cosine:.6f} with the plain ones, {needed} is needed"
