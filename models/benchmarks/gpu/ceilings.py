"""What the machine allows at most: raw forwards, copies, matrix products, decoding.

Alphabet: B batch, H W pixels.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from loadtests.gpu.part import Part, run_part
from loadtests.support.photos import crops
from models.benchmarks.gpu.subjects import rate
from models.encoder.encoder import Encoder, EncoderSpec
from models.encoder.image_io import read_image
from models.encoder.preprocess import Crop

CROP = Crop((224, 224), "shortest", "bicubic")
MODELS = ("ViT-B-32", "ViT-L-14")


def decode_for(photos: list[bytes], seconds: float) -> float:
    """Photos per second that this process decodes and resizes."""
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        CROP.pixels(read_image(photos[done % len(photos)], target_size=CROP.size))
        done += 1
    return done / (time.perf_counter() - begun)


def measure_decoding(part: Part) -> dict[str, float]:
    """348x348 JPEGs per second of one process, and of one process per core."""
    photos, seconds = [data for _, data in crops(part.choose(32, 4))], part.choose(2.0, 0.2)
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork")) as pool:
        one = pool.submit(decode_for, photos, seconds).result()
        every = sum(pool.map(partial(decode_for, photos), [seconds] * cores))
    part.say(f"decoding 348x348 JPEGs: {one:.0f}/s on one core, {every:.0f}/s on {cores}")
    return {"one_core": one, "all_cores": every, "cores": cores}


def measure_forward(part: Part, model: str) -> dict[str, Any]:
    """Images per second of open_clip's image tower on pixels that are on the device, by batch."""
    encoder = Encoder.load(EncoderSpec(model, "random", device=part.device, precision=part.precision))
    clip, found = encoder.module, dict[int, float]()
    with torch.inference_mode():
        for batch in part.choose(tuple(2**power for power in range(11)), (1, 8)):
            pixels = torch.randn(batch, 3, *encoder.image_size, device=part.device, dtype=clip.logit_scale.dtype)
            call = partial(clip.encode_image, pixels, normalize=True)
            found[batch] = round(rate(call, part.device, part.choose(0.6, 0.05), batch), 1)
            print(model, batch, found[batch], flush=True)
    best = max(found, key=lambda batch: found[batch])
    part.say(f"raw forward, {part.precision}: {found[best]:.0f} images/s at batch {best}, {found[1]:.0f} at 1")
    return {"images_per_s": found, "best_batch": best}


def measure_copies(part: Part) -> dict[str, float]:
    """GB per second of a copy on the device, read and written counted, and from the host."""
    size = part.choose(2**30, 2**22)
    source, target = (torch.empty(size, dtype=torch.uint8, device=part.device) for _ in range(2))
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=part.device == "cuda")
    seconds = part.choose(0.5, 0.05)
    found = {
        "on_the_device": rate(partial(target.copy_, source), part.device, seconds, 2 * size) / 1e9,
        "to_the_device": rate(
            partial(target[: len(host)].copy_, host, non_blocking=True), part.device, seconds, len(host)
        )
        / 1e9,
    }
    part.say(", ".join(f"copy {where.replace('_', ' ')} {speed:.1f} GB/s" for where, speed in found.items()))
    return found


def measure_products(part: Part) -> dict[str, float]:
    """TFLOP/s of a square matrix product by number format, on random values."""
    side, found = part.choose(8192, 256), dict[str, float]()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        one, another = (torch.randn(side, side, device=part.device).to(dtype) for _ in range(2))
        product = partial(torch.mm, one, another)
        found[str(dtype)] = rate(product, part.device, part.choose(0.3, 0.02), 2 * side**3) / 1e12
    part.say(", ".join(f"{dtype.removeprefix('torch.')} {speed:.3g} TFLOP/s" for dtype, speed in found.items()))
    return found


def measure(part: Part) -> None:
    """Decode first: its processes are forked before the device is in use."""
    part.attempt("decoding", partial(measure_decoding, part))
    part.attempt("copies_gb_per_s", partial(measure_copies, part))
    part.attempt("products_tflop_per_s", partial(measure_products, part))
    for model in MODELS if not part.quick else (part.model,):
        part.attempt(f"forward {model if not part.quick else 'tiny'}", partial(measure_forward, part, model))


if __name__ == "__main__":
    sys.exit(run_part(measure))
