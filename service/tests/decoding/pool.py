"""A real pool of decoding processes for tests, and images for it."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from PIL import Image

from models.encoder.preprocess import Crop
from service.decoding.decoder import Decoder
from service.decoding.fork_server import ForkServer
from service.decoding.messages import DecodeJob
from service.observability.metrics import Metrics

SIDE = 8
CROP = Crop((SIDE, SIDE), "squash", "bicubic")
PATIENCE_S = 60.0
rng = np.random.default_rng(7)


class Pool:
    """Runs scenarios with a decoder of two processes, unless told otherwise."""

    def __init__(self, fork_server: ForkServer) -> None:
        self.fork_server = fork_server
        self.metrics = Metrics(version="0", torch="0", faiss="0")

    def run(self, work: Callable[[Decoder], Awaitable[Any]], workers: int = 2, **given: Any) -> Any:
        usual: dict[str, Any] = {"crop": CROP, "max_pixels": 64_000_000, "free_pixels": 1_000_000, "cpu_s": 30.0}
        job = DecodeJob(**usual | given)
        decoder = Decoder(
            job, workers=workers, pixels=job.max_pixels, metrics=self.metrics, fork_server=self.fork_server
        )

        async def scenario() -> Any:
            async with asyncio.timeout(PATIENCE_S):
                await decoder.start()
                try:
                    return await work(decoder)
                finally:
                    await decoder.close()

        return asyncio.run(scenario())

    def all(self, *images: bytes, **given: Any) -> list[np.ndarray | BaseException]:
        async def work(decoder: Decoder) -> list[np.ndarray | BaseException]:
            until = time.monotonic() + PATIENCE_S
            return await asyncio.gather(*(decoder.decode(each, until, 0) for each in images), return_exceptions=True)

        found: list[np.ndarray | BaseException] = self.run(work, **given)
        return found

    def replaced(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("reco_decoder_replaced_total", {"reason": reason}) or 0.0


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


# An AVIF whose header says 16x16 (ispe), and whose one frame has 8192x8192 pixels.
LYING_AVIF = zlib.decompress(
    base64.b85decode(
        "c-muNU{FXasVqn=%S>Yc0uY^>nP!-qnV9D5Xy^nKdYzkElE?r7iWw<6MNl?FL1uCZ0~+8f$SlbPvlxL`E;A=T8N_h`@fjhaj"
        "KT~I%<Mq6MrLMS8eFXukdw*;<t3IG7&_<Y<b&<X$}A`<0Mg!>1<Cn9S|qc$AQft#01OvoR%C(%m^nB&fD}(+nW1x|JP$}nI5"
        "|J3C@(pu0%$TX16u=7NIbJ37v?9R!&n%ZnpuE)`EyeeON1D>xaB|F|NsB3gCoO4!RRZi1poK;R?++a|35l^fPo?U{3*@jQ*2"
        "INE{NT~Z%Ri-_LhZro?l#{=EIiIVzXw~_pj61mt0-*rM1ugwD&^pFF{l0u5%Z$b}%xV_x5t}93KB7i#2y1))`Jel=6B?5?|1"
        "2^^dV1TFk`Hv8|04R~R*X)NtYrr={5dDfhdl"
    )
)


def slow_image() -> bytes:
    """A progressive JPEG of 60 scans and 49 megapixels: seconds of work in a few kilobytes."""
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000), "teal").save(file, "JPEG", progressive=True)
    once = file.getvalue()
    last = once.rfind(b"\xff\xda")
    return once[:-2] + once[last:-2] * 50 + once[-2:]
