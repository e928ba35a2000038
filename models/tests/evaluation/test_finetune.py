"""Fine-tuning really learns, changes nothing it was given, and stands in the ablation's table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.data.encode import encode_samples
from models.data.samples import Sample
from models.encoder.encoder import Encoder
from models.errors import DataError
from models.evaluation.ablation import ablate, markdown
from models.evaluation.evaluate import Labels
from models.evaluation.finetune import Tuning, fine_tune
from models.evaluation.queries import encode_photos
from models.evaluation.workbench import FineTuneBaseline, LearningRecipe, Workbench
from models.tests.small import build_memory, image_bytes, picture
from models.training.episodes import concatenate_pairs

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200)}


def coloured(numbers: range) -> list[Sample]:
    """Photos that are mostly of one colour, which the caption names."""
    found = list[Sample]()
    for i in numbers:
        name = list(COLOURS)[i % 3]
        mixed = np.asarray(picture(i), np.float32) / 4 + np.array(COLOURS[name]) * 0.75
        found.append(
            Sample(
                f"{name}-{i}", image_bytes(Image.fromarray(mixed.astype(np.uint8)), "PNG"), f"a photo of a {name}.", {}
            )
        )
    return found


def share_right(encoder: Encoder, samples: list[Sample]) -> float:
    # (3, D)
    prompts = encoder.encode(encoder.tokenize([f"a photo of a {name}." for name in COLOURS]), "text").vectors
    photos = concatenate_pairs(
        list(encode_samples(samples, encoder, kinds={"image": "vector", "text": "vector"}))
    ).image
    guesses = (photos.astype(np.float32) @ prompts.T).argmax(1)
    return float(np.mean([list(COLOURS)[guess] in sample.id for guess, sample in zip(guesses, samples, strict=True)]))


def test_the_copy_learns_and_the_encoder_stays(encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    learned = fine_tune(encoder, coloured(range(60)), Tuning(steps=25, batch=24, learning_rate=1e-3))
    fresh = coloured(range(60, 90))
    assert share_right(learned, fresh) > 0.9 > 0.7 > share_right(encoder, fresh)
    assert all((value == encoder.module.state_dict()[name]).all() for name, value in before.items())
    assert not any(value.requires_grad for value in encoder.module.parameters())
    assert learned.fingerprint != encoder.fingerprint
    assert "+tuned@" in learned.fingerprint


def test_too_few_pairs_for_a_batch(encoder: Encoder) -> None:
    with pytest.raises(DataError, match="5 pairs are fewer than one batch of 24"):
        fine_tune(encoder, coloured(range(5)), Tuning(batch=24))


def test_the_table_sets_it_against_the_fusion_alone(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.evaluation.ablation.plan_rows", lambda _: ())
    pairs, asked = (
        coloured(range(48)),
        [replace(sample, caption=sample.id.split("-")[0]) for sample in coloured(range(48, 60))],
    )
    labels = Labels(list(COLOURS), ["a photo of a {}."], encoder)
    known = concatenate_pairs(list(encode_samples(pairs, encoder, kinds={"image": "vector", "text": "vector"})))
    memory = build_memory(tmp_path / "m", known, encoder.fingerprint)
    rival = FineTuneBaseline(
        pairs, lambda other: encode_photos(asked, other), Tuning(steps=25, batch=24, learning_rate=1e-3)
    )
    recipe = LearningRecipe(steps=2, batch=16, k=3, seeds=(0, 1))
    bench = Workbench(encoder, encode_photos(asked, encoder), labels, memory, memory, recipe, tmp_path, rival=rival)
    fusion, whole = ablate(bench, tmp_path / "rows.jsonl")
    assert (len(fusion.shares), len(whole.shares)) == (2, 1)
    assert whole.shares[0] > 0.9
    assert fusion.seconds is not None
    assert whole.seconds is not None
    assert whole.seconds > fusion.seconds > 0
    assert "learned from the same 48 pairs|full fine-tuning, 25 x 24, no memory, one seed" in markdown([fusion, whole])
