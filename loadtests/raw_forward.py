"""The bare model as a yardstick: open_clip's image tower on ready pixels, in one process that computes only when told.

    python -m loadtests.raw_forward --model ViT-B-32 --threads 2

One line `BATCH SECONDS` on stdin, one JSON line `{"batch", "images", "seconds", "cpu_seconds"}` on stdout; between two lines it sleeps,
so that a service can be measured in turn on the same cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time


def main() -> int:
    """Load once, then answer lines until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.raw_forward", description="Images per second of the bare image tower.")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import open_clip
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = open_clip.create_model(arguments.model, pretrained=None).eval()
    side = model.visual.image_size[0]
    print(json.dumps({"ready": arguments.model}), flush=True)
    for line in sys.stdin:
        batch, seconds = int(line.split()[0]), float(line.split()[1])
        pixels = torch.randn(batch, 3, side, side)
        with torch.inference_mode():
            model.encode_image(pixels, normalize=True)  # the first one allocates
            images, start, cpu = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - start < seconds:
                model.encode_image(pixels, normalize=True)
                images += batch
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps({"batch": batch, "images": images, **spent}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
