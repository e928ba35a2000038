"""Optimisations of a loaded CLIP model, each verified on a probe batch before it is used.

    probe batch ─┬─ open_clip's own tower ───────────────┬─ cosine >= MIN_COSINE: used
                 └─ with packed layers or trimmed texts ─┘  else: left off, one log line

Packing (`onednn`) and trimming (`text_tower`) rely on how open_clip builds its towers. An
architecture that they do not fit must neither fail nor get other vectors.
Alphabet: B batch, L tokens, H W pixels, D width, Dt trunk width.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from models.encoder.image_tower import ImageTower, unit_vectors
from models.encoder.onednn import pack_layers, packs_dtype, record_layer_calls, unpack_layers
from models.encoder.text_tower import trimmed_text

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
    with torch.inference_mode():
        text = _choose_text_encoder(model, texts[:1], name)
        if pack and packs_dtype(image.dtype):
            _pack_if_equal(model, lambda: [unit_vectors(text(texts))], f"the text tower of {name}")
            vectors = _pack_if_equal(model, lambda: image(pixels), f"the image tower of {name}")
        else:
            vectors = image(pixels)
    return OptimizedTowers(image, text, vectors[0].shape[1], vectors[1].shape[1] if len(vectors) > 1 else None)


def _choose_text_encoder(model: Any, tokens: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """The trimmed text tower if it gives equal vectors, else open_clip's own encode_text."""
    trimmed, encode_text = trimmed_text(model), cast(Callable[[Tensor], Tensor], model.encode_text)
    if trimmed is None:
        return encode_text
    plain = [unit_vectors(encode_text(tokens))]
    difference = _difference(lambda: [unit_vectors(trimmed(tokens))], plain, model)
    if difference:
        log.warning("the text tower of %s encodes whole texts, slower than trimmed ones: trimmed, %s", name, difference)
        return encode_text
    return trimmed


def _pack_if_equal(model: Any, encode: Callable[[], Vectors], name: str) -> Vectors:
    """Pack the layers that a tower calls, and unpack them if its vectors change.

    Returns the plain vectors.
    """
    with record_layer_calls(model) as layers:
        plain = encode()
    replaced = pack_layers(model, layers)
    difference = _difference(encode, plain, model)
    if difference:
        unpack_layers(replaced)
        log.warning("%s keeps unpacked weights, slower than packed ones: packed, %s", name, difference)
    return plain


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
