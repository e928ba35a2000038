import dataclasses
from pathlib import Path

import numpy as np
import pytest

from index_store.types import Pairs
from models.encoder.encoder import Encoded, Encoder
from models.errors import DataError
from models.evaluation.ablation import ablate, markdown
from models.evaluation.evaluate import Labels, memory_curve
from models.evaluation.queries import LabelledPhotos, Queries, Setting
from models.evaluation.submemories import SubMemories
from models.evaluation.workbench import LearningRecipe, Workbench
from models.fusion.checkpoint import training_free_fusions
from models.reco import Reco
from models.tests.small import build_memory, unit_rows
from models.training.episodes import concatenate_pairs

CLASSES = 6


def world(encoder: Encoder, folder: Path) -> tuple[LabelledPhotos, Labels, Pairs, Pairs]:
    """Photos that resemble those of their class in the memory, whose captions are the very prompts;
    another memory to learn from.
    """
    rng = np.random.default_rng(0)
    names = [f"thing {i}" for i in range(CLASSES)]
    labels = Labels(names, ["a photo of a {}."], encoder)
    said = labels._prompts.encoded.vectors
    seen = unit_rows(rng.standard_normal((CLASSES, encoder.dim)))

    def near(label: np.ndarray) -> np.ndarray:
        return unit_rows(seen[label] + 0.1 * rng.standard_normal((len(label), encoder.dim)))

    of = np.arange(60) % CLASSES
    records = [{"caption": names[i], "class": names[i]} for i in of]
    memory, taught_by = (
        Pairs(np.array([f"{name}{i}" for i in range(60)]), near(of), said[of], records) for name in "mt"
    )
    asked = np.arange(30) % CLASSES
    photos = LabelledPhotos(
        [str(i) for i in range(30)], [names[i] for i in asked], Queries(Encoded(near(asked), None), [()] * 30), []
    )
    return photos, labels, memory, taught_by


def test_every_claim_becomes_a_row_and_a_second_run_measures_nothing(encoder: Encoder, tmp_path: Path) -> None:
    photos, labels, memory, taught_by = world(encoder, tmp_path)
    one, two = (
        build_memory(tmp_path / name, pairs, encoder.fingerprint) for name, pairs in (("m", memory), ("t", taught_by))
    )
    served = training_free_fusions("core", encoder.dim, alpha=40.0, k=5)
    bench = Workbench(
        encoder,
        photos,
        labels,
        one,
        two,
        LearningRecipe(steps=2, batch=16, k=3, alpha=50.0, seeds=(0, 1)),
        tmp_path,
        served=served,
    )
    rows = ablate(bench, tmp_path / "rows.jsonl")
    by_name = {(row.claim, row.setting): row for row in rows}
    assert len(by_name) == len(rows) > 30
    assert by_name["plain CLIP", "none"].gain == 0
    assert by_name["side enhanced", "image"].shares == [1.0]  # the captions found are the prompts
    assert by_name["side enhanced", "image"].low > 0
    assert len(by_name["fusion", f"{served.fusion_id}, which serves, k 5"].shares) == 1
    assert ("fusion", "mean, not learned, k 5") in by_name
    assert by_name["control", "shuffled memory"].gain < 0.5 * by_name["search keys", "the memory's own"].gain
    assert len(by_name["fusion", "mlp, learned"].shares) == 2
    assert markdown(rows).count("\n|") == len(rows) + 1
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert ablate(bench, tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    bench.recipe = dataclasses.replace(bench.recipe, steps=3)
    with pytest.raises(DataError, match="measured on other data, memories or options"):
        ablate(bench, tmp_path / "rows.jsonl")


def test_more_of_the_memory_is_right_more_often(encoder: Encoder, tmp_path: Path) -> None:
    photos, labels, pairs, _ = world(encoder, tmp_path)
    memory, rule = (
        build_memory(tmp_path / "m", pairs, encoder.fingerprint),
        training_free_fusions("core", encoder.dim, alpha=50.0, k=3),
    )
    reco = Reco(encoder, rule.fusions, rule.fusion_id, rule.k)
    points = memory_curve(reco, photos, labels, SubMemories(memory, tmp_path / "parts"), Setting("image"))
    assert [pairs for pairs, _ in points] == [2, 3, 6, 15, 30, 60]
    assert points[0][1] < 0.6 < points[-1][1] == 1.0


def test_parts_are_of_the_same_pairs_and_keys(encoder: Encoder, tmp_path: Path) -> None:
    _, _, pairs, _ = world(encoder, tmp_path)
    keys = unit_rows(np.random.default_rng(1).standard_normal((60, 9)))
    memory = build_memory(
        tmp_path / "m",
        dataclasses.replace(pairs, image_key=keys),
        encoder.fingerprint,
        {"image": "trunk", "text": "vector"},
    )
    parts = SubMemories(memory, tmp_path / "parts")
    assert parts.random_share(1.0, 0) is memory
    half = parts.random_share(0.5, 0)
    assert parts.random_share(0.5, 0) is half
    assert (len(half), half.key_kind("image"), half.manifest.key_dim("image")) == (30, "trunk", 9)
    assert {str(name) for block in half.blocks() for name in block.ids} < set(pairs.ids.tolist())
    assert parts.with_vector_keys().key_kind("image") == "vector"
    shuffled = concatenate_pairs(list(parts.with_shuffled_texts(0).blocks()))
    np.testing.assert_array_equal(shuffled.image, concatenate_pairs(list(memory.blocks())).image)
    assert (shuffled.text != concatenate_pairs(list(memory.blocks())).text).any()
