"""What the parts measure: encoders with random weights, photos, captions, synthetic memories.

    python -m models.benchmarks.gpu.subjects STORE NAME VERSIONS... --model MODEL --pairs N

writes versions of a memory for the encoder of a service.
Alphabet: B batch, H W pixels, L tokens.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index_store.benchmarks.synthetic import SyntheticPairs
from index_store.build.build import build_version
from index_store.store import Store
from loadtests.gpu.part import Part
from loadtests.support.photos import crops
from models.encoder.encoder import Encoder, EncoderSpec
from models.fusion.checkpoint import training_free_fusions
from models.reco import Reco

CAPTIONS = ("a cat", "", "two dogs run along a beach at dawn, one of them has a very long tail", "word " * 60)
K = 10


def load_encoder(part: Part, **options: Any) -> Encoder:
    """The part's model; `options` are of EncoderSpec."""
    return Encoder.load(EncoderSpec(part.model, "random", **{"device": part.device, **options}))


def load_reco(part: Part, max_batch: int) -> Reco:
    """The method as `reco serve` runs it without a trained fusion, in the timed precision."""
    encoder = load_encoder(part, precision=part.precision, fixed_shapes="auto", max_batch=max_batch)
    file = training_free_fusions("mean", encoder.dim, k=K)
    return Reco(encoder, file.fusions, file.fusion_id, file.k)


def photos(encoder: Encoder, count: int) -> np.ndarray:
    """(count, 3, H, W) uint8, decoded from JPEGs."""
    return np.stack([encoder.read_image(data) for _, data in crops(count)])


def captions(encoder: Encoder, count: int) -> np.ndarray:
    """(count, L) int64, of short, empty and cut texts."""
    return encoder.tokenize([f"{CAPTIONS[i % len(CAPTIONS)]} {i or ''}" for i in range(count)])


def build_memory(
    store: Path, name: str, versions: Sequence[str], pairs: int, encoder: Encoder, index: str = "auto"
) -> None:
    """Write versions of different pairs where the memory is absent, and activate the first."""
    if (store / name / versions[-1]).exists():
        return
    for seed, version in enumerate(versions, 7):
        build_version(
            Store(store),
            name,
            version,
            SyntheticPairs(pairs, encoder.dim, seed).blocks(),
            encoder=encoder.fingerprint,
            kinds={"image": "vector", "text": "vector"},
            index=index,
        )
    Store(store).activate(name, versions[0])


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def call_seconds(call: Callable[[], object], device: str, seconds: float, least: int = 5) -> list[float]:
    """Seconds of each of as many calls as fit into a time, at least `least`, after a first one.

    Each call is waited for.
    """
    call()
    synchronize(device)
    found, end = list[float](), time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < end:
        begun = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - begun)
    return found


def rate(call: Callable[[], object], device: str, seconds: float, items: int) -> float:
    """Items per second of calls that are queued one behind the other and waited for at the end."""
    calls = max(3, round(seconds / min(call_seconds(call, device, seconds / 4, least=2))))
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return items * calls / (time.perf_counter() - begun)


def main() -> None:
    """Write a memory."""
    parser = argparse.ArgumentParser(description="Versions of synthetic pairs for a model with random weights.")
    parser.add_argument("store", type=Path)
    parser.add_argument("name")
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, required=True)
    args = parser.parse_args()
    encoder = Encoder.load(EncoderSpec(args.model, "random", device="cpu"))
    build_memory(args.store, args.name, args.versions, args.pairs, encoder)


if __name__ == "__main__":
    main()
