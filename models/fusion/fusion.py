"""The fusion: one light layer that refines an embedding with what the memory returned.

    query (B, D) ──┐                                      ┌─ no neighbour: the query itself
    values (B, K, D) ─ tokens ─ start ─ + attend ─ + mlp ─┴─ unit ─> (B, D)

The start is the query (`paper`, `paper-split`) or the training-free rule, whose few numbers learn (`Pool`, `Metric`). `default` is the
learned rule alone: the matrices of a layer on top of it learn the training entities by heart (`corrected`; docs/concepts/results.md).

Only token 0, the query's, is read out, so only its row of the layer is computed: queries, output projection and MLP for
one token, keys and values for all. The numbers are those of the full layer at about a quarter of the work.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from index_store.types import Side
from models.errors import ConfigError

Start = Literal["identity", "mean"]
Layers = Literal["transformer", "mlp", "none"]
PRESETS = ("default", "corrected", "paper", "paper-split", "mlp")  # what can be trained
RULES = ("none", "mean", "core")  # what needs no training
CORE_TEMPERATURE = 20.0  # the best on the starter's lessons among 0, 10, 20, 30, 40 and 60; flat from 20 on


@dataclass(frozen=True, slots=True)
class FusionConfig:
    """The shape of one fusion layer.

    start: what the untrained layer gives: "identity" the query, "mean" the training-free rule unit(query + alpha * mean(values)).
    layers: what is learned on top; "mlp" never looks at a neighbour, "none" leaves the start alone.
    temperature: of the softmax over the scores that weights the mean, where learning begins; 0 weights all alike.
    metric: whether the rule learns how vectors are compared.
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
    metric: bool = False
    layers: Layers = "transformer"

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(
                f"a fusion of width {self.dim} cannot have {self.heads} heads: choose a divisor of {self.dim}"
            )
        if self.max_k < 1 or self.alpha <= 0:
            raise ConfigError(f"a fusion needs max_k >= 1 and alpha > 0, not {self.max_k} and {self.alpha}")


def preset_config(name: str, dim: int, *, alpha: float = 1.0) -> FusionConfig:
    """The configuration of a named preset; `alpha` matters to "default", "corrected", "mean" and "core" alone.

    "default" is the training-free rule with its numbers learned, "corrected" has a transformer layer on top. "paper" and "paper-split" are
    the two layouts that meet the paper's 3.16 M parameters at D = 512. "mlp" is a baseline of that size without retrieval. "none" is plain
    CLIP, "mean" the mean of the neighbours, "core" CoRE's softmax-weighted mean.
    """
    heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)  # 64 wide, as in CLIP
    if name in ("default", "corrected"):
        layers: Layers = "none" if name == "default" else "transformer"
        return FusionConfig(
            dim,
            heads,
            mlp_ratio=1,
            rank_vectors=False,
            max_k=100,
            start="mean",
            alpha=alpha,
            metric=True,
            layers=layers,
        )
    if name == "paper":
        return FusionConfig(dim, heads, mlp_ratio=4, rank_vectors=True, max_k=10, start="identity")
    if name == "paper-split":
        return FusionConfig(dim, heads, mlp_ratio=1, rank_vectors=False, max_k=100, start="identity")
    if name == "mlp":  # as many numbers as "paper-split" has, and no neighbour among what it reads
        return FusionConfig(dim, heads, mlp_ratio=3, rank_vectors=False, max_k=100, start="identity", layers="mlp")
    if name in RULES:
        start: Start = "identity" if name == "none" else "mean"
        temperature = CORE_TEMPERATURE if name == "core" else 0.0
        return FusionConfig(
            dim,
            1,
            mlp_ratio=0,
            rank_vectors=False,
            max_k=100,
            start=start,
            alpha=alpha,
            temperature=temperature,
            layers="none",
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


class Metric(nn.Module):
    """How vectors of one modality are compared: stretched along their principal directions, then made unit again.

    Cosines of CLIP vectors are ruled by the few directions in which everything varies; what tells two species apart lies in the others.
    One factor per direction is learned, which holds for entities never seen; a whole matrix learns the training entities by heart
    (docs/concepts/results.md). Until it has learned it changes nothing.
    """

    basis: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.eye(dim))  # (D, D), one direction per column
        self.stretch = nn.Parameter(torch.zeros(dim))  # (D,), the logarithm of each factor

    def within(self, vectors: Tensor) -> Tensor:
        """(…, D) unit -> (…, D) unit, stretched and still along the directions; zeros, which stand for the absent, stay zeros."""
        return F.normalize((vectors @ self.basis) * self.stretch.exp(), dim=-1)

    def back(self, stretched: Tensor) -> Tensor:
        """(…, D) along the directions -> (…, D) as the encoder counts them."""
        return stretched @ self.basis.T

    def turn(self, covariance: Tensor) -> None:
        """Take the principal directions of vectors with this second moment (D, D)."""
        self.basis.copy_(torch.linalg.eigh(covariance.double()).eigenvectors)


class Pool(nn.Module):
    """The training-free rule, its few numbers learned: query + alpha * weighted mean of the values.

    The weights are a softmax of temperature * score, uniform at temperature 0. Alpha is one number at first; learned, it may follow the
    cosine of the query with that mean: where the encoder agrees with the memory already it knows the thing, as with sentences about
    everyday scenes, and where they are strangers, as with names it never learned, the memory is to be believed.
    """

    TENS = 10.0  # temperatures are of this size: kept in tens, one learning rate suits all numbers of the rule

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.own = Metric(config.dim) if config.metric else None
        self.other = Metric(config.dim) if config.metric else None
        self.tens = nn.Parameter(torch.tensor(config.temperature / self.TENS))
        self.strength = _zeroed(nn.Linear(1, 1))
        nn.init.constant_(self.strength.bias, math.log(config.alpha))

    def forward(self, query: Tensor, values: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The refined query (B, D), not yet unit, and the weights (B, K).  query: (B, D).  values: (B, K, D).  scores, mask: (B, K)."""
        weights = masked_softmax(self.TENS * self.tens * scores, mask)
        if self.own is None or self.other is None:
            mean = torch.einsum("bk,bkd->bd", weights, values)
        else:
            query = self.own.back(self.own.within(query))
            mean = self.other.back(torch.einsum("bk,bkd->bd", weights, self.other.within(values)))
        agreement = F.cosine_similarity(query, mean, eps=1e-6)  # (B,)
        return query + self.strength(agreement[:, None]).exp() * mean, weights


class Fusion(nn.Module):
    """The query refined by its K neighbours: a rule, one pre-norm transformer layer read at the query, or both."""

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
            raise ConfigError(
                f"{values.shape[1]} neighbours, but this fusion takes at most {self.config.max_k}: ask for a smaller k"
            )
        x, weights = query, torch.zeros_like(scores)
        if self.pool is not None:
            x, weights = self.pool(query, values, scores, mask)
        if self.attention is not None and self.norm_tokens is not None:
            tokens = torch.cat([query[:, None], values], 1)  # (B, 1+K, D)
            if self.rank is not None:
                tokens = tokens + self.rank[: tokens.shape[1]]
            present = F.pad(mask, (1, 0), value=True)  # (B, 1+K): the query always sees itself
            attended, attention = self.attention(self.norm_tokens(tokens), present)
            if self.pool is None:
                x, weights = tokens[:, 0], attention[:, 1:]
            x = x + self.dropout(attended)
        if self.mlp is not None and self.norm_mlp is not None:
            x = x + self.dropout(self.mlp(self.norm_mlp(x)))
        refined = torch.where(mask.any(1, keepdim=True), F.normalize(x, dim=-1), query)
        return Fused(refined if self.refines else query, weights)


def build_fusions(name: str, dim: int, *, alpha: float = 1.0) -> Mapping[Side, Fusion]:
    """One untrained fusion per side, as the preset lays them out: "paper" shares one layer, the others have two."""
    config = preset_config(name, dim, alpha=alpha)
    image = Fusion(config)
    text = image if name == "paper" else Fusion(config)
    share_metrics(image, text)
    return {"image": image, "text": text}


def share_metrics(image: Fusion, text: Fusion) -> None:
    """One metric per modality, whichever side asks: what is a query for one fusion is a value for the other."""
    if image.pool is not None and text.pool is not None:
        text.pool.own, text.pool.other = image.pool.other, image.pool.own


def set_metric_directions(fusions: Mapping[Side, Fusion], covariance: Callable[[Side], Tensor]) -> None:
    """Give the metrics of untrained fusions their directions.  covariance: of a side's training vectors, (D, D)."""
    for side, fusion in fusions.items():
        if fusion.pool is not None and fusion.pool.own is not None:
            fusion.pool.own.turn(covariance(side))


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
