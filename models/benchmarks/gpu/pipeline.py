"""Encode, retrieve and fuse, from uint8 pixels in memory to vectors in memory, by batch size.

Alphabet: B batch, H W pixels.
"""

import statistics
import sys
from functools import partial
from typing import Any

import numpy as np
import torch

from index_store.snapshot import Snapshot
from index_store.store import Store
from loadtests.gpu.part import Part, run_part
from loadtests.support.report import quantiles
from models.benchmarks.gpu.subjects import build_memory, call_seconds, load_reco, photos, rate
from models.reco import EmbeddedBatch, Reco

BATCHES = (1, 8, 32, 128, 256)
SIZES = (100_000, 1_000_000)
LARGE_INDEX = "IVF1024,SQfp16"


def measure_batch(part: Part, reco: Reco, batch: np.ndarray, snapshot: Snapshot | None) -> dict[str, Any]:
    """Latency, images per second and the mean time of each stage, of one caller in a loop."""
    embedded: list[EmbeddedBatch] = []

    def call() -> None:
        embedded.append(reco.embed(batch, "image", snapshot))

    spent = call_seconds(call, part.device, part.choose(1.0, 0.05))
    stages = {
        stage: round(1000 * statistics.mean(getattr(each.timings, stage) for each in embedded[1:]), 3)
        for stage in ("encode", "retrieve", "fuse")
    }
    images = len(batch) / statistics.median(spent)
    return {"images_per_s": round(images, 1), "ms": quantiles(spent), "stages_ms": stages}


def measure_memory(part: Part, reco: Reco, pixels: np.ndarray, pairs: int, raw: float | None) -> dict[str, Any]:
    """All batch sizes against a memory of so many pairs, 0 = none."""
    snapshot, index = None, None
    if pairs:
        store = part.work / "store"
        # choosing the best recipe for a million pairs takes longer than this part may
        build_memory(store, f"p{pairs}", ["v1"], pairs, reco.encoder, "auto" if pairs <= SIZES[0] else LARGE_INDEX)
        snapshot = Store(store).open(f"p{pairs}", "v1", encoder=reco.encoder.fingerprint)
        index = snapshot.manifest.index["recipe"]
    found = {}
    for batch in part.choose(BATCHES, (1, 8)):
        found[batch] = measure_batch(part, reco, pixels[:batch], snapshot)
        print(pairs, batch, found[batch], flush=True)
    best = max(found, key=lambda batch: float(found[batch]["images_per_s"]))
    told = f"p50 {found[best]['ms']['p50']:.2f} ms, p99 {found[best]['ms']['p99']:.2f} ms, {found[best]['stages_ms']}"
    part.say(f"{pairs} pairs ({index}): {found[best]['images_per_s']:.0f} images/s at batch {best}, {told}")
    if raw and pairs == SIZES[-1]:
        part.aim("pipeline, 1 M pairs / raw forward", found[best]["images_per_s"] / raw, ">=", 0.9)
    return {"index": index, "batches": found}


@torch.inference_mode()
def measure_raw(part: Part, reco: Reco) -> float:
    """Images per second of open_clip's image tower at the better of two batch sizes."""
    clip, found = reco.encoder.module, []
    for batch in part.choose((256, 512), (4, 8)):
        pixels = torch.randn(batch, 3, *reco.encoder.image_size, device=part.device, dtype=clip.logit_scale.dtype)
        call = partial(clip.encode_image, pixels, normalize=True)
        found.append(rate(call, part.device, part.choose(1.0, 0.05), batch))
    return max(found)


def measure(part: Part) -> None:
    """Without a memory, then by size of the memory, the small one first."""
    batches = part.choose(BATCHES, (1, 8))
    reco = load_reco(part, max_batch=batches[-1])
    raw = part.attempt("raw_images_per_s", partial(measure_raw, part, reco))
    pixels = photos(reco.encoder, batches[-1])
    for pairs in (0, *part.choose(SIZES, (2000,))):
        part.attempt(f"{pairs} pairs", partial(measure_memory, part, reco, pixels, pairs, raw))


if __name__ == "__main__":
    sys.exit(run_part(measure))
