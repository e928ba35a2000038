"""Ranking one image against a million labels, beside encoding it."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from index_store.benchmarks.synthetic import SyntheticPairs
from models.encoder.encoder import Encoder, EncoderSpec
from service.labels.index import QUERY_COSINE, LabelIndex
from service.labels.scoring import Ranked, ScoreFunction, rank

TOP_K = 5
ASKED = 16  # images of each repeat
CHECKED = 64  # images whose ranking is compared with the exact one


def draw_queries(rows: np.ndarray, count: int) -> np.ndarray:
    """(count, D) float32 unit, each as far from some label as a photo is from its caption."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((count, rows.shape[1])).astype(np.float32)
    noise *= math.sqrt(1 / QUERY_COSINE**2 - 1) / np.linalg.norm(noise, axis=1, keepdims=True)
    asked = rows[rng.permutation(len(rows))[:count]] + noise
    return np.asarray(asked / np.linalg.norm(asked, axis=1, keepdims=True))


def seconds(work: Callable[[int], object]) -> float:
    """Of one call, the median over ASKED."""
    spent = []
    for turn in range(ASKED):
        begun = time.perf_counter()
        work(turn)
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent)


def measure(encoder: Encoder, rows: np.ndarray, repeats: int) -> dict[str, Any]:
    """Encoding, ranking by the index and ranking by all rows, in alternation."""
    # CLIP's own scale; random weights have another
    function, begun = ScoreFunction(100.0), time.perf_counter()
    index = LabelIndex.build(rows, function.scale)
    built = time.perf_counter() - begun
    asked, photo = draw_queries(rows, CHECKED), np.zeros((1, 3, *encoder.image_size), np.uint8)

    def find(vectors: np.ndarray) -> Ranked:
        return rank(vectors, rows, function, TOP_K) if index is None else index.rank(vectors, function, TOP_K)

    encoder.encode(photo, "image")
    rounds = [
        (
            seconds(lambda _: encoder.encode(photo, "image")),
            seconds(lambda turn: find(asked[turn : turn + 1])),
            seconds(lambda turn: rank(asked[turn : turn + 1], rows, function, TOP_K)),
        )
        for _ in range(repeats)
    ]
    exact, found = rank(asked, rows, function, TOP_K), find(asked)
    same = exact.labels == found.labels
    return {
        "build_s": round(built, 1),
        "lists": None if index is None else index.lists,
        "megabytes": round((rows.nbytes if index is None else index.nbytes) / 1e6),
        "encode_ms": [round(1000 * encode, 2) for encode, _, _ in rounds],
        "rank_ms": [round(1000 * ours, 2) for _, ours, _ in rounds],
        "rank_all_ms": [round(1000 * every, 2) for _, _, every in rounds],
        "whole_over_encode": [round((encode + ours) / encode, 4) for encode, ours, _ in rounds],
        "best_is_the_exact_one": round(float(same[:, 0].mean()), 4),
        "score_over_exact": _spread((found.scores[same] / exact.scores[same]).tolist()),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(float(np.percentile(values, q)), 4) for name, q in (("p5", 5), ("median", 50), ("p95", 95))}


def main() -> None:
    """Make the labels, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m service.benchmarks.labels", description="A million labels beside one image."
    )
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip model, with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    spec = EncoderSpec(arguments.model, "random", arguments.precision, arguments.device, "auto", max_batch=1)
    encoder = Encoder.load(spec)
    rows = SyntheticPairs(arguments.labels, encoder.dim).rows["text"].astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    print(json.dumps({"labels": arguments.labels, **measure(encoder, rows, arguments.repeats)}))


if __name__ == "__main__":
    main()
