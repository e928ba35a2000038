"""Fine-tuning of a whole encoder on pairs: the baseline of training the fusion alone.

Alphabet: P pairs, B batch, L tokens, D width.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.data.samples import Sample
from models.encoder.encoder import Encoder
from models.encoder.image_tower import normalize_pixels
from models.encoder.text_tower import build_text_encoder
from models.errors import DataError
from models.fusion.losses import info_nce
from models.progress import track


@dataclass(frozen=True, slots=True)
class Tuning:
    """Hyperparameters of full fine-tuning with AdamW, one rate for all weights."""

    steps: int = 100
    batch: int = 64
    learning_rate: float = 3e-5
    seed: int = 0


def fine_tune(encoder: Encoder, samples: Sequence[Sample], tuning: Tuning) -> Encoder:
    """A copy of the encoder after `steps` batches of CLIP's loss on these pairs.

    Batch normalisation keeps its running statistics. Equal captions are no negatives of each other.
    DataError where there are fewer pairs than one batch.
    """
    if len(samples) < tuning.batch:
        raise DataError(
            f"{len(samples)} pairs are fewer than one batch of {tuning.batch}: give more sources to tune on"
        )
    model = copy.deepcopy(encoder.module).float().requires_grad_(True).train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    encode_text = build_text_encoder(model) if encoder.trims_texts else model.encode_text
    rng = np.random.default_rng(tuning.seed)
    # (P, L)
    tokens = torch.from_numpy(encoder.tokenize([sample.caption for sample in samples])).to(encoder.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=tuning.learning_rate, weight_decay=0.1)
    for _ in track(tuning.steps, "full fine-tuning", "step"):
        rows = rng.choice(len(samples), tuning.batch, replace=False)
        text = tokens[rows]
        # (B, D)
        image = model.encode_image(_pixels([samples[row] for row in rows], encoder), normalize=True)
        same = (text[:, None] == text[None]).all(dim=2)  # (B, B)
        loss = info_nce(image, F.normalize(encode_text(text), dim=-1), model.logit_scale.exp(), same=same)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return encoder.with_model(model)


def _pixels(samples: Sequence[Sample], encoder: Encoder) -> Tensor:
    """(B, 3, H, W) float32, normalized as by open_clip."""
    pixels = np.stack([encoder.read_image(sample.image) for sample in samples])
    return normalize_pixels(torch.from_numpy(pixels).to(encoder.device), encoder.module.visual.preprocess_cfg)
