"""The bare model: open_clip in a process of its own that computes only on request.

    python -m loadtests.compare.bare_model --model ViT-B-32 --threads 2 [--device D --precision P]

One JSON object per line on stdin, one on stdout; between two lines it sleeps, so that a service can
be measured in turn on the same cores. `BareModel` speaks to it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from loadtests.support.report import ROOT

__all__ = ["BareModel"]


class BareModel:
    """The process, started and ready; ended with the `with` block.  ready_s: from its start until
    the model was loaded.
    """

    def __init__(self, model: str, threads: int, device: str = "cpu", precision: str = "fp32") -> None:
        command = [sys.executable, "-m", "loadtests.compare.bare_model", "--model", model, "--threads", str(threads)]
        command += ["--device", device, "--precision", precision]
        begun = time.perf_counter()
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()
        self.ready_s = time.perf_counter() - begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def images(self, batch: int, seconds: float) -> dict[str, float]:
        """The image tower on ready pixels: images per second, and milliseconds of processor time
        per image.
        """
        found = self._ask(images=batch, seconds=seconds)
        return {
            "images_per_s": found["images"] / found["seconds"],
            "cpu_ms_per_image": round(1000 * found["cpu_seconds"] / found["images"], 2),
        }

    def photo(self, jpeg: bytes) -> float:
        """Seconds for one photo: open_clip's preprocessing of the bytes, then the image tower in a
        batch of one.
        """
        return float(self._ask(photo=base64.b64encode(jpeg).decode())["seconds"])

    def decoding(self, photos: Sequence[bytes], workers: int, seconds: float) -> float:
        """Maximum photos per second of open_clip's preprocessing with `workers` threads."""
        found = self._ask(
            decoding=[base64.b64encode(photo).decode() for photo in photos], workers=workers, seconds=seconds
        )
        return float(found["photos"] / found["seconds"])

    def texts(self, texts: Sequence[str]) -> tuple[float, np.ndarray]:
        """Seconds for open_clip's tokenizer and text tower at the full context length, and the unit
        vectors, (n, D) float32.
        """
        found = self._ask(texts=list(texts))
        return float(found["seconds"]), np.asarray(found["vectors"], np.float32)

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("loadtests.compare.bare_model ended: its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Model:
    """What runs in the process."""

    def __init__(self, name: str, threads: int, device: str, precision: str) -> None:
        import open_clip
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._clip, _, self._preprocess = open_clip.create_model_and_transforms(name, pretrained=None)
        self._device, self._dtype = (
            device,
            {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
        )
        self._clip.eval().to(device=device, dtype=self._dtype)
        self._tokenize = open_clip.get_tokenizer(name)

    def images(self, images: int, seconds: float) -> dict[str, Any]:
        """As many batches of so many images as fit into the time."""
        side = self._clip.visual.image_size[0]
        pixels = self._torch.randn(images, 3, side, side, device=self._device, dtype=self._dtype)
        self._vectors(pixels)  # the first one allocates
        done, begun, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begun < seconds:
            self._vectors(pixels)
            done += images
        return {"images": done, "seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}

    def photo(self, photo: str) -> dict[str, Any]:
        """One photo in base64, from bytes to a vector."""
        from PIL import Image

        jpeg, begun = base64.b64decode(photo), time.perf_counter()
        pixels = self._preprocess(Image.open(io.BytesIO(jpeg)))
        self._vectors(pixels[None].to(self._device, self._dtype))
        return {"seconds": time.perf_counter() - begun}

    def decoding(self, decoding: list[str], workers: int, seconds: float) -> dict[str, Any]:
        """Rounds over all photos until the time is up."""
        from PIL import Image

        photos, done = [base64.b64decode(photo) for photo in decoding], 0
        with ThreadPoolExecutor(workers) as pool:
            begun = time.perf_counter()
            while time.perf_counter() - begun < seconds:
                done += len(list(pool.map(lambda photo: self._preprocess(Image.open(io.BytesIO(photo))).shape, photos)))
        return {"photos": done, "seconds": time.perf_counter() - begun}

    def texts(self, texts: list[str]) -> dict[str, Any]:
        """All texts in one batch, each padded to the context length."""
        begun = time.perf_counter()
        vectors = self._clip.encode_text(self._tokenize(texts).to(self._device), normalize=True).float().cpu()
        return {"seconds": time.perf_counter() - begun, "vectors": vectors.tolist()}

    def _vectors(self, pixels: Any) -> Any:
        """Vectors of (B, 3, H, W), copied to the CPU, which waits for the device."""
        return self._clip.encode_image(pixels, normalize=True).cpu()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Call the method named by the first key."""
        method: str = next(iter(question))
        found: dict[str, Any] = getattr(self, method)(**question)
        return found


def main() -> int:
    """Load once, then answer lines until stdin ends."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.compare.bare_model", description="The bare model, measured on demand."
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    arguments = parser.parse_args()
    model = _Model(arguments.model, arguments.threads, arguments.device, arguments.precision)
    print(json.dumps({"ready": arguments.model}), flush=True)
    for line in sys.stdin:
        print(json.dumps(model.answer(json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
