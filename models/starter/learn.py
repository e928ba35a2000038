"""Training of the starter's text tower and both projections on cached features of the frozen trunk.

A batch holds two captions per photo: each is a positive of the photo and of the other caption
(Flickr8k test T2I R@10 50.8; with one caption 49.4).

Alphabet: N items, V views, C captions, Dt trunk features, B batch, L tokens, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoder.text_tower import build_text_encoder
from models.fusion.losses import info_nce
from models.progress import track

__all__ = ["TokenizedPhotos", "learn", "project", "pseudo_features"]

LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.1, 40
MAX_SCALE = 100.0  # CLIP's own ceiling on the inverse temperature
FEATURE_DROP, WORD_DROP = (
    0.15,
    0.15,
)  # without them the pairs are learned by heart: Flickr8k val I2T R@1 14 instead of 16


@dataclass(frozen=True, slots=True)
class TokenizedPhotos:
    """Photos with several views and several captions.

    features: (N, V, Dt) float32.  tokens: (N, C, L) int64.  group: (N,) int, a batch holds at most
    one photo of a group.
    share: photos per batch.
    """

    features: Tensor
    tokens: Tensor
    group: np.ndarray
    share: int

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw `share` photos of different groups: (B, Dt) one view and (B, 2, L) two different
        captions of each.
        """
        order = rng.permutation(len(self.group))
        _, first = np.unique(self.group[order], return_index=True)
        rows = order[rng.permutation(first)[: self.share]]
        view = rng.integers(self.features.shape[1], size=len(rows))
        captions = self.tokens.shape[1]
        one = rng.integers(captions, size=len(rows))
        another = (one + rng.integers(1, captions, size=len(rows))) % captions
        return self.features[rows, view], torch.stack([self.tokens[rows, one], self.tokens[rows, another]], dim=1)


def learn(model: Any, sources: Sequence[TokenizedPhotos], steps: int, seed: int) -> None:
    """Train `model` (an open_clip CLIP) in place by symmetric InfoNCE over batches joined from all
    sources.
    """
    encode_text, (centre, spread) = build_text_encoder(model), _moments(sources)
    projection = model.visual.head.proj
    nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    nn.init.zeros_(projection.bias)
    trained = [
        *projection.parameters(),
        *(value for name, value in model.named_parameters() if not name.startswith("visual.")),
    ]
    for value in trained:
        value.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    rng = np.random.default_rng(seed)
    for step in track(steps, "encoder", "step"):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(
            (step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        )
        features, tokens = (torch.cat(part) for part in zip(*(source.draw(rng) for source in sources), strict=True))
        # (B, D)
        image = F.normalize(projection(F.dropout((features - centre) / spread, FEATURE_DROP)), dim=-1)
        # (2B, D)
        text = F.normalize(encode_text(drop_tokens(tokens.flatten(0, 1), WORD_DROP, rng)), dim=-1)
        one, another = text.view(len(image), 2, -1).unbind(1)  # (B, D) each
        pairs = ((image, one), (image, another), (one, another))
        loss = torch.stack([info_nce(left, right, model.logit_scale.exp()) for left, right in pairs]).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        model.logit_scale.data.clamp_(max=math.log(MAX_SCALE))
    _fold(projection, centre, spread)


def drop_tokens(tokens: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """(B, L) the texts with each token dropped with probability `share`; start, end and padding
    stay.
    """
    # start, end and padding stay
    ends = (tokens == tokens.max()) | (tokens == tokens.max() - 1) | (tokens == 0)
    kept = ends | torch.from_numpy(rng.random(tuple(tokens.shape), np.float32) >= share)
    order = (~kept).int().argsort(dim=1, stable=True)  # what is left out goes behind the padding
    return (tokens * kept).gather(1, order)


def project(model: Any, features: np.ndarray) -> np.ndarray:
    """(N, D) float32 unit: image vectors of trunk features (N, Dt)."""
    with torch.inference_mode():
        return np.asarray(F.normalize(model.visual.head(torch.from_numpy(features)), dim=-1).numpy())


def pseudo_features(weight: Tensor, photos: Tensor) -> Tensor:
    """(C, Dt) estimated trunk features of a typical photo of each class, from the rows of the
    trunk's classifier.

    weight: (C, Dt) rows of the classifier.  photos: (N, Dt) features of photos of these classes.
    A row is about the class mean divided by the covariance of the features. Multiplied by the
    covariance's root it comes closest to photos of the class (cosine 0.45, the row itself 0.31, on
    the ImageNet sample). The norm is that of a photo.
    """
    centred = photos - photos.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(photos))  # (Dt,), (Dt, Dt)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    toward = F.normalize((weight - weight.mean(dim=0)) @ root, dim=-1)
    made: Tensor = photos.mean(dim=0) + toward * centred.norm(dim=-1).mean()
    return made


def _moments(sources: Sequence[TokenizedPhotos]) -> tuple[Tensor, Tensor]:
    seen = torch.cat([source.features[:, 0] for source in sources])
    centre = seen.mean(dim=0)
    return centre, (seen - centre).std()


@torch.no_grad()
def _fold(projection: nn.Linear, centre: Tensor, spread: Tensor) -> None:
    """Fold the standardisation of the features into the projection."""
    projection.weight.div_(spread)
    projection.bias.sub_(projection.weight @ centre)
