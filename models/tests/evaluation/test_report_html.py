import dataclasses

import numpy as np

from models.evaluation.queries import Setting
from models.evaluation.report import Details, Report, compare_with_plain
from models.evaluation.report_html import Example, best_line, page, recommendation, thumbnail
from models.tests.small import picture

SETTINGS = [Setting("both", 1), Setting("both", 10), Setting("image", 10)]


def report_of(shares: dict[str, float]) -> Report:
    """100 queries, of which so many are right, always the first ones."""
    hits = {method: {"top-1": np.arange(100) < 100 * share} for method, share in shares.items()}
    details = Details([("red <b>", 50, 0.1, 0.5), ("blue", 50, 0.3, 0.2)], [("red <b>", "blue", 3)])
    return Report(
        "classify", "m@1", "abc", 10, ["100 images"], compare_with_plain(hits), details, hits, np.full(100, 0.7)
    )


def test_the_recommendation_follows_the_figures() -> None:
    good = report_of({"none": 0.2, "both, k 1": 0.4, "both, k 10": 0.6, "image, k 10": 0.1, "(1-NN)": 0.7})
    assert best_line(good).method == "both, k 10"
    told = recommendation(good, SETTINGS)
    assert told.startswith("Enhance both with k = 10: +40.0 points")
    assert "(1-NN) reaches 70.0 %" in told
    assert "lose against plain: image, k 10 in top-1" in told
    lucky = report_of({"none": 0.2, "both, k 1": 0.2, "both, k 10": 0.2})
    # right on the very half that chooses: worth nothing on the other
    lucky.hits["both, k 10"]["top-1"][::2] = True
    assert best_line(lucky).method == "both, k 10"
    assert recommendation(lucky, SETTINGS).startswith("Do not enhance")
    bad = report_of({"none": 0.2, "both, k 1": 0.2, "both, k 10": 0.1})
    assert recommendation(bad, SETTINGS).startswith("Do not enhance")


def test_what_loses_anywhere_is_not_recommended() -> None:
    def both_ways(shares: dict[str, tuple[float, float]]) -> Report:
        hits = {
            method: {"R@1": np.arange(100) < 100 * one, "R@10": np.arange(100) < 100 * ten}
            for method, (one, ten) in shares.items()
        }
        return Report("retrieve", "m@1", "abc", 10, [], compare_with_plain(hits), None, hits)

    mixed = both_ways({"none": (0.2, 0.6), "both, k 1": (0.4, 0.6), "both, k 10": (0.6, 0.3)})
    assert best_line(mixed).method == "both, k 1"
    told = recommendation(mixed, SETTINGS)
    assert told.startswith("Enhance both with k = 1")
    assert "lose against plain: both, k 10 in R@10" in told
    losing = both_ways({"none": (0.2, 0.6), "both, k 10": (0.6, 0.3)})
    assert recommendation(losing, SETTINGS) == (
        "Do not enhance (enhance=none): every setting tried loses somewhere, the best, both, k 10, in R@10."
    )


def test_the_page_is_whole_and_safe() -> None:
    report = report_of({"none": 0.2, "both, k 1": 0.4, "both, k 10": 0.6, "image, k 10": 0.1})
    example = Example(thumbnail(picture(0)), "red <script>", "blue", "red", [("a photo <i>", 0.81)])
    text = page(dataclasses.replace(report, memory_curve=[(10, 0.3), (100, 0.6)]), SETTINGS, [example], [])
    for part in (
        "+40.0 points",
        "<svg",
        "data:image/jpeg;base64,",
        "0.81 a photo &lt;i&gt;",
        "Recommendation",
        "top-1 by k, both enhanced",
        "top-1 by pairs in the memory, both, k 10",
    ):
        assert part in text
    assert "<script>" not in text
    assert "http" not in text  # nothing is loaded from elsewhere
