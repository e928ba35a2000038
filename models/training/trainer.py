"""The training loop, on arrays only.

Every step is a function of the seed and its number, so a resumed run is bit-identical on a CPU.

Alphabet: M training pairs, K neighbours, B batch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from index_store.types import SIDES, Side
from models.errors import ConfigError, TrainingFailed
from models.fusion.checkpoint import read_tensors, write_tensors
from models.fusion.fusion import Fused, Fusion, set_metric_directions
from models.fusion.losses import reco_loss
from models.progress import progress
from models.training.config import TERMS
from models.training.episodes import Episode, covariance

WARM_UP = 20  # steps
MAX_SCALE = 100.0  # CLIP's own ceiling on the inverse temperature
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """Hyperparameters of the training loop.

    scale: inverse temperature of the loss, its initial value if learn_scale.  clip: maximum
    gradient norm.  The others as in TrainConfig.
    """

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    seed: int
    scale: float
    terms: Sequence[str] = TERMS
    drop: float = 0.1
    pool_learning_rate: float = 0.03
    clip: float = 1.0
    learn_scale: bool = False
    every: int = 50  # steps between two evaluations, and between two checkpoints
    patience: int = 0  # evaluations without improvement before the run stops; 0 = never
    precision: str = "fp32"
    compile: bool = False


@dataclass(slots=True)
class TrainerState:
    """Progress of a run, written to its checkpoint.

    best: best held-out metric.  waited: evaluations since the best.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: float = -math.inf
    waited: int = 0


class Trainer:
    """Trains the fusions in place on the rows `learned` of each episode; the episodes take turns,
    one per step.

    watch: computes the held-out metric, greater = better, or None.  folder: where curve.jsonl and
    the checkpoint are written, or None.
    on_line: called with each line of the curve.
    """

    def __init__(
        self,
        fusions: Mapping[Side, Fusion],
        episodes: Sequence[Episode],
        learned: Sequence[np.ndarray],
        learning: TrainerConfig,
        *,
        watch: Callable[[], float] | None = None,
        folder: Path | None = None,
        on_line: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._episodes, self._learned, self._learning = episodes, learned, learning
        self._watch, self._folder, self._on_line = watch, folder, on_line
        self._device = next(fusions["image"].parameters()).device.type
        set_metric_directions(fusions, lambda side: covariance(episodes, side))
        self._layers = nn.ModuleDict({str(side): fusion for side, fusion in fusions.items()})
        self._refine = {side: torch.compile(fusion) if learning.compile else fusion for side, fusion in fusions.items()}
        self._scale = nn.Parameter(
            torch.tensor(math.log(learning.scale), device=self._device), requires_grad=learning.learn_scale
        )
        self._optimiser = _optimiser(self._layers, self._scale, learning)
        self._peaks = [group["lr"] for group in self._optimiser.param_groups]
        self._best = _copy_weights(self._layers)
        self._identity = _identity(fusions, episodes, learning)
        self.progress = TrainerState()

    def run(self, until: int | None = None) -> TrainerState:
        """Train to the end, or to step `until`. With `watch` and patience, the best fusions are
        restored at the end.
        """
        last = self._learning.steps if until is None else min(until, self._learning.steps)
        with progress(last, "fusion", "step") as meter:
            meter.start_at(self.progress.step)
            while self.progress.step < last and not self._is_out_of_patience():
                self._step()
                meter.advance(1)
        self._layers.eval()
        if self._learning.patience and self._watch is not None and math.isfinite(self.progress.best):
            self._layers.load_state_dict(self._best)
        return self.progress

    def resume(self) -> bool:
        """Load the folder's checkpoint; False where there is none. ConfigError where it was written
        under another configuration or other data.
        """
        path = None if self._folder is None else self._folder / CHECKPOINT
        if path is None or not path.exists():
            return False
        header, tensors = read_tensors(path)
        if header.get("identity") != self._identity:
            raise ConfigError(
                f"{path.name} was written by another configuration or other data: give another output, or train anew"
            )
        self._layers.load_state_dict(_under(tensors, "layers"))
        self._best = _under(tensors, "best")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under(tensors, "optimiser").items():
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {})[moment] = tensor
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": moments})
        self._scale.data.copy_(tensors["scale"])
        self.progress = TrainerState(**json.loads(header["progress"]))
        torch.set_rng_state(tensors["rng"].cpu())
        self._truncate_curve()
        return True

    def _truncate_curve(self) -> None:
        """Truncate the curve to the checkpoint, since later steps will run again."""
        path = (self._folder or Path()) / "curve.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(lines[: self.progress.step]), "utf-8")

    def _is_out_of_patience(self) -> bool:
        return bool(self._learning.patience) and self.progress.waited >= self._learning.patience

    def _step(self) -> None:
        learning, step = self._learning, self.progress.step
        self._layers.train()
        for group, peak in zip(self._optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * _schedule(step, learning.steps)
        rng = np.random.default_rng([learning.seed, step])
        turn = step % len(self._episodes)
        rows = rng.permutation(self._learned[turn])[: learning.batch]
        loss = _step_loss(self._refine, self._episodes[turn], rows, learning, self._scale.exp(), rng, self._device)
        if not torch.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss.item()} at step {step}: lower learning_rate, which is {learning.learning_rate}{self._describe_checkpoint()}"
            )
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        length = nn.utils.clip_grad_norm_(self._layers.parameters(), learning.clip)
        self._optimiser.step()
        self._scale.data.clamp_(max=math.log(MAX_SCALE))
        self.progress.step += 1
        self.progress.losses.append(loss.item())
        self._log_step(step, loss.item(), float(length))

    def _log_step(self, step: int, loss: float, gradient: float) -> None:
        """Append one line to the curve; every `every` steps evaluate the held-out metric and write
        a checkpoint.
        """
        line: dict[str, Any] = {"step": step, "loss": loss, "gradient": gradient, "scale": math.exp(self._scale.item())}
        look = self.progress.step % self._learning.every == 0 or self.progress.step == self._learning.steps
        if look and self._watch is not None:
            self._layers.eval()
            line["held_out"] = self._compare_with_best(self._watch())
        if self._on_line is not None:
            self._on_line(line)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if look:
            self._save(self._folder / CHECKPOINT)

    def _compare_with_best(self, found: float) -> float:
        if found > self.progress.best:
            self.progress.best, self.progress.waited, self._best = found, 0, _copy_weights(self._layers)
        else:
            self.progress.waited += 1
        return found

    def _save(self, path: Path) -> None:
        """Write the state that the next step depends on, by one atomic rename, without pickle."""
        moments = self._optimiser.state_dict()["state"]
        tensors = {f"layers.{name}": value for name, value in self._layers.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        tensors |= {
            f"optimiser.{number}.{name}": value for number, each in moments.items() for name, value in each.items()
        }
        tensors |= {"scale": self._scale.data, "rng": torch.get_rng_state()}
        write_tensors(path, tensors, {"identity": self._identity, "progress": json.dumps(asdict(self.progress))})

    def _describe_checkpoint(self) -> str:
        """Describe the last good checkpoint for an error message; "" without one."""
        if self._folder is None or not (self._folder / CHECKPOINT).exists():
            return ""
        return (
            f"; the last good checkpoint is of step {self.progress.step // self._learning.every * self._learning.every}"
        )


def learn(
    fusions: Mapping[Side, Fusion], episodes: Sequence[Episode], learned: Sequence[np.ndarray], learning: TrainerConfig
) -> list[float]:
    """Train the fusions in place; return the loss of every step."""
    return Trainer(fusions, episodes, learned, learning).run().losses


def _identity(fusions: Mapping[Side, Fusion], episodes: Sequence[Episode], learning: TrainerConfig) -> str:
    """Digest of layer shapes, data and hyperparameters, which a checkpoint must match to be
    resumed.
    """
    configs = {side: asdict(fusion.config) for side, fusion in fusions.items()}
    content = json.dumps([configs, [episode.digest() for episode in episodes], asdict(learning)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of one part, by their names within it."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _copy_weights(layers: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in layers.state_dict().items()}


def _optimiser(layers: nn.Module, scale: nn.Parameter, learning: TrainerConfig) -> torch.optim.Optimizer:
    """AdamW; the few numbers of the pool are far from where they start and need longer steps than a
    matrix bears.
    """
    named = list(layers.named_parameters())
    pool, others = ([value for name, value in named if (".pool." in name) is wanted] for wanted in (True, False))
    groups = [{"params": others, "lr": learning.learning_rate, "weight_decay": learning.weight_decay}]
    numbers = [{"params": pool, "lr": learning.pool_learning_rate, "weight_decay": 0.0}] if pool else []
    return torch.optim.AdamW(
        [*groups, *numbers, *([{"params": [scale], "lr": 1e-3, "weight_decay": 0.0}] if learning.learn_scale else [])]
    )


def _step_loss(
    refine: Mapping[Side, Callable[..., Fused]],
    episode: Episode,
    rows: np.ndarray,
    learning: TrainerConfig,
    scale: Tensor,
    rng: np.random.Generator,
    device: str,
) -> Tensor:
    """The loss of one batch, each side refined with a random part of its neighbours."""
    batches = {
        side: episode.lookups[side].batch(rows, _some(episode, side, rows, learning.drop, rng), device)
        for side in SIDES
    }
    with torch.autocast(device, torch.bfloat16, enabled=learning.precision == "bf16"):
        image, text = (refine[side](*batches[side]).vectors.float() for side in SIDES)
    both, image_only, text_only = (term in learning.terms for term in TERMS)
    same = torch.from_numpy(episode.same(rows)).to(device)
    plain_image, plain_text = (batches[side][0] for side in SIDES)
    return reco_loss(
        image, text, plain_image, plain_text, scale, both=both, image_only=image_only, text_only=text_only, same=same
    )


def _some(episode: Episode, side: Side, rows: np.ndarray, drop: float, rng: np.random.Generator) -> np.ndarray:
    """(B, K) bool: the nearest k of them with k drawn once for the batch, less the share `drop`."""
    most = episode.lookups[side].k
    nearest = np.arange(most) < rng.integers(1, most + 1)  # (K,)
    return np.asarray(nearest & (rng.random((len(rows), most)) >= drop))


def _schedule(step: int, steps: int) -> float:
    """A short linear rise, then half a cosine down to zero."""
    return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
