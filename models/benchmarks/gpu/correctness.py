"""Whether the device computes what the CPU does: precisions, graphs, batch sizes, threads, tests.

Alphabet: B batch, D width.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch.nn.functional import normalize

from index_store.types import SIDES, Side
from loadtests.gpu.part import Part, run_part
from loadtests.support.report import ROOT
from models.benchmarks.gpu.subjects import captions, load_encoder, photos
from models.encoder.encoder import Encoder
from models.encoder.image_tower import normalize_pixels

FLOORS = {"fp32": 0.99999, "bf16": 0.999, "fp16": 0.999}
TESTS_S = 60.0


def min_cosine(vectors: np.ndarray, expected: np.ndarray) -> float:
    """The least cosine of rows (B, D) of unit length."""
    return float((vectors.astype(np.float64) * expected).sum(1).min())


@torch.inference_mode()
def encode_with_open_clip(encoder: Encoder, batch: np.ndarray, side: Side) -> np.ndarray:
    """(B, D) float32 unit, by open_clip's own methods, on the encoder's device in its precision."""
    model, inputs = encoder.module, torch.from_numpy(batch).to(encoder.device)
    if side == "text":
        vectors = model.encode_text(inputs)
    else:
        vectors = model.encode_image(normalize_pixels(inputs, model.visual.preprocess_cfg).to(model.logit_scale.dtype))
    unit: np.ndarray = normalize(vectors.float(), dim=-1).cpu().numpy()
    return unit


def encode_at_once(encoder: Encoder, inputs: dict[Side, np.ndarray], sides: Sequence[Side], turns: int) -> float:
    """Encode in as many threads as sides are named, so many times each; the least cosine with the
    vectors of a thread that is alone.
    """
    alone = {side: encoder.encode(inputs[side], side).vectors for side in SIDES}
    start = threading.Barrier(len(sides))

    def work(side: Side) -> float:
        start.wait()
        return min(min_cosine(encoder.encode(inputs[side], side).vectors, alone[side]) for _ in range(turns))

    with ThreadPoolExecutor(len(sides)) as pool:
        return min(pool.map(work, sides))


def check_precision(
    part: Part, precision: str, inputs: dict[Side, np.ndarray], expected: dict[Side, np.ndarray]
) -> dict[str, float]:
    """Least cosines of recorded graphs with each other way to compute the same vectors."""
    count = len(inputs["image"])
    graphs, eager = (
        load_encoder(part, precision=precision, fixed_shapes=shapes, max_batch=count) for shapes in ("on", "off")
    )
    found: dict[str, float] = {}
    for side in SIDES:
        batch, ours = inputs[side], graphs.encode(inputs[side], side).vectors
        found[f"{side}: fp32 on the CPU"] = min_cosine(ours, expected[side])
        found[f"{side}: without graphs"] = min_cosine(ours, eager.encode(batch, side).vectors)
        found[f"{side}: open_clip on the device"] = min_cosine(ours, encode_with_open_clip(eager, batch, side))
        found[f"{side}: any batch size"] = min(
            min_cosine(graphs.encode(batch[:size], side).vectors, ours[:size]) for size in range(1, count + 1)
        )
    turns = part.choose(20, 3)
    found["two threads"] = encode_at_once(graphs, inputs, ("image", "image"), turns)
    found["texts beside images"] = encode_at_once(graphs, inputs, ("image", "text"), turns)
    least = min(found, key=lambda name: found[name])
    part.aim(f"least cosine, {precision}", found[least], ">=", FLOORS[precision])
    part.say(f"{precision}: least cosine {found[least]:.7f} ({least})")
    return found


def run_marked_tests(part: Part) -> dict[str, Any]:
    """The tests that need a GPU: how many passed, and the names of the others with the reason."""
    results = part.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={results}"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, "models/tests/encoder"], cwd=ROOT, env=environ, timeout=TESTS_S, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {done.returncode}: see the log")
    cases = ElementTree.parse(results).findall(".//testcase")  # noqa: S314  of a file that our own tests wrote
    outcomes = {
        kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")
    }
    named = {
        kind: {f"{case.get('classname')}.{case.get('name')}": str(case[0].get("message"))[:300] for case in of}
        for kind, of in outcomes.items()
    }
    passed = len(cases) - sum(map(len, outcomes.values()))
    part.say(f"tests marked cuda: {passed} passed, " + ", ".join(f"{len(of)} {kind}" for kind, of in outcomes.items()))
    for kind in ("failure", "error"):
        part.failures += [f"{name}: {reason}" for name, reason in named[kind].items()]
    return {"passed": passed, **named}


def measure(part: Part) -> None:
    """Compare in each precision, then run the tests."""
    reference = load_encoder(part, device="cpu")
    count = part.choose(33, 5)
    inputs: dict[Side, np.ndarray] = {"image": photos(reference, count), "text": captions(reference, count)}
    expected = {side: reference.encode(inputs[side], side).vectors for side in SIDES}
    for precision in FLOORS:
        part.attempt(precision, partial(check_precision, part, precision, inputs, expected))
    part.attempt("tests", partial(run_marked_tests, part))


if __name__ == "__main__":
    sys.exit(run_part(measure))
