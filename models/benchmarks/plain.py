"""The training loop as one would write it first: plain PyTorch, everything in memory as tensors
(same arithmetic as `trainer`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from index_store.types import SIDES, Side
from models.fusion.fusion import build_fusions
from models.training.episodes import Episode
from models.training.trainer import WARM_UP, TrainerConfig


class PlainLoop:
    """The `default` preset on one episode, step after step, without checkpoints, curves or
    checks.
    """

    def __init__(self, episode: Episode, learning: TrainerConfig) -> None:
        self.learning, self.step = learning, 0
        lookups = episode.lookups
        self.query = {side: torch.tensor(lookups[side].query) for side in SIDES}  # (M, D)
        self.known = {side: torch.tensor(lookups[side].known) for side in SIDES}  # (U, D)
        self.rows = {side: torch.tensor(lookups[side].rows) for side in SIDES}  # (M, K)
        self.scores = {side: torch.tensor(lookups[side].scores) for side in SIDES}  # (M, K)
        self.photo, self.caption = torch.tensor(episode.photo), torch.tensor(episode.caption)
        torch.manual_seed(learning.seed)
        self.fusions = build_fusions("default", self.query["image"].shape[1])
        self.parameters = list(
            nn.ModuleList(self.fusions.values()).parameters()
        )  # each once: the sides share their metrics
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=learning.learning_rate, weight_decay=learning.weight_decay
        )

    def run(self, steps: int) -> float:
        """So many steps; the loss of the last one."""
        loss = math.nan
        for _ in range(steps):
            rate = min(1.0, (self.step + 1) / WARM_UP) * (
                0.5 + 0.5 * math.cos(math.pi * self.step / self.learning.steps)
            )
            self.optimiser.param_groups[0]["lr"] = self.learning.learning_rate * rate
            batch = torch.randperm(len(self.photo))[: self.learning.batch]
            found = self._loss(batch)
            self.optimiser.zero_grad()
            found.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.parameters, self.learning.clip)
            self.optimiser.step()
            self.step, loss = self.step + 1, found.item()
        return loss

    def _loss(self, batch: Tensor) -> Tensor:
        (plain_image, image), (plain_text, text) = (self._refine(batch, side) for side in SIDES)
        photo, caption = self.photo[batch], self.caption[batch]
        same = (photo[:, None] == photo) | (caption[:, None] == caption)
        same &= ~torch.eye(len(batch), dtype=torch.bool)
        target = torch.arange(len(batch))
        total = torch.zeros(())
        for one, another in ((image, text), (image, plain_text), (plain_image, text)):
            logits = (self.learning.scale * one @ another.T).masked_fill(same, torch.finfo(torch.float32).min)
            total = total + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return total

    def _refine(self, batch: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        """The query (B, D) itself, and enhanced with a random part of its neighbours."""
        rows = self.rows[side][batch]  # (B, K)
        most = rows.shape[1]
        kept = (torch.arange(most) < torch.randint(1, most + 1, ())) & (torch.rand(rows.shape) >= self.learning.drop)
        mask = (rows >= 0) & kept
        query, values = self.query[side][batch].float(), self.known[side][rows.clamp(min=0)].float() * mask[..., None]
        return query, self.fusions[side](query, values, self.scores[side][batch] * mask, mask).vectors
