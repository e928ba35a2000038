"""Settings that the flags of an evaluation stand for."""

from __future__ import annotations

from models.evaluation.queries import Setting
from models.reco import RetrievalMode
from service.cli.evaluate.options import EvaluateOptions, LabelOptions


def test_every_combination_of_the_lists_is_a_setting() -> None:
    options = EvaluateOptions(["image", "both"], ["uni", "cross"], ["cross"], [1, 5], max_similarity=0.9)
    assert options.settings() == [
        Setting(enhance, k, RetrievalMode(search, "cross"), 0.9, None, 0.0)
        for enhance in ("image", "both")
        for search in ("uni", "cross")
        for k in (1, 5)
    ]


def test_without_a_list_of_neighbours_the_fusion_decides() -> None:
    assert [(each.enhance, each.k) for each in EvaluateOptions().settings()] == [
        ("image", None),
        ("text", None),
        ("both", None),
    ]


def test_plain_queries_are_a_setting_of_their_own_only_with_dehub() -> None:
    assert EvaluateOptions(["none"]).settings() == []
    (plain,) = EvaluateOptions(["none"], dehub=0.75).settings()
    assert (plain.enhance, plain.dehub) == ("none", 0.75)


def test_the_caption_of_an_item_is_its_class() -> None:
    assert LabelOptions(label="fine_class").caption == "{fine_class}"
