"""The fusion network: one light transformer layer that refines an embedding with what the memory returned.

    query (B, D) ──┐                                      ┌─ no neighbour: the query itself
    values (B, K, D) ─ tokens ─ start ─ + attend ─ + mlp ─┴─ unit ─> (B, D)

Only token 0, the query's, is read out, so only its row of the layer is computed: queries, output projection and MLP for
one token, keys and values for all. The numbers are those of the full layer at about a quarter of the work.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from index_store.pairs import Side
from models.errors import ConfigError

Start = Literal["identity", "mean"]
Layers = Literal["transformer", "mlp", "none"]
PRESETS = ("default", "paper", "paper-split", "mlp")  # what can be trained
RULES = ("none", "mean", "core")  # what needs no training
CORE_TEMPERATURE = 20.0  # the best on the starter's lessons among 0, 10, 20, 30, 40 and 60; flat from 20 on


@dataclass(frozen=True, slots=True)
class FusionConfig:
    """The shape of one fusion layer.

    start: what the untrained layer gives: "identity" the query, "mean" the training-free rule unit(query + alpha * mean(values)).
    layers: what is learned on top; "mlp" never looks at a neighbour, "none" leaves the start alone.
    temperature: of the softmax over the scores that weights the mean, where learning begins; 0 weights all alike.
    """

    dim: int
    heads: int
    mlp_ratio: float
    rank_vectors: bool  # one learned vector per token position: the layer then sees the rank of each neighbour
    max_k: int
    dropout: float = 0.0
    start: Start = "mean"
    alpha: float = 1.0  # the useful strength differs by task: at most 1 for sentences, 2 to 8 for class captions
    temperature: float = 0.0
    layers: Layers = "transformer"

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"a fusion of width {self.dim} cannot have {self.heads} heads: choose a divisor of {self.dim}")
        if self.max_k < 1 or self.alpha <= 0:
            raise ConfigError(f"a fusion needs max_k >= 1 and alpha > 0, not {self.max_k} and {self.alpha}")


def preset(name: str, dim: int, *, alpha: float = 1.0) -> FusionConfig:
    """The configuration of a named preset; `alpha` matters to "default", "mean" and "core" alone.

    "paper" and "paper-split" are the two layouts that meet the paper's 3.16 M parameters at D = 512. "mlp" is a baseline of that
    size without retrieval. "none" is plain CLIP, "mean" the mean of the neighbours, "core" CoRE's softmax-weighted mean.
    """
    heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)  # 64 wide, as in CLIP
    if name == "default":
        return FusionConfig(dim, heads, mlp_ratio=1, rank_vectors=False, max_k=100, start="mean", alpha=alpha)
    if name == "paper":
        return FusionConfig(dim, heads, mlp_ratio=4, rank_vectors=True, max_k=10, start="identity")
    if name == "paper-split":
        return FusionConfig(dim, heads, mlp_ratio=1, rank_vectors=False, max_k=100, start="identity")
    if name == "mlp":  # as many numbers as "default" has, and no neighbour among what it reads
        return FusionConfig(dim, heads, mlp_ratio=3, rank_vectors=False, max_k=100, start="identity", layers="mlp")
    if name in RULES:
        start: Start = "identity" if name == "none" else "mean"
        temperature = CORE_TEMPERATURE if name == "core" else 0.0
        return FusionConfig(
            dim, 1, mlp_ratio=0, rank_vectors=False, max_k=100, start=start, alpha=alpha, temperature=temperature, layers="none"
        )
    raise ConfigError(f"unknown fusion preset {name!r}: choose one of {', '.join((*PRESETS, *RULES))}")


class Fused(NamedTuple):
    """What a fusion gives. vectors: (B, D) float32 unit.  weights: (B, K) float32, the attention paid to each neighbour."""

    vectors: Tensor
    weights: Tensor


class Attention(nn.Module):
    """Multi-head attention asked by one token. It ends in zeros: untrained, it adds nothing."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key_value = nn.Linear(config.dim, 2 * config.dim)
        self.out = _zeroed(nn.Linear(config.dim, config.dim))

    def forward(self, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """What token 0 gathers.

        tokens: (B, T, D).  present: (B, T) bool.  Returns (B, D) and the weights (B, T), averaged over the heads.
        """
        query = self.query(tokens[:, 0]).unflatten(-1, (self.heads, -1))  # (B, h, d)
        key, value = self.key_value(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, T, h, d) each
        logits = torch.einsum("bhd,bthd->bht", query, key) / math.sqrt(query.shape[-1])
        weights = masked_softmax(logits, present[:, None])  # (B, h, T)
        gathered = torch.einsum("bht,bthd->bhd", weights, value).flatten(1)  # (B, D)
        return self.out(gathered), weights.mean(1)


class Mlp(nn.Module):
    """Two linear layers around a GELU, ending in zeros."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = round(config.dim * config.mlp_ratio)
        self.widen = nn.Linear(config.dim, width)
        self.narrow = _zeroed(nn.Linear(width, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        narrowed: Tensor = self.narrow(F.gelu(self.widen(x)))
        return narrowed


class Pool(nn.Module):
    """The training-free rule with four learned numbers: alpha * weighted mean of the values.

    The weights are a softmax of temperature * score, uniform at temperature 0. Alpha is one number at first; learned, it may follow
    how near the best neighbour is and how much the values agree (the length of their mean), which tells class captions
    from sentences without naming the task.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.strength = _zeroed(nn.Linear(2, 1))
        nn.init.constant_(self.strength.bias, math.log(config.alpha))

    def forward(self, values: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """values: (B, K, D).  scores, mask: (B, K).  Returns what to add to the query (B, D) and the weights (B, K)."""
        weights = masked_softmax(self.temperature * scores, mask)
        mean = torch.einsum("bk,bkd->bd", weights, values)
        nearest = F.pad(torch.where(mask, scores, -1.0), (1, 0), value=-1.0).amax(1)  # (B,), -1 where there is none
        agreement = torch.sqrt(mean.square().sum(1) + 1e-12)  # (B,), with a gradient at 0
        alpha = self.strength(torch.stack([nearest, agreement], 1)).exp()  # (B, 1)
        return alpha * mean, weights


class Fusion(nn.Module):
    """One pre-norm transformer layer over the query and its K neighbours, read at the query."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.rank = nn.Parameter(torch.zeros(config.max_k + 1, config.dim)) if config.rank_vectors else None
        self.pool = Pool(config) if config.start == "mean" else None
        transformer, some = config.layers == "transformer", config.layers != "none"
        self.norm_tokens = nn.LayerNorm(config.dim) if transformer else None
        self.attention = Attention(config) if transformer else None
        self.norm_mlp = nn.LayerNorm(config.dim) if some else None
        self.mlp = Mlp(config) if some else None
        self.dropout = nn.Dropout(config.dropout)

    @property
    def refines(self) -> bool:
        """False where no neighbour can change anything: plain CLIP behind this face."""
        return self.pool is not None or self.mlp is not None

    def forward(self, query: Tensor, values: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """The refined query. Shapes as in `fuse`; returns (B, D) unit."""
        return self.fuse(query, values, scores, mask).vectors

    def fuse(self, query: Tensor, values: Tensor, scores: Tensor, mask: Tensor) -> Fused:
        """The refined query, and how much each neighbour was attended to.

        query: (B, D) unit.  values: (B, K, D).  scores: (B, K).  mask: (B, K) bool, True = present.
        A row without any neighbour is its query, bit for bit.
        """
        if values.shape[1] > self.config.max_k:
            raise ConfigError(f"{values.shape[1]} neighbours, but this fusion takes at most {self.config.max_k}: ask for a smaller k")
        tokens = torch.cat([query[:, None], values], 1)  # (B, 1+K, D)
        if self.rank is not None:
            tokens = tokens + self.rank[: tokens.shape[1]]
        x, weights = tokens[:, 0], torch.zeros_like(scores)
        if self.pool is not None:
            pooled, weights = self.pool(values, scores, mask)
            x = x + pooled
        if self.attention is not None and self.norm_tokens is not None:
            present = F.pad(mask, (1, 0), value=True)  # (B, 1+K): the query always sees itself
            attended, attention = self.attention(self.norm_tokens(tokens), present)
            x = x + self.dropout(attended)
            weights = attention[:, 1:] if self.pool is None else weights
        if self.mlp is not None and self.norm_mlp is not None:
            x = x + self.dropout(self.mlp(self.norm_mlp(x)))
        refined = torch.where(mask.any(1, keepdim=True), F.normalize(x, dim=-1), query)
        return Fused(refined if self.refines else query, weights)


def build_fusions(name: str, dim: int, *, alpha: float = 1.0) -> Mapping[Side, Fusion]:
    """One untrained fusion per side, as the preset lays them out: "paper" shares one layer, the others have two."""
    config = preset(name, dim, alpha=alpha)
    image = Fusion(config)
    return {"image": image, "text": image if name == "paper" else Fusion(config)}


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """A softmax over the last axis among the present; zeros where nothing is present (and gradients without NaN).

    The one place where a mask of the present is inverted.
    """
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~mask, lowest).softmax(-1) * mask


def _zeroed(linear: nn.Linear) -> nn.Linear:
    """The same layer, starting at zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
