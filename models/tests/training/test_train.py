import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from index_store.errors import IncompatibleSnapshot
from index_store.types import Pairs
from models.encoder.encoder import Encoder
from models.errors import ConfigError, DataError, EncoderUnavailable, TrainingFailed
from models.fusion.checkpoint import load_fusions
from models.fusion.fusion import build_fusions
from models.reco import Reco
from models.tests.small import build_memory, unit_rows, write_tar
from models.training.config import EpisodeConfig, TrainConfig
from models.training.episodes import Episode, look_up
from models.training.train import accuracy, train
from models.training.trainer import TrainerConfig, learn

CLASSES = 12


def strangers(rows: int, seed: int, dim: int, prefix: str) -> Pairs:
    """Pairs whose text has nothing to do with their image but for the class: only a memory can tell
    which belong together.
    """
    rng, world = np.random.default_rng(seed), np.random.default_rng(7)
    seen, said = unit_rows(world.standard_normal((CLASSES, dim))), unit_rows(world.standard_normal((CLASSES, dim)))
    label = np.arange(rows) % CLASSES
    image = unit_rows(seen[label] + 0.1 * rng.standard_normal((rows, dim)))
    ids = np.array([f"{prefix}{row}" for row in range(rows)])
    return Pairs(ids, image, said[label], [{"caption": f"class {number}"} for number in label])


@pytest.fixture
def episode(reco: Reco, tmp_path: Path) -> Episode:
    dim, encoder = reco.encoder.dim, reco.encoder.fingerprint
    memory = build_memory(tmp_path, strangers(96, 0, dim, "memory"), encoder)
    return look_up("strangers", strangers(120, 1, dim, "query"), memory, reco, 4, {})


def taught(episode: Episode, dim: int, seed: int, **changes: object) -> tuple[list[float], float, float]:
    """Losses, and held-out accuracy before and after."""
    fusions = build_fusions("paper", dim)
    learned, away = episode.split(0.3, seed=0)
    learning = TrainerConfig(steps=60, batch=48, learning_rate=3e-3, weight_decay=0.0, seed=seed, scale=20.0)
    before = accuracy(fusions, episode, away)
    losses = learn(fusions, [episode], [learned], dataclasses.replace(learning, **changes))  # type: ignore[arg-type]
    return losses, before, accuracy(fusions, episode, away)


def test_learning_turns_a_memory_into_knowledge(episode: Episode, reco: Reco) -> None:
    losses, before, after = taught(episode, reco.encoder.dim, seed=0)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert before < 0.3
    assert after > 0.9


def dressed(rows: int, seed: int, dim: int, prefix: str, world: int) -> Pairs:
    """As `strangers`, but a few directions, which say nothing of the class, rule every cosine.
    world: decides the classes, not these.
    """
    rng, classes, fashion = (np.random.default_rng(each) for each in (seed, world, 5))
    seen, said = unit_rows(classes.standard_normal((CLASSES, dim))), unit_rows(classes.standard_normal((CLASSES, dim)))
    label, loud = np.arange(rows) % CLASSES, fashion.standard_normal((2, 3, dim)) / dim**0.5
    image, text = (
        unit_rows(of[label] + 2 * rng.standard_normal((rows, 3)) @ noise)
        for of, noise in zip((seen, said), loud, strict=True)
    )
    ids = np.array([f"{prefix}{row}" for row in range(rows)])
    return Pairs(ids, image, text, [{"caption": f"class {number}"} for number in label])


def test_the_learned_metric_holds_for_classes_never_seen(reco: Reco, tmp_path: Path) -> None:
    dim, encoder = reco.encoder.dim, reco.encoder.fingerprint
    known, foreign = (
        look_up(
            f"world {world}",
            dressed(120, 1, dim, "query", world),
            build_memory(tmp_path / str(world), dressed(240, 0, dim, "memory", world), encoder),
            reco,
            4,
            {},
        )
        for world in (7, 8)
    )
    everything, fusions = np.arange(120), build_fusions("default", dim)
    rule = accuracy(fusions, foreign, everything)
    learning = TrainerConfig(steps=150, batch=96, learning_rate=1e-5, weight_decay=0.0, seed=0, scale=20.0)
    learn(fusions, [known], [everything], learning)
    assert accuracy(fusions, foreign, everything) > rule + 0.3


def test_a_seed_decides_everything(episode: Episode, reco: Reco) -> None:
    import torch

    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(taught(episode, reco.encoder.dim, seed, steps=5)[0])
    assert runs[0] == runs[1] != runs[2]


def test_a_pair_never_finds_itself_nor_its_other_captions(reco: Reco, tmp_path: Path) -> None:
    image = np.repeat(unit_rows(np.random.default_rng(0).standard_normal((6, reco.encoder.dim))), 2, axis=0)
    text = unit_rows(np.random.default_rng(1).standard_normal((12, reco.encoder.dim)))
    ids = np.array([f"photo{row // 2}#{row % 2}" for row in range(12)])
    pairs = Pairs(ids, image, text, [{"caption": str(row)} for row in range(12)])
    snapshot = build_memory(tmp_path, pairs, reco.encoder.fingerprint)
    episode = look_up("itself", pairs, snapshot, reco, 4, {})
    for side in ("image", "text"):
        assert episode.lookups[side].scores.max() < 0.99
    assert episode.same(np.array([0, 1, 2])).tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],
    ]


def test_near_duplicates_are_passed_over(reco: Reco, tmp_path: Path) -> None:
    pairs = strangers(24, 0, reco.encoder.dim, "memory")
    queries = Pairs(np.array([f"query{row}" for row in range(24)]), pairs.image, pairs.text, pairs.records)
    snapshot = build_memory(tmp_path, pairs, reco.encoder.fingerprint)
    limited = look_up("limited", queries, snapshot, reco, 4, {"image": 0.999})
    assert limited.lookups["image"].scores.max() < 0.9995
    assert limited.lookups["text"].scores.max() > 0.999


def test_photos_are_held_out_whole(episode: Episode) -> None:
    learned, away = episode.split(0.25, seed=1)
    assert len(away) == 30
    assert not set(episode.photo[learned]) & set(episode.photo[away])


def test_a_loss_that_is_not_finite_stops_the_run(episode: Episode, reco: Reco) -> None:
    with pytest.raises(TrainingFailed, match="learning_rate"):
        taught(episode, reco.encoder.dim, seed=0, scale=float("nan"), steps=2)


def test_a_configuration_becomes_a_checkpoint(
    recipe: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig.read(recipe)
    summary = train(config)
    made = load_fusions(Path(config.output), encoder=encoder.fingerprint)
    assert (made.fusion_id, made.k) == (summary.fusion_id, 3)
    assert made.card["config"]["steps"] == 6
    assert str(summary).count("\n") == 0
    assert "things@v1" in str(summary)
    assert "1 items left out" in capsys.readouterr().err
    assert train(config).fusion_id == made.fusion_id


def test_tensorboard_shows_the_curve(recipe: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(TrainConfig.read(recipe), tensorboard=True)
    train(config)
    folder = Path(config.output).with_suffix(".run")
    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert [event.step for event in shown.Scalars("loss")] == [line["step"] for line in curve]
    np.testing.assert_allclose(
        [event.value for event in shown.Scalars("loss")], [line["loss"] for line in curve], rtol=1e-6
    )
    assert "held_out" in shown.Tags()["scalars"]


def test_terms_can_be_left_out(recipe: Path) -> None:
    config = dataclasses.replace(TrainConfig.read(recipe), terms=("image",), preset="paper", steps=2)
    assert train(config).fusion_id != train(dataclasses.replace(config, terms=("text",))).fusion_id


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("steps = 6", "step = 6", r"'step'.*'steps'"),
        ("memory =", "memry =", r"\[\[episodes\]\] 'memry'"),
        ("steps = 6", 'steps = "six"', "steps is 'six'"),
        ("steps = 6", "steps = true", "steps is True"),
        ("steps = 6", "steps = 0", "steps is 0: Input should be greater than or equal to 1"),
        ("k = 3", 'preset = "best"', "preset is 'best'"),
        ("k = 3", 'terms = ["all"]', "terms is"),
        ("k = 3", "terms = 3", "terms is 3"),
        ("[[episodes]]", "[episodes]", r"\[\[episodes\]\] tables"),
        ("output =", "seed = 1 #", "output is missing"),
        ("k = 3", "k = ", "TOML"),
    ],
)
def test_a_wrong_configuration_names_its_mistake(recipe: Path, before: str, after: str, named: str) -> None:
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    with pytest.raises(ConfigError, match=named) as error:
        TrainConfig.read(recipe)
    assert "\n" not in str(error.value)


def test_sources_that_give_nothing_are_named(recipe: Path, tmp_path: Path) -> None:
    config = TrainConfig.read(recipe)
    empty = write_tar(tmp_path / "empty.tar", [("x.jpg", b"no"), ("x.json", {"class": "none"})])
    with pytest.raises(DataError, match=r"empty\.tar"):
        train(dataclasses.replace(config, episodes=(EpisodeConfig((str(empty),), "things", "{class}"),)))
    with pytest.raises(ConfigError, match="NOWHERE_TO_BE_FOUND"):
        train(dataclasses.replace(config, episodes=(EpisodeConfig(("${NOWHERE_TO_BE_FOUND}/x.tar",), "things"),)))


@pytest.mark.parametrize(
    ("before", "after", "error", "named"),
    [
        ("k = 3", "k = 25", ConfigError, r"k is 25, but things@v1 holds 24 pairs"),
        (
            "a photo of {class}",
            "a thing",
            DataError,
            "things@v1: of 24 photos, 18 pairs to learn from have 1 different captions",
        ),
        ("held_out = 0.25", "held_out = 0.97", DataError, "1 pairs to learn from"),
        ('pretrained = "random"', 'pretrained = "laion2b"', EncoderUnavailable, "laion2b"),
        ("tinyvit.json", "tinymobile.json", IncompatibleSnapshot, "things@v1.*tinyvit"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_line(
    recipe: Path, before: str, after: str, error: type[Exception], named: str
) -> None:
    text = recipe.read_text()
    assert before in text
    recipe.write_text(text.replace(before, after, 1))
    with pytest.raises(error, match=named) as refused:
        train(TrainConfig.read(recipe))
    assert "\n" not in str(refused.value)
