"""Steps per second of training a fusion, on the device and on the CPU."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from index_store.benchmarks.turns import measure_seconds
from loadtests.gpu.part import Part, run_part
from models.benchmarks.gpu.subjects import build_memory, load_encoder, synchronize
from models.benchmarks.prepare import NAME, VERSION, time_lookup
from models.fusion.fusion import build_fusions
from models.training.episodes import Episode
from models.training.trainer import Trainer, TrainerConfig

BATCH = 256


def load_episode(part: Part) -> Episode:
    """Pairs with the neighbours that they have among themselves."""
    encoder, store = load_encoder(part, device="cpu"), part.work / "store-training"
    build_memory(store, NAME, [VERSION], part.choose(20_000, 1_000), encoder)
    episode, seconds = time_lookup(store, part.work / "prepared", Path(part.model))
    part.say(f"neighbours of {len(episode)} pairs looked up in {seconds:.1f} s")
    return episode


def steps_per_s(part: Part, episode: Episode, device: str, precision: Literal["fp32", "bf16"], steps: int) -> float:
    """Steps per second of the loop of `reco train`, after the first ones."""
    torch.manual_seed(0)
    warm_up = part.choose(3, 1)
    learning = TrainerConfig(warm_up + steps, BATCH, 1e-4, 0.01, seed=0, scale=100.0, precision=precision)
    width = episode.lookups["image"].query.shape[1]
    fusions = {side: fusion.to(device) for side, fusion in build_fusions("default", width).items()}
    loop = Trainer(fusions, [episode], [np.arange(len(episode))], learning)
    loop.run(until=warm_up)
    synchronize(device)

    def run() -> None:
        loop.run()
        synchronize(device)

    speed = steps / measure_seconds(run)
    part.say(f"{speed:.1f} steps/s of {BATCH} pairs, {precision}, {device}")
    return speed


def measure(part: Part) -> None:
    """In both precisions on the device, then on the CPU."""
    episode = part.attempt("episode", partial(load_episode, part))
    if episode is None:
        return
    part.report["episode"] = {"pairs": len(episode)}
    precisions: Sequence[Literal["fp32", "bf16"]] = ("fp32", "bf16")
    runs = [(part.device, precision, part.choose(200, 2)) for precision in precisions]
    if part.device != "cpu":
        runs.append(("cpu", precisions[0], 10))
    for device, precision, steps in runs:
        part.attempt(
            f"steps_per_s, {device}, {precision}", partial(steps_per_s, part, episode, device, precision, steps)
        )


if __name__ == "__main__":
    sys.exit(run_part(measure))
