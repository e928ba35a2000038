"""`reco train CONFIG.toml`: learn a fusion.

The encoder is frozen, so embeddings and neighbours are computed once and the loop sees arrays only.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

from index_store.pairs import SIDES, KeyKind, Pairs, Side
from index_store.snapshot import Snapshot
from index_store.steps import Reject
from index_store.store import Store
from models.checkpoint import save_fusions
from models.clip import Encoder
from models.episodes import Episode, joined, look_up
from models.errors import DataError, TrainingFailed
from models.fusion import Fusion, build_fusions
from models.losses import reco_loss
from models.prepare import encode_samples
from models.reco import Reco
from models.sources import read_samples
from models.training_config import TERMS, EpisodeConfig, TrainConfig, expanded

WARM_UP = 20  # steps
EVALUATED = 1000  # held-out pairs ranked against each other, at most


@dataclass(frozen=True, slots=True)
class Learning:
    """How the loop runs. scale: what the cosines are multiplied with; the rest as in TrainConfig."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    seed: int
    scale: float
    terms: Sequence[str] = TERMS
    drop: float = 0.1
    pool_learning_rate: float = 0.05


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to.

    first_loss, last_loss: means over the first and last tenth of the steps.  before, after: held-out accuracy by memory.
    """

    output: str
    fusion_id: str
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    before: Mapping[str, float]
    after: Mapping[str, float]

    def __str__(self) -> str:
        gains = " · ".join(f"{name} {100 * self.before[name]:.1f} → {100 * after:.1f} %" for name, after in self.after.items())
        loss = f"loss {self.first_loss:.3f} → {self.last_loss:.3f}"
        return f"{self.output}: fusion {self.fusion_id}, {self.steps} steps in {self.seconds:.0f} s, {loss}, held-out accuracy {gains}"


def train(config: TrainConfig) -> Summary:
    """Everything `reco train` does, top to bottom."""
    start = time.monotonic()
    torch.manual_seed(config.seed)
    encoder = Encoder.load(config.encoder)
    fusions = build_fusions(config.preset, encoder.dim, alpha=config.alpha)
    reco = Reco(encoder, fusions, "untrained", config.k)
    episodes = [_episode(episode, config, reco) for episode in config.episodes]
    splits = [episode.split(config.held_out, config.seed) for episode in episodes]
    before = {episode.name: accuracy(fusions, episode, away) for episode, (_, away) in zip(episodes, splits, strict=True)}
    learning = Learning(
        steps=config.steps,
        batch=config.batch,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
        scale=encoder.logit_scale,
        terms=config.terms,
        drop=config.drop,
        pool_learning_rate=config.pool_learning_rate,
    )
    losses = learn(fusions, episodes, [learned for learned, _ in splits], learning)
    after = {episode.name: accuracy(fusions, episode, away) for episode, (_, away) in zip(episodes, splits, strict=True)}
    card = {"trained": True, "config": asdict(config), "before": before, "after": after}
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    fusion_id = save_fusions(output, fusions, encoder=encoder.fingerprint, k=config.k, card=card)
    tenth = max(1, len(losses) // 10)
    first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
    return Summary(output.name, fusion_id, config.steps, time.monotonic() - start, first, last, before, after)


def _episode(episode: EpisodeConfig, config: TrainConfig, reco: Reco) -> Episode:
    """The pairs of one table, encoded, with their neighbours in its memory."""
    name, _, version = episode.memory.partition("@")
    snapshot = Store(Path(config.store)).open(name, version or None, encoder=reco.encoder.fingerprint)
    limits: dict[Side, float | None] = {"image": episode.max_image_similarity, "text": episode.max_text_similarity}
    return look_up(snapshot.ref, _pairs(episode, snapshot, reco.encoder), snapshot, reco, config.k, limits)


def _pairs(episode: EpisodeConfig, snapshot: Snapshot, encoder: Encoder) -> Pairs:
    """All sources of an episode as one block; what could not be read is told, never silently lost."""
    rejects = list[Reject]()
    samples = chain.from_iterable(read_samples(expanded(source), caption=episode.caption) for source in episode.sources)
    kinds: dict[Side, KeyKind] = {side: snapshot.key_kind(side) for side in SIDES}
    with tqdm(unit="pair", desc=f"encode for {snapshot.ref}", disable=not sys.stderr.isatty()) as bar:
        blocks = list(encode_samples(samples, encoder, kinds=kinds, on_reject=rejects.append, on_progress=bar.update))
    if rejects:
        print(f"{len(rejects)} items left out, the first: {rejects[0].item}: {rejects[0].reason}", file=sys.stderr)
    if not blocks:
        raise DataError(f"no pair to learn from in {', '.join(episode.sources)}: check the sources")
    return joined(blocks)


def learn(fusions: Mapping[Side, Fusion], episodes: Sequence[Episode], learned: Sequence[np.ndarray], learning: Learning) -> list[float]:
    """Train the fusions in place on the rows `learned` of each episode, one episode a step in turn; the loss of every step."""
    device = next(fusions["image"].parameters()).device.type
    layers = nn.ModuleDict({str(side): fusion for side, fusion in fusions.items()}).train()
    optimiser = _optimiser(layers, learning)
    peaks = [group["lr"] for group in optimiser.param_groups]
    rng, losses = np.random.default_rng(learning.seed), list[float]()
    for step in trange(learning.steps, desc="fusion", unit="step", disable=not sys.stderr.isatty()):
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * _schedule(step, learning.steps)
        turn = step % len(episodes)
        rows = rng.permutation(learned[turn])[: learning.batch]
        loss = _step_loss(fusions, episodes[turn], rows, learning, rng, device)
        if not torch.isfinite(loss):
            raise TrainingFailed(f"the loss is {loss.item()} at step {step}: lower learning_rate, which is {learning.learning_rate}")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    layers.eval()
    return losses


def accuracy(fusions: Mapping[Side, Fusion], episode: Episode, rows: np.ndarray) -> float:
    """Share of held-out photos whose own caption is the nearest of all held-out captions, both sides refined with every neighbour."""
    rows = rows[:EVALUATED]
    device = next(fusions["image"].parameters()).device.type
    with torch.inference_mode():
        image, text = (fusions[side](*episode.lookups[side].batch(rows, _everything(episode, side, rows), device)) for side in SIDES)
    nearest = (image @ text.T).argmax(1).cpu().numpy()  # (B,)
    return float(episode.same(rows)[np.arange(len(rows)), nearest].mean())


def _optimiser(layers: nn.Module, learning: Learning) -> torch.optim.Optimizer:
    """AdamW; the few numbers of the pool are far from where they start and need longer steps than a matrix bears."""
    named = list(layers.named_parameters())
    pool, others = ([value for name, value in named if (".pool." in name) is wanted] for wanted in (True, False))
    groups = [{"params": others, "lr": learning.learning_rate, "weight_decay": learning.weight_decay}]
    return torch.optim.AdamW([*groups, {"params": pool, "lr": learning.pool_learning_rate, "weight_decay": 0.0}])


def _step_loss(
    fusions: Mapping[Side, Fusion], episode: Episode, rows: np.ndarray, learning: Learning, rng: np.random.Generator, device: str
) -> Tensor:
    """The loss of one batch, each side refined with a random part of its neighbours."""
    batches = {side: episode.lookups[side].batch(rows, _some(episode, side, rows, learning.drop, rng), device) for side in SIDES}
    image, text = (fusions[side](*batches[side]) for side in SIDES)
    both, image_only, text_only = (term in learning.terms for term in TERMS)
    same = torch.from_numpy(episode.same(rows)).to(device)
    plain_image, plain_text = (batches[side][0] for side in SIDES)
    return reco_loss(image, text, plain_image, plain_text, learning.scale, both=both, image_only=image_only, text_only=text_only, same=same)


def _some(episode: Episode, side: Side, rows: np.ndarray, drop: float, rng: np.random.Generator) -> np.ndarray:
    """(B, K) bool: the nearest k of them with k drawn once for the batch, less the share `drop`."""
    most = episode.lookups[side].mask.shape[1]
    nearest = np.arange(most) < rng.integers(1, most + 1)  # (K,)
    return np.asarray(nearest & (rng.random((len(rows), most)) >= drop))


def _everything(episode: Episode, side: Side, rows: np.ndarray) -> np.ndarray:
    return np.ones((len(rows), episode.lookups[side].mask.shape[1]), bool)


def _schedule(step: int, steps: int) -> float:
    """A short linear rise, then half a cosine down to zero."""
    return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
