"""Decoder over real encoded images, with a frame that is as small as it gets."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from models.encoder.image_io import read_image
from models.errors import BrokenImage, ImageError, ImageTooLarge, UnsupportedImage
from service.batching.batcher import DeadlinePassed
from service.errors import NotServing
from service.pipeline.decode import Decoder

SIDE = 8
rng = np.random.default_rng(7)


def shrink(data: bytes) -> np.ndarray:
    return np.asarray(read_image(data, max_pixels=1_000_000).resize((SIDE, SIDE))).transpose(2, 0, 1)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG of a few bytes that claims to be large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b""))
        + png_chunk(b"IEND", b"")
    )


def decode_all(*images: bytes, workers: int = 2) -> list[np.ndarray | BaseException]:
    async def scenario() -> list[np.ndarray | BaseException]:
        decoder = Decoder(shrink, workers=workers)
        try:
            return await asyncio.gather(*(decoder.decode(image) for image in images), return_exceptions=True)
        finally:
            decoder.close()

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "RGB"), ("WEBP", "RGB")]
)
def test_every_image_becomes_rgb_pixels(kind: str, mode: str) -> None:
    (pixels,) = decode_all(encoded(kind, mode))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (3, SIDE, SIDE)
    assert pixels.dtype == np.uint8


def test_one_pixel_is_a_valid_image() -> None:
    (pixels,) = decode_all(encoded("PNG", size=(1, 1)))
    assert isinstance(pixels, np.ndarray)
    assert (pixels == pixels[:, :1, :1]).all()


def test_a_bad_image_fails_alone_and_the_others_keep_their_places() -> None:
    good = [encoded("PNG", size=(20 + i, 20)) for i in range(6)]
    bad: list[tuple[bytes, type[ImageError]]] = [
        (b"this is no image", UnsupportedImage),
        (b"", ImageError),
        (encoded("JPEG", size=(200, 200))[:900], BrokenImage),
        (png_claiming(20_000, 20_000), ImageTooLarge),
    ]
    outcomes = decode_all(*good[:3], *(data for data, _ in bad), *good[3:])
    for (_, kind), outcome in zip(bad, outcomes[3:7], strict=True):
        assert isinstance(outcome, kind)
    for data, outcome in zip(good, outcomes[:3] + outcomes[7:], strict=True):
        np.testing.assert_array_equal(outcome, shrink(data))


def test_at_most_workers_images_are_decoded_at_a_time_and_callers_who_left_are_skipped() -> None:
    gate, lock, inside, most, seen = threading.Event(), threading.Lock(), 0, 0, 0

    def slow(data: bytes) -> np.ndarray:
        nonlocal inside, most, seen
        with lock:
            inside, seen = inside + 1, seen + 1
            most = max(most, inside)
        assert gate.wait(20)
        with lock:
            inside -= 1
        return shrink(data)

    async def scenario() -> None:
        decoder = Decoder(slow, workers=3)
        callers = [asyncio.create_task(decoder.decode(encoded("PNG"))) for _ in range(10)]
        while seen < 3:  # noqa: ASYNC110  set by the decoding threads
            await asyncio.sleep(0.001)
        callers[-1].cancel()
        await asyncio.sleep(0.01)
        gate.set()
        assert len(await asyncio.gather(*callers[:-1])) == 9
        decoder.close()

    asyncio.run(scenario())
    assert most == 3
    assert seen == 9


def test_an_image_whose_deadline_comes_before_its_turn_is_never_decoded() -> None:
    gate, seen = threading.Event(), list[bytes]()

    def slow(data: bytes) -> np.ndarray:
        seen.append(data)
        assert gate.wait(20)
        return shrink(data)

    async def scenario() -> None:
        decoder, image, late = Decoder(slow, workers=1), encoded("PNG"), encoded("PNG")
        first = asyncio.create_task(decoder.decode(image, time.monotonic() + 20))
        while not seen:  # noqa: ASYNC110  set by the decoding thread
            await asyncio.sleep(0.001)
        for deadline in (time.monotonic() + 0.02, time.monotonic() - 1):
            with pytest.raises(DeadlinePassed):
                await decoder.decode(late, deadline)
        gate.set()
        assert (await first).shape == (3, SIDE, SIDE)
        decoder.close()
        assert seen == [image]

    asyncio.run(scenario())


def test_a_closed_decoder_refuses() -> None:
    async def scenario() -> None:
        decoder = Decoder(shrink, workers=1)
        admitted = asyncio.create_task(decoder.decode(encoded("PNG")))
        await asyncio.sleep(0)
        decoder.close()
        decoder.close()
        with pytest.raises(NotServing, match="shutting down"):
            await decoder.decode(encoded("PNG"))
        assert (await admitted).shape == (3, SIDE, SIDE)

    asyncio.run(scenario())
