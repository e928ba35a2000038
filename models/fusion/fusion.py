"""The fusion network: one light layer that refines a query with the vectors of its neighbours.

    query (B, D) ──┐                                      ┌─ no neighbour: the query itself
    values (B, K, D) ─ tokens ─ start ─ + attend ─ + mlp ─┴─ unit ─> (B, D)

The start is the query itself (`paper`, `paper-split`), or a weighted mean of the values added to
the query, whose few parameters are trained (`Pool`, `Metric`). The preset `default` is that start
alone: the weight matrices of a layer on top of it memorise the training entities (`corrected`;
docs/RESULTS.md).

Only token 0, the query's, is read out, so only its row of the layer is computed: query projection,
output projection and MLP for one token, keys and values for all. The result equals that of the full
layer at about a quarter of the operations.

The names of submodules and parameters are the tensor names of a fusion file.
Alphabet: B batch, K neighbours, T = 1 + K tokens, D width, h heads, d = D / h.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from index_store.types import Side
from models.errors import ConfigError

Start = Literal["identity", "mean"]
Layers = Literal["transformer", "mlp", "none"]
PRESETS = ("default", "corrected", "paper", "paper-split", "mlp")  # fusions that are trained
RULES = ("none", "mean", "core")  # fusions without training
CORE_TEMPERATURE = 20.0  # the best on the starter's training data among 0, 10, 20, 30, 40 and 60; flat from 20 on


@dataclass(frozen=True, slots=True)
class FusionConfig:
    """The architecture of one fusion layer.

    rank_vectors: one learned vector per token position, so that the layer sees each neighbour's
    rank.
    start: the result before any training, "identity" for the query or "mean" for the training-free
    rule unit(query + alpha * mean(values)).
    alpha: the initial strength of the mean. The best differs by task: at most 1 for sentences, 2 to
    8 for class captions.
    temperature: initial, of the softmax over the scores that weights the mean; 0 weights all alike.
    metric: whether the rule learns how vectors are compared (`Metric`).
    layers: what is trained on top of the start. "mlp" ignores the neighbours, "none" adds nothing.
    Raises ConfigError where heads do not divide dim, max_k < 1 or alpha <= 0.
    """

    dim: int
    heads: int
    mlp_ratio: float
    rank_vectors: bool
    max_k: int
    dropout: float = 0.0
    start: Start = "mean"
    alpha: float = 1.0
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
    """The configuration of a preset or a training-free rule. ConfigError for an unknown name.

    "default" is the training-free rule with trained parameters, "corrected" has a transformer layer
    on top. "paper" and "paper-split" are the two layouts that have the paper's 3.16 M parameters at
    D = 512. "mlp" is a baseline of that size without retrieval. "none" is plain CLIP, "mean" adds
    the mean of the values, "core" CoRE's softmax-weighted mean (arXiv 2411.00988).
    alpha: as in FusionConfig, for the four that start from a mean.
    """
    heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)  # d = 64 as in CLIP
    layer = FusionConfig(dim, heads, mlp_ratio=1, rank_vectors=False, max_k=100, start="identity")
    rule = FusionConfig(dim, heads=1, mlp_ratio=0, rank_vectors=False, max_k=100, alpha=alpha, layers="none")
    configs = {
        "default": replace(layer, start="mean", alpha=alpha, metric=True, layers="none"),
        "corrected": replace(layer, start="mean", alpha=alpha, metric=True),
        "paper": replace(layer, mlp_ratio=4, rank_vectors=True, max_k=10),
        "paper-split": layer,
        "mlp": replace(layer, mlp_ratio=3, layers="mlp"),  # as many parameters as "paper-split"
        "none": replace(rule, start="identity"),
        "mean": rule,
        "core": replace(rule, temperature=CORE_TEMPERATURE),
    }
    if name not in configs:
        raise ConfigError(f"unknown fusion preset {name!r}: choose one of {', '.join(configs)}")
    return configs[name]


class Fused(NamedTuple):
    """The output of a fusion.

    vectors: (B, D) float32 unit.  weights: (B, K) float32, the attention paid to each neighbour.
    """

    vectors: Tensor
    weights: Tensor


class Attention(nn.Module):
    """Multi-head attention of token 0 to all tokens. Its output projection starts at zero."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key_value = nn.Linear(config.dim, 2 * config.dim)
        self.out = _zero_init(nn.Linear(config.dim, config.dim))

    def forward(self, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> the output for token 0 (B, D), and its weights (B, T) averaged over heads.

        present: (B, T) bool, True = attended to.
        """
        query = self.query(tokens[:, 0]).unflatten(-1, (self.heads, -1))  # (B, h, d)
        key, value = self.key_value(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, T, h, d) each
        logits = torch.einsum("bhd,bthd->bht", query, key) / math.sqrt(query.shape[-1])
        weights = masked_softmax(logits, present[:, None])  # (B, h, T)
        attended = torch.einsum("bht,bthd->bhd", weights, value).flatten(1)  # (B, D)
        return self.out(attended), weights.mean(1)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them. The second starts at zero."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = round(config.dim * config.mlp_ratio)
        self.widen = nn.Linear(config.dim, width)
        self.narrow = _zero_init(nn.Linear(width, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        narrowed: Tensor = self.narrow(F.gelu(self.widen(x)))
        return narrowed


class Metric(nn.Module):
    """A learned metric of one modality: a factor for each principal direction of its vectors.

    A few directions in which all vectors vary dominate the cosines of CLIP vectors; what separates
    two species lies in the others. One factor per direction generalises to entities that were not
    in the training data; a whole matrix memorises those that were (docs/RESULTS.md). All factors
    start at 1.
    """

    basis: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.eye(dim))  # (D, D), one direction per column
        self.stretch = nn.Parameter(torch.zeros(dim))  # (D,), the logarithm of each factor

    def scale(self, vectors: Tensor) -> Tensor:
        """(…, D) unit -> (…, D) unit in the basis of the directions; zeros (absent) stay zeros."""
        return F.normalize((vectors @ self.basis) * self.stretch.exp(), dim=-1)

    def to_encoder_basis(self, scaled: Tensor) -> Tensor:
        """(…, D) in the basis of the directions -> (…, D) in that of the encoder."""
        return scaled @ self.basis.T

    def set_directions(self, covariance: Tensor) -> None:
        """Set the directions to the eigenvectors of a second-moment matrix (D, D) of vectors."""
        self.basis.copy_(torch.linalg.eigh(covariance.double()).eigenvectors)


class Pool(nn.Module):
    """The training-free rule with trained parameters: query + alpha * weighted mean of the values.

    The weights are a softmax of temperature * score. Alpha is a function of the cosine between the
    query and that mean, constant before training: where they agree the encoder knows the subject (a
    sentence about an everyday scene) and needs the memory less than where they do not (a name that
    it never learned).
    """

    TEMPERATURE_UNIT = 10.0  # of `tens`: one learning rate then suits all parameters

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.own = Metric(config.dim) if config.metric else None  # of the query's modality
        self.other = Metric(config.dim) if config.metric else None  # of the values'
        self.tens = nn.Parameter(torch.tensor(config.temperature / self.TEMPERATURE_UNIT))
        self.strength = _zero_init(nn.Linear(1, 1))  # cosine -> the logarithm of alpha
        nn.init.constant_(self.strength.bias, math.log(config.alpha))

    def forward(self, query: Tensor, values: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The sum (B, D), not normalized, and the weights (B, K). Takes what Fusion does."""
        weights = masked_softmax(self.TEMPERATURE_UNIT * self.tens * scores, mask)  # (B, K)
        if self.own is None or self.other is None:
            mean = torch.einsum("bk,bkd->bd", weights, values)
        else:
            query = self.own.to_encoder_basis(self.own.scale(query))
            mean = self.other.to_encoder_basis(torch.einsum("bk,bkd->bd", weights, self.other.scale(values)))
        agreement = F.cosine_similarity(query, mean, eps=1e-6)  # (B,)
        alpha = self.strength(agreement[:, None]).exp()  # (B, 1)
        return query + alpha * mean, weights


class Fusion(nn.Module):
    """Refines a query by its neighbours: a start, then one pre-norm layer read at the query."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        attends, has_mlp = config.layers == "transformer", config.layers != "none"
        self.rank = nn.Parameter(torch.zeros(config.max_k + 1, config.dim)) if config.rank_vectors else None
        self.pool = Pool(config) if config.start == "mean" else None
        self.norm_tokens = nn.LayerNorm(config.dim) if attends else None
        self.attention = Attention(config) if attends else None
        self.norm_mlp = nn.LayerNorm(config.dim) if has_mlp else None
        self.mlp = Mlp(config) if has_mlp else None
        self.dropout = nn.Dropout(config.dropout)

    @property
    def refines(self) -> bool:
        """False for the rule "none", which returns the query unchanged."""
        return self.pool is not None or self.mlp is not None

    def forward(self, query: Tensor, values: Tensor, scores: Tensor, mask: Tensor) -> Fused:
        """Refine a batch of queries.

        query: (B, D) unit.  values: (B, K, D).  scores: (B, K).  mask: (B, K) bool, True = present.
        A row without any neighbour returns its query, bit for bit.
        Raises ConfigError where K > max_k.
        """
        self._check_k(values.shape[1])
        x, weights = query, torch.zeros_like(scores)
        if self.pool is not None:
            x, weights = self.pool(query, values, scores, mask)
        if self.attention is not None and self.norm_tokens is not None:
            tokens = self._tokens(query, values)  # (B, T, D)
            present = F.pad(mask, (1, 0), value=True)  # (B, T): the query always attends to itself
            attended, attention = self.attention(self.norm_tokens(tokens), present)  # (B, D), (B, T)
            if self.pool is None:
                x, weights = tokens[:, 0], attention[:, 1:]
            x = x + self.dropout(attended)
        if self.mlp is not None and self.norm_mlp is not None:
            x = x + self.dropout(self.mlp(self.norm_mlp(x)))
        refined = torch.where(mask.any(1, keepdim=True), F.normalize(x, dim=-1), query)
        return Fused(refined if self.refines else query, weights)

    def _tokens(self, query: Tensor, values: Tensor) -> Tensor:
        """(B, T, D): the query, then its neighbours by rank."""
        tokens = torch.cat([query[:, None], values], 1)
        return tokens if self.rank is None else tokens + self.rank[: tokens.shape[1]]

    def _check_k(self, k: int) -> None:
        if k > self.config.max_k:
            raise ConfigError(f"{k} neighbours, but this fusion takes at most {self.config.max_k}: ask for a smaller k")


def build_fusions(name: str, dim: int, *, alpha: float = 1.0) -> Mapping[Side, Fusion]:
    """One untrained fusion per side for a preset: "paper" shares one layer, the others have two."""
    config = preset_config(name, dim, alpha=alpha)
    image = Fusion(config)
    text = image if name == "paper" else Fusion(config)
    share_metrics(image, text)
    return {"image": image, "text": text}


def share_metrics(image: Fusion, text: Fusion) -> None:
    """Use one `Metric` per modality: the queries of one fusion are the values of the other."""
    if image.pool is not None and text.pool is not None:
        text.pool.own, text.pool.other = image.pool.other, image.pool.own


def set_metric_directions(fusions: Mapping[Side, Fusion], covariance: Callable[[Side], Tensor]) -> None:
    """Set the directions of untrained metrics. covariance: of a side's training vectors, (D, D)."""
    for side, fusion in fusions.items():
        if fusion.pool is not None and fusion.pool.own is not None:
            fusion.pool.own.set_directions(covariance(side))


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """A softmax over the last axis where the mask is True, and 0 elsewhere.

    All 0 where the mask is empty, without NaN gradients.
    """
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~mask, lowest).softmax(-1) * mask


def _zero_init(linear: nn.Linear) -> nn.Linear:
    """The layer with zero weights and biases."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
