"""`reco train CONFIG.toml`: train a fusion on a frozen encoder.

Embeddings and neighbours are prepared once, in `prepared/` beside the output; the training loop
reads arrays only.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index_store.store import Store
from index_store.types import SIDES, KeyKind, Side
from models.data.samples import Reading
from models.data.streams import Encoding
from models.encoder.encoder import Encoder
from models.errors import ConfigError
from models.fusion.checkpoint import save_fusions
from models.fusion.fusion import Fusion, build_fusions
from models.reco import Reco
from models.training.cache import look_up_prepared, prepare_pairs
from models.training.config import EpisodeConfig, TrainConfig, expand_source
from models.training.episodes import Episode, MemoryQuery
from models.training.trainer import Trainer, TrainerConfig

MAX_EVALUATED = 1000  # held-out pairs ranked against each other, at most


@dataclass(frozen=True, slots=True)
class Summary:
    """Result of a run.

    first_loss, last_loss: means over the first and last tenth of the steps.  before, after:
    held-out accuracy by memory.
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
        gains = " · ".join(
            f"{name} {100 * self.before[name]:.1f} → {100 * after:.1f} %" for name, after in self.after.items()
        )
        loss = f"loss {self.first_loss:.3f} → {self.last_loss:.3f}"
        return f"{self.output}: fusion {self.fusion_id}, {self.steps} steps in {self.seconds:.0f} s, {loss}, held-out accuracy {gains}"


def train(config: TrainConfig, *, resume: bool = False) -> Summary:
    """Run a training from its configuration to the written fusion file.

    resume: continue from the checkpoint of an earlier run beside the output.
    """
    start = time.monotonic()
    torch.manual_seed(config.seed)
    encoder = Encoder.load(config.encoder)
    fusions = build_fusions(config.preset, encoder.dim, alpha=config.alpha)
    reco = Reco(encoder, fusions, "untrained", config.k)
    output = Path(config.output)
    episodes = [_episode(episode, config, reco, output.parent / "prepared") for episode in config.episodes]
    splits = [episode.split(config.held_out, config.seed) for episode in episodes]
    held_out = [(episode, away) for episode, (_, away) in zip(episodes, splits, strict=True)]
    before = _accuracies(fusions, held_out)
    learning = _trainer_config(config, encoder.logit_scale)

    def watch() -> float:
        return float(np.mean(list(_accuracies(fusions, held_out).values())))

    folder = output.with_suffix(".run")
    board = _tensorboard_writer(folder / "tensorboard") if config.tensorboard else None
    loop = Trainer(
        fusions, episodes, [learned for learned, _ in splits], learning, watch=watch, folder=folder, on_line=board
    )
    if not (resume and loop.resume()):
        shutil.rmtree(folder, ignore_errors=True)
    losses = loop.run().losses
    draw_curve(folder)
    after = _accuracies(fusions, held_out)
    card = {"trained": True, "config": asdict(config), "before": before, "after": after, "steps": len(losses)}
    card |= {"data": [episode.digest() for episode in episodes], "commit": _commit()}
    output.parent.mkdir(parents=True, exist_ok=True)
    fusion_id = save_fusions(output, fusions, encoder=encoder.fingerprint, k=config.k, card=card)
    tenth = max(1, len(losses) // 10)
    first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
    return Summary(output.name, fusion_id, len(losses), time.monotonic() - start, first, last, before, after)


def _accuracies(fusions: Mapping[Side, Fusion], held_out: Sequence[tuple[Episode, np.ndarray]]) -> dict[str, float]:
    """Accuracy on the held-out pairs of each episode, by its name."""
    return {episode.name: accuracy(fusions, episode, away) for episode, away in held_out}


def _trainer_config(config: TrainConfig, scale: float) -> TrainerConfig:
    return TrainerConfig(
        steps=config.steps,
        batch=config.batch,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
        scale=scale,
        terms=config.terms,
        drop=config.drop,
        pool_learning_rate=config.pool_learning_rate,
        clip=config.clip,
        learn_scale=config.learn_scale,
        every=config.every,
        patience=config.patience,
        precision=config.precision,
        compile=config.compile,
    )


def _episode(episode: EpisodeConfig, config: TrainConfig, reco: Reco, folder: Path) -> Episode:
    """The encoded pairs of one table with their neighbours in its memory; prepared files of earlier
    runs are reused.
    """
    name, _, version = episode.memory.partition("@")
    snapshot = Store(Path(config.store)).open(name, version or None, encoder=reco.encoder.fingerprint)
    if config.k > len(snapshot):
        raise ConfigError(
            f"k is {config.k}, but {snapshot.ref} holds {len(snapshot)} pairs: choose a smaller k, or a larger memory"
        )
    kinds: dict[Side, KeyKind] = {side: snapshot.key_kind(side) for side in SIDES}
    limits: dict[Side, float | None] = {"image": episode.max_image_similarity, "text": episode.max_text_similarity}
    sources = [expand_source(source) for source in episode.sources]
    pairs = prepare_pairs(folder, sources, Encoding(reco.encoder, kinds, Reading(episode.caption)))
    return look_up_prepared(folder, pairs, MemoryQuery(snapshot, reco, config.k, limits))


def accuracy(fusions: Mapping[Side, Fusion], episode: Episode, rows: np.ndarray) -> float:
    """Share of held-out photos whose own caption is the nearest of all held-out captions; both
    sides are enhanced with all neighbours.
    """
    rows = rows[:MAX_EVALUATED]
    device = next(fusions["image"].parameters()).device.type
    with torch.inference_mode():
        image, text = (
            fusions[side](*episode.lookups[side].batch(rows, _keep_all(episode, side, rows), device)).vectors
            for side in SIDES
        )
    nearest = (image @ text.T).argmax(1).cpu().numpy()  # (B,)
    return float(episode.same(rows)[np.arange(len(rows)), nearest].mean())


def _keep_all(episode: Episode, side: Side, rows: np.ndarray) -> np.ndarray:
    return np.ones((len(rows), episode.lookups[side].k), bool)


def draw_curve(folder: Path) -> None:
    """Plot curve.jsonl as curve.png, where matplotlib is installed (the extra "plots")."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text("utf-8").splitlines()]
    figure = Figure(figsize=(8, 3), layout="constrained")
    for place, name in enumerate(("loss", "held_out"), start=1):
        axes = figure.add_subplot(1, 2, place)
        known = [line for line in lines if name in line]
        axes.plot([line["step"] for line in known], [line[name] for line in known])
        axes.set(xlabel="step", title=name.replace("_", " "))
    figure.savefig(folder / "curve.png")


def _tensorboard_writer(folder: Path) -> Callable[[Mapping[str, Any]], None]:
    """A function that writes each line of the curve for TensorBoard (the extra "tensorboard")."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard is not installed: pip install 'reco-serve[tensorboard]', or set tensorboard = false"
        ) from error
    writers = list[SummaryWriter]()

    def write(line: Mapping[str, Any]) -> None:
        if not writers:
            writers.append(
                SummaryWriter(str(folder), purge_step=line["step"])
            )  # a run gone on with: its steps are written again
        for name in line.keys() - {"step"}:
            writers[0].add_scalar(name, line[name], line["step"])
        writers[0].flush()

    return write


def _commit() -> str | None:
    """The commit of the tree that this code runs from; None outside of one."""
    done = subprocess.run(  # noqa: S603  a fixed command
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],  # noqa: S607  the user's own git
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None
