import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.errors import ConfigError, TrainingFailed
from models.fusion.fusion import build_fusions
from models.reco import Reco
from models.tests.small import build_memory
from models.tests.training.test_train import strangers
from models.training.episodes import Episode, look_up
from models.training.trainer import Trainer, TrainerConfig

LEARNING = TrainerConfig(
    steps=12, batch=16, learning_rate=3e-3, weight_decay=0.01, seed=0, scale=20.0, every=4, learn_scale=True
)


@pytest.fixture
def episode(reco: Reco, tmp_path: Path) -> Episode:
    dim, encoder = reco.encoder.dim, reco.encoder.fingerprint
    memory = build_memory(tmp_path, strangers(96, 0, dim, "memory"), encoder)
    return look_up("strangers", strangers(120, 1, dim, "query"), memory, reco, 4, {})


def loop_of(episode: Episode, folder: Path | None, **changes: object) -> Trainer:
    torch.manual_seed(0)
    fusions = build_fusions("paper", episode.lookups["image"].query.shape[1])
    learning = dataclasses.replace(LEARNING, **changes)  # type: ignore[arg-type]
    rows = np.arange(len(episode))
    return Trainer(fusions, [episode], [rows], learning, watch=lambda: 0.5, folder=folder)


def weights(loop: Trainer) -> dict[str, torch.Tensor]:
    return loop._layers.state_dict()


def test_a_stopped_run_goes_on_bit_for_bit(episode: Episode, tmp_path: Path) -> None:
    whole = loop_of(episode, None)
    losses = whole.run().losses
    first = loop_of(episode, tmp_path / "run")
    first.run(until=6)  # two steps past the checkpoint of step 4: these are lost, and made again
    second = loop_of(episode, tmp_path / "run")
    torch.manual_seed(99)
    assert second.resume()
    assert second.progress.step == 4
    assert second.run().losses == losses
    curve = [json.loads(line)["step"] for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert curve == list(range(12))
    for name, value in weights(whole).items():
        assert torch.equal(weights(second)[name], value)
    with pytest.raises(ConfigError, match="another configuration"):
        loop_of(episode, tmp_path / "run", steps=13).resume()


def test_the_curve_has_a_line_for_every_step(episode: Episode, tmp_path: Path) -> None:
    loop_of(episode, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    assert [line["step"] for line in lines if "held_out" in line] == [3, 7, 11]
    assert lines[-1]["scale"] != lines[0]["scale"]  # learned


def test_a_run_that_gets_no_better_stops_and_keeps_its_best(episode: Episode) -> None:
    loop = loop_of(episode, None, every=2, patience=2)
    seen = [0.1, 0.9, 0.2, 0.3]
    states = []

    def watch() -> float:
        states.append({name: value.clone() for name, value in weights(loop).items()})
        return seen[len(states) - 1]

    loop._watch = watch
    assert loop.run().step == 8
    for name, value in weights(loop).items():
        assert torch.equal(states[1][name], value)


def test_no_step_is_longer_than_the_clip_allows(episode: Episode) -> None:
    free, clipped = (loop_of(episode, None, clip=clip, steps=2) for clip in (1e9, 1e-9))
    before = {name: value.clone() for name, value in weights(free).items()}
    free.run()
    clipped.run()
    moved = [
        max(float((weights(loop)[name] - before[name]).abs().max()) for name in before) for loop in (free, clipped)
    ]
    assert moved[1] < 0.2 * moved[0]


def test_a_loss_that_is_not_finite_names_the_step_and_what_is_kept(episode: Episode, tmp_path: Path) -> None:
    loop = loop_of(episode, tmp_path)
    loop.run(until=5)
    with torch.no_grad():
        loop._scale.fill_(float("nan"))
    with pytest.raises(TrainingFailed, match=r"at step 5.*last good checkpoint is of step 4"):
        loop.run()


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"compile": True}], ids=["bf16", "compiled"])
def test_other_arithmetic_learns_the_same(episode: Episode, changes: dict[str, object]) -> None:
    usual, other = loop_of(episode, None, steps=6).run(), loop_of(episode, None, steps=6, **changes).run()
    assert other.losses != usual.losses or "compile" in changes
    np.testing.assert_allclose(other.losses, usual.losses, rtol=0.02)
    assert all(value.dtype == torch.float32 for value in weights(loop_of(episode, None, **changes)).values())
