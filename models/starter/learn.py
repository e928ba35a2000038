"""Train the starter's text tower and both projections on cached trunk features; the trunk itself stays as it was.

Alphabet: N items, V views, C captions, Dt trunk features, B batch, L tokens, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

__all__ = ["Source", "encode_tokens", "learn", "pseudo_features"]

LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.1, 40
MAX_SCALE = 100.0  # CLIP's own ceiling on the inverse temperature


@dataclass(frozen=True, slots=True)
class Source:
    """Items with several views and several captions. features: (N, V, Dt) float32.  tokens: (N, C, L) int64.  group: (N,) int, at most one item of a group enters a batch.  share: items per batch."""

    features: Tensor
    tokens: Tensor
    group: np.ndarray
    share: int

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(B, Dt) a random blend of two views and (B, L) one caption, of `share` items from different groups."""
        order = rng.permutation(len(self.group))
        _, first = np.unique(self.group[order], return_index=True)
        rows = order[rng.permutation(first)[: self.share]]
        views, blend = rng.integers(self.features.shape[1], size=(2, len(rows))), torch.from_numpy(rng.random((len(rows), 1), np.float32))
        features = blend * self.features[rows, views[0]] + (1 - blend) * self.features[rows, views[1]]
        return features, self.tokens[rows, rng.integers(self.tokens.shape[1], size=len(rows))]


def learn(model: nn.Module, sources: Sequence[Source], steps: int, seed: int) -> None:
    """Symmetric InfoNCE over batches joined from all sources; changes `model` (an open_clip CLIP) in place."""
    centre, spread = _moments(sources)
    projection = model.visual.head.proj
    nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    nn.init.zeros_(projection.bias)
    trained = [*projection.parameters(), *(value for name, value in model.named_parameters() if not name.startswith("visual."))]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    rng, bar = np.random.default_rng(seed), trange(steps, desc="encoder", unit="step")
    for step in bar:
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        features, tokens = (torch.cat(part) for part in zip(*(source.draw(rng) for source in sources), strict=True))
        image = F.normalize(projection((features - centre) / spread), dim=-1)  # (B, D)
        loss = _info_nce(image, F.normalize(encode_tokens(model, tokens), dim=-1), model.logit_scale.exp())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        model.logit_scale.data.clamp_(max=math.log(MAX_SCALE))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    _fold(projection, centre, spread)


def encode_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, D) as open_clip's encode_text, without computing the padding after the longest text of the batch: attention is causal, so the numbers are the same."""
    length = int(tokens.argmax(dim=-1).max()) + 1  # the end-of-text token has the highest id
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]  # (B, L, width)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection


def pseudo_features(weight: Tensor, photos: Tensor) -> Tensor:
    """Where the trunk would put a typical photo of each ImageNet class, read from its classifier.

    weight: (1000, Dt) rows of the classifier.  photos: (N, Dt) features of any photos.  Returns (1000, Dt).  For a linear discriminant
    row = covariance⁻¹ (class mean − mean), so covariance · row points at the class mean; its length is set to that of a photo.
    """
    centred = photos - photos.mean(dim=0)
    covariance = centred.T @ centred / len(photos)  # (Dt, Dt)
    toward = F.normalize((weight - weight.mean(dim=0)) @ covariance, dim=-1)
    return photos.mean(dim=0) + toward * centred.norm(dim=-1).mean()


def _moments(sources: Sequence[Source]) -> tuple[Tensor, Tensor]:
    seen = torch.cat([source.features[:, 0] for source in sources])
    return seen.mean(dim=0), seen.std(dim=0) + 1e-3


def _info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    scores, target = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


@torch.no_grad()
def _fold(projection: nn.Linear, centre: Tensor, spread: Tensor) -> None:
    """Take the standardisation of the features into the projection."""
    projection.weight /= spread
    projection.bias -= projection.weight @ centre
