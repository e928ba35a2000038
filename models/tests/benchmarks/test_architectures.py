"""One architecture of each family of open_clip against open_clip; `make bench-models` takes all."""

import json

import pytest

from models.benchmarks.architectures import MIN_COSINE, compare
from models.encoder.loading.describe import TESTED, count_parameters


@pytest.mark.parametrize(
    "name", ["RN50", "MobileCLIP2-S0", "ViT-S-16", "PE-Core-T-16-384", "ViTamin-S", "convnext_tiny"]
)
def test_a_family_gives_open_clips_vectors(name: str) -> None:
    found = compare(name)
    assert min(found["image"], found["text"]) >= MIN_COSINE
    tested = json.loads(TESTED.read_text())[name]
    assert (found["trunk"], found["trimmed"]) == (tested["trunk"], tested["trimmed"])


def test_every_tested_architecture_gives_open_clips_vectors() -> None:
    tested = json.loads(TESTED.read_text())
    assert len(tested) >= 50
    assert all(min(each["image"], each["text"]) >= MIN_COSINE for each in tested.values())


def test_parameters_are_counted_without_allocating_them() -> None:
    assert count_parameters("RN50") == {"image": 38_316_896, "text": 63_690_241}
