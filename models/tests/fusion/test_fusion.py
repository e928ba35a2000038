import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from index_store.types import SIDES
from models.errors import ConfigError
from models.fusion.fusion import (
    PRESETS,
    Fusion,
    FusionConfig,
    Metric,
    build_fusions,
    preset_config,
    set_metric_directions,
)

D, K = 64, 6


def batch(rows: int, k: int = K, dim: int = D, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query (B, D), values (B, K, D), scores (B, K) descending, mask (B, K) all True."""
    generator = torch.Generator().manual_seed(seed)
    query = F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)
    values = F.normalize(torch.randn(rows, k, dim, generator=generator), dim=-1)
    scores = torch.rand(rows, k, generator=generator).sort(1, descending=True).values
    return query, values, scores, torch.ones(rows, k, dtype=torch.bool)


def randomize(config: FusionConfig, seed: int = 1) -> Fusion:
    """A fusion with random changes to every parameter, as after training."""
    fusion = Fusion(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return fusion.eval()


def count_parameters(name: str, dim: int) -> int:
    distinct = {
        id(parameter): parameter.numel()
        for fusion in build_fusions(name, dim).values()
        for parameter in fusion.parameters()
    }
    return sum(distinct.values())


def test_presets_have_the_papers_parameter_counts() -> None:
    assert count_parameters("paper", 512) == 3_158_016  # one layer for both sides, 11 rank vectors
    assert count_parameters("paper-split", 512) == 3_155_968  # one layer per side
    assert (
        count_parameters("default", 512) == 2 * 512 + 2 * 3
    )  # a factor per direction of each modality, three numbers of pooling per side
    assert count_parameters("corrected", 512) == 3_155_968 + 2 * 512 + 2 * 3
    without_ranks = FusionConfig(512, 8, mlp_ratio=4, rank_vectors=False, max_k=10, start="identity")
    assert sum(parameter.numel() for parameter in Fusion(without_ranks).parameters()) == 3_152_384


def test_the_mlp_is_as_large_as_the_papers_layer_and_ignores_neighbours() -> None:
    assert abs(count_parameters("mlp", 512) / count_parameters("paper-split", 512) - 1) < 0.002
    query, values, scores, mask = batch(5)
    fusion = randomize(preset_config("mlp", D))
    torch.testing.assert_close(
        fusion(query, values, scores, mask).vectors, fusion(query, -values, -scores, mask).vectors, rtol=0, atol=0
    )
    assert (fusion(query, values, scores, mask).vectors - query).norm(dim=1).min() > 0.1


def test_the_rules_equal_their_formulas() -> None:
    query, values, scores, mask = batch(5)
    plain, mean, core = (
        Fusion(preset_config(name, D, alpha=2.0))(query, values, scores, mask) for name in ("none", "mean", "core")
    )
    assert torch.equal(plain.vectors, query)
    assert not plain.weights.any()
    torch.testing.assert_close(mean.vectors, F.normalize(query + 2 * values.mean(1), dim=-1))
    weights = torch.softmax(20 * scores, 1)  # CoRE
    torch.testing.assert_close(core.weights, weights)
    torch.testing.assert_close(core.vectors, F.normalize(query + 2 * (weights[..., None] * values).sum(1), dim=-1))


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="default, corrected, paper, paper-split"):
        preset_config("best", 512)


@pytest.mark.parametrize("dim", [1, 16, 100, 256, 512, 640, 768, 1024])
def test_presets_fit_any_width(dim: int) -> None:
    for name in PRESETS:
        assert dim % preset_config(name, dim).heads == 0


@pytest.mark.parametrize("name", ["paper", "paper-split"])
def test_untrained_paper_presets_return_the_plain_vector(name: str) -> None:
    query, values, scores, mask = batch(5)
    fused = build_fusions(name, D)["image"](query, values, scores, mask).vectors
    torch.testing.assert_close(fused, query, atol=1e-7, rtol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_the_untrained_default_equals_the_training_free_rule(alpha: float) -> None:
    query, values, scores, mask = batch(5)
    mask[1, 3:] = False
    fused = build_fusions("default", D, alpha=alpha)["text"](query, values, scores, mask).vectors
    means = torch.stack([values[b, mask[b]].mean(0) for b in range(5)])
    torch.testing.assert_close(fused, F.normalize(query + alpha * means, dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_without_a_neighbour_the_query_is_returned_bit_for_bit(name: str) -> None:
    fusion = randomize(preset_config(name, D))
    query, values, scores, mask = batch(4)
    mask[[0, 2]] = False
    fused = fusion(query, values, scores, mask)
    assert torch.equal(fused.vectors[[0, 2]], query[[0, 2]])
    assert not torch.equal(fused.vectors[1], query[1])
    assert not fused.weights[[0, 2]].any()
    none_found = fusion(query, values[:, :0], scores[:, :0], mask[:, :0])
    assert torch.equal(none_found.vectors, query)
    assert none_found.weights.shape == (4, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_vectors_of_trained_fusions_are_unit(name: str) -> None:
    fused = randomize(preset_config(name, D))(*batch(9)).vectors
    torch.testing.assert_close(fused.norm(dim=-1), torch.ones(9), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_padding_changes_nothing(name: str) -> None:
    """Values and scores where the mask is False do not affect the result."""
    fusion = randomize(preset_config(name, D))
    query, values, scores, mask = batch(3, k=4)
    scores = scores - 0.9  # negative, so that the 0 of an absent neighbour would be greater
    padded = fusion(query, F.pad(values, (0, 0, 0, 5), value=7.0), F.pad(scores, (0, 5)), F.pad(mask, (0, 5)))
    bare = fusion(query, values, scores, mask)
    torch.testing.assert_close(padded.vectors, bare.vectors, atol=1e-6, rtol=0)
    torch.testing.assert_close(padded.weights[:, :4], bare.weights, atol=1e-6, rtol=0)
    assert not padded.weights[:, 4:].any()


def test_the_default_takes_any_k_up_to_its_maximum() -> None:
    fusion = randomize(preset_config("default", D))
    for k in (1, 2, 10, 100):
        assert fusion(*batch(2, k=k)).vectors.shape == (2, D)
    with pytest.raises(ConfigError, match="at most 100"):
        fusion(*batch(2, k=101))


def test_the_paper_preset_has_rank_vectors_for_ten_neighbours() -> None:
    fusion = randomize(preset_config("paper", D))
    query, values, scores, mask = batch(2, k=10)
    swapped = fusion(query, values.flip(1), scores, mask).vectors
    assert not torch.allclose(fusion(query, values, scores, mask).vectors, swapped, atol=1e-4)  # the rank matters
    with pytest.raises(ConfigError, match="at most 10"):
        fusion(*batch(2, k=11))


def full_layer(fusion: Fusion) -> nn.TransformerEncoderLayer:
    """torch's own pre-norm encoder layer with the same weights."""
    config = fusion.config
    width = round(config.dim * config.mlp_ratio)
    layer = nn.TransformerEncoderLayer(config.dim, config.heads, width, 0.0, "gelu", batch_first=True, norm_first=True)
    attention = fusion.attention
    assert attention is not None
    assert fusion.norm_tokens is not None
    assert fusion.norm_mlp is not None
    assert fusion.mlp is not None
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key_value.weight]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key_value.bias]))
    pairs = [
        (layer.self_attn.out_proj, attention.out),
        (layer.norm1, fusion.norm_tokens),
        (layer.norm2, fusion.norm_mlp),
        (layer.linear1, fusion.mlp.widen),
        (layer.linear2, fusion.mlp.narrow),
    ]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    return layer.eval()


@pytest.mark.parametrize("name", ["paper", "paper-split"])
def test_computing_token_0_alone_equals_the_full_layer(name: str) -> None:
    fusion = randomize(preset_config(name, D))
    query, values, scores, mask = batch(7)
    mask[2, 2:] = mask[5, 5:] = False
    tokens = torch.cat([query[:, None], values], 1)
    if fusion.rank is not None:
        tokens = tokens + fusion.rank[: K + 1]
    absent = F.pad(~mask, (1, 0), value=False)
    whole = full_layer(fusion)(tokens, src_key_padding_mask=absent)[:, 0]
    torch.testing.assert_close(
        fusion(query, values, scores, mask).vectors, F.normalize(whole, dim=-1), atol=1e-6, rtol=0
    )


def test_attention_weights_equal_torchs_own() -> None:
    fusion = randomize(preset_config("paper-split", D))
    query, values, scores, mask = batch(4)
    mask[1, 4:] = False
    assert fusion.norm_tokens is not None
    tokens = fusion.norm_tokens(torch.cat([query[:, None], values], 1))
    absent = F.pad(~mask, (1, 0), value=False)
    _, weights = full_layer(fusion).self_attn(tokens[:, :1], tokens, tokens, key_padding_mask=absent)
    torch.testing.assert_close(fusion(query, values, scores, mask).weights, weights[:, 0, 1:], atol=1e-6, rtol=0)


def test_the_temperature_weights_the_mean_by_score() -> None:
    fusion = Fusion(preset_config("default", D))
    query, values, scores, mask = batch(3)
    with torch.no_grad():
        assert fusion.pool is not None
        fusion.pool.tens.fill_(2.0)
    weights = fusion(query, values, scores, mask).weights
    torch.testing.assert_close(weights, (20 * scores).softmax(1), atol=1e-6, rtol=0)


def test_metrics_scale_queries_and_values_along_their_directions() -> None:
    """Compared with explicit matrices, one for the query's modality and one for the values'."""
    fusions = build_fusions("default", D, alpha=2.0)
    set_metric_directions(
        fusions, lambda side: torch.cov(torch.randn(D, 500, generator=torch.Generator().manual_seed(len(side))))
    )
    image, text = (fusions[side].pool for side in SIDES)
    assert image is not None
    assert text is not None
    assert image.own is not None
    assert image.other is not None
    assert (image.own, image.other) == (text.other, text.own)
    query, values, scores, mask = batch(5)
    torch.testing.assert_close(
        fusions["image"](query, values, scores, mask).vectors, F.normalize(query + 2 * values.mean(1), dim=-1)
    )
    with torch.no_grad():
        for metric in (image.own, image.other):
            metric.stretch.copy_(torch.randn(D, generator=torch.Generator().manual_seed(9)))
    own, other = (
        metric.basis @ torch.diag(metric.stretch.exp()) @ metric.basis.T for metric in (image.own, image.other)
    )
    scaled_query, scaled_values = F.normalize(query @ own, dim=-1), F.normalize(values @ other, dim=-1)
    expected = F.normalize(scaled_query + 2 * scaled_values.mean(1), dim=-1)
    torch.testing.assert_close(fusions["image"](query, values, scores, mask).vectors, expected, atol=1e-6, rtol=0)
    scaled_query, scaled_values = F.normalize(query @ other, dim=-1), F.normalize(values @ own, dim=-1)
    torch.testing.assert_close(
        fusions["text"](query, values, scores, mask).vectors,
        F.normalize(scaled_query + 2 * scaled_values.mean(1), dim=-1),
        atol=1e-6,
        rtol=0,
    )


def test_principal_directions_are_those_of_the_largest_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(D, D, generator=rng)).Q
    vectors = torch.randn(4000, D, generator=rng) * torch.linspace(0.1, 3, D) @ axes.T
    metric = Metric(D)
    metric.set_directions(vectors.T.cov())
    spread = (vectors @ metric.basis).std(0)
    assert (spread.diff() > -0.05).all()
    torch.testing.assert_close(spread[-1], torch.tensor(3.0), atol=0.2, rtol=0)


def test_masked_rows_give_no_nan_gradient() -> None:
    """Training drops all neighbours of some rows; one NaN gradient would spoil every weight."""
    for name in PRESETS:
        fusion = randomize(preset_config(name, D)).train()
        query, values, scores, mask = batch(4)
        mask[1] = False
        fusion(query, values, scores, mask).vectors.square().sum().backward()
        gradients = [parameter.grad for parameter in fusion.parameters()]
        assert all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_every_parameter_of_an_untrained_fusion_changes_within_three_steps() -> None:
    """A layer that starts at zero changes after one step; a dead parameter never would."""
    fusion = Fusion(preset_config("default", D))
    before = {name: parameter.detach().clone() for name, parameter in fusion.named_parameters()}
    optimizer = torch.optim.SGD(fusion.parameters(), lr=1.0)
    query, values, scores, mask = batch(8)
    goal = batch(8, seed=3)[0]
    for _ in range(3):
        optimizer.zero_grad()
        (-(fusion(query, values, scores, mask).vectors * goal).sum()).backward()
        optimizer.step()
    assert [name for name, parameter in fusion.named_parameters() if torch.equal(parameter, before[name])] == []


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 heads"):
        FusionConfig(64, 3, 1, rank_vectors=False, max_k=10)
    with pytest.raises(ConfigError, match="alpha > 0"):
        FusionConfig(64, 1, 1, rank_vectors=False, max_k=10, alpha=0)


def test_alpha_is_stored_as_a_logarithm() -> None:
    pool = Fusion(preset_config("default", D, alpha=3.0)).pool
    assert pool is not None
    np.testing.assert_allclose(math.exp(pool.strength.bias.item()), 3.0, rtol=1e-6)
