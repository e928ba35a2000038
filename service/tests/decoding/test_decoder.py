"""The pool of decoding processes: real images, real processes, a frame that is as small as it
gets.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.encoder.image_io import read_image
from models.errors import BrokenImage, CostlyImage, ImageError, ImageTooLarge, UnsupportedImage
from service.batching.batcher import DeadlinePassed
from service.batching.workers import WorkerLost
from service.decoding.decoder import Decoder
from service.errors import NotServing
from service.tests.decoding.pool import CROP, LYING_AVIF, SIDE, Pool, encoded


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int, body: bytes = b"") -> bytes:
    """A well-formed PNG of a few bytes that claims to be large."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(body)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("AVIF", "RGB"), ("TIFF", "L")],
)
def test_every_image_gets_the_pixels_that_this_process_would_read(pool: Pool, kind: str, mode: str) -> None:
    data = encoded(kind, mode)
    (pixels,) = pool.all(data, workers=1)
    np.testing.assert_array_equal(pixels, CROP.pixels(read_image(data)))


def test_a_bad_image_fails_alone_and_the_others_keep_their_places(pool: Pool) -> None:
    good = [encoded("PNG", size=(20 + i, 20)) for i in range(6)]
    bad: list[tuple[bytes, type[ImageError]]] = [
        (b"this is no image", UnsupportedImage),
        (b"", ImageError),
        (encoded("JPEG", size=(200, 200))[:900], BrokenImage),
        (png_claiming(20_000, 20_000), ImageTooLarge),
    ]
    outcomes = pool.all(*good[:3], *(data for data, _ in bad), *good[3:])
    for (_, kind), outcome in zip(bad, outcomes[3:7], strict=True):
        assert isinstance(outcome, kind)
    for data, outcome in zip(good, outcomes[:3] + outcomes[7:], strict=True):
        np.testing.assert_array_equal(outcome, CROP.pixels(read_image(data)))


def test_the_deadline_is_kept_during_decoding_and_the_next_image_decoded(pool: Pool, slow: bytes) -> None:
    async def work(decoder: Decoder) -> None:
        begun = time.monotonic()
        late = [asyncio.create_task(decoder.decode(slow, begun + 0.5, i)) for i in range(3)]
        outcomes = await asyncio.gather(*late, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DeadlinePassed] * 3
        pixels = await decoder.decode(encoded("PNG"), begun + 30, 9)
        assert pixels.shape == (3, SIDE, SIDE)
        assert time.monotonic() - begun < 10
        while pool.replaced("unwanted") < 1:  # noqa: ASYNC110  counted once the process has ended
            await asyncio.sleep(0.01)

    pool.run(work)


def test_an_image_whose_caller_left_is_decoded_no_further(pool: Pool, slow: bytes) -> None:
    async def work(decoder: Decoder) -> None:
        caller = asyncio.create_task(decoder.decode(slow, time.monotonic() + 60, 0))
        await asyncio.sleep(0.3)
        caller.cancel()
        while pool.replaced("unwanted") < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    pool.run(work, workers=1)


def test_an_image_over_its_cpu_time_is_refused_as_costly(pool: Pool, slow: bytes) -> None:
    small = encoded("JPEG")
    outcome, after = pool.all(slow, small, workers=1, cpu_s=0.3)
    assert isinstance(outcome, CostlyImage)
    assert "more than 0.3 s of CPU" in str(outcome)
    assert isinstance(after, np.ndarray)
    assert pool.replaced("SIGPROF") == 1


def test_an_image_over_its_memory_is_refused_and_the_process_lives(pool: Pool) -> None:
    async def work(decoder: Decoder) -> None:
        (worker,) = decoder._workers
        with pytest.raises(ImageError):
            await decoder.decode(LYING_AVIF, time.monotonic() + 30, 0)
        assert peak_bytes(worker.pid) < 140 * 2**20
        assert (await decoder.decode(encoded("PNG"), time.monotonic() + 30, 0)).shape == (3, SIDE, SIDE)
        assert {worker} == decoder._workers

    pool.run(work, workers=1)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGBA", {"lossless": True, "method": 0}),
        ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
        ("HEIF", "RGB", {"quality": 10}),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
    ],
)
def test_a_large_image_of_every_format_keeps_to_its_memory(
    pool: Pool, kind: str, mode: str, options: dict[str, Any]
) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side: turning it takes a copy
    if kind in ("JPEG", "PNG", "WEBP"):
        options = options | {"exif": exif}
    Image.new(mode, (3000, 2900), 100 if mode in ("P", "I;16") else "teal").save(file, kind, **options)
    for free in (1_000, 10_000_000):
        (pixels,) = pool.all(file.getvalue(), workers=1, free_pixels=free)
        assert isinstance(pixels, np.ndarray), pixels


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def test_a_killed_process_costs_its_own_image_alone(pool: Pool, slow: bytes) -> None:
    async def work(decoder: Decoder) -> None:
        lost = asyncio.create_task(decoder.decode(slow, time.monotonic() + 60, 0))
        await asyncio.sleep(0.3)
        (busy,) = decoder._workers - set(decoder._idle)
        os.kill(busy.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="SIGKILL"):
            await lost
        idle = list(decoder._idle)  # one that is idle costs nothing
        for worker in idle:
            os.kill(worker.pid, signal.SIGKILL)
        while any(worker.alive for worker in idle):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        images = [decoder.decode(encoded("PNG"), time.monotonic() + 30, i) for i in range(6)]
        assert all(pixels.shape == (3, SIDE, SIDE) for pixels in await asyncio.gather(*images))

    pool.run(work)


def test_a_process_that_crashes_is_the_fault_of_its_image(pool: Pool, slow: bytes) -> None:
    async def work(decoder: Decoder) -> None:
        lost = asyncio.create_task(decoder.decode(slow, time.monotonic() + 60, 0))
        await asyncio.sleep(0.3)
        (worker,) = decoder._workers
        os.kill(worker.pid, signal.SIGSEGV)
        with pytest.raises(BrokenImage, match="ended its decoder \\(SIGSEGV\\)"):
            await lost

    pool.run(work, workers=1)


def test_the_fork_server_is_started_again_where_it_was_killed(pool: Pool) -> None:
    async def work(decoder: Decoder) -> None:
        assert pool.fork_server._process is not None
        os.kill(pool.fork_server._process.pid, signal.SIGKILL)
        while any(worker.alive for worker in decoder._workers):  # noqa: ASYNC110  they end with it
            await asyncio.sleep(0.01)
        assert (await decoder.decode(encoded("PNG"), time.monotonic() + 30, 0)).shape == (3, SIDE, SIDE)

    pool.run(work)


def test_signals_of_the_group_do_not_end_the_processes(pool: Pool) -> None:
    async def work(decoder: Decoder) -> None:
        workers = set(decoder._workers)
        assert pool.fork_server._process is not None
        for pid in [pool.fork_server._process.pid, *(worker.pid for worker in workers)]:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, number)
        images = [decoder.decode(encoded("PNG"), time.monotonic() + 30, 0) for _ in workers]  # one in each process
        assert all(pixels.shape == (3, SIDE, SIDE) for pixels in await asyncio.gather(*images))
        assert decoder._workers == workers
        assert not decoder._recovering

    pool.run(work)


@pytest.mark.parametrize("fault", ["memfd_create", "posix_fallocate"])
def test_without_shared_memory_the_pixels_are_sent(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def exhausted(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fault, exhausted)
    data = encoded("PNG")
    for pixels in pool.all(data, data, data):
        np.testing.assert_array_equal(pixels, CROP.pixels(read_image(data)))
    assert "No space left on device" in caplog.text


def test_large_images_wait_for_each_other_and_small_ones_pass(pool: Pool, slow: bytes) -> None:
    """Two processes, and large images for both: one process stays free for small images."""

    async def work(decoder: Decoder) -> None:
        until = time.monotonic() + 40
        large = [asyncio.create_task(decoder.decode(slow, until, i)) for i in range(4)]
        await asyncio.sleep(0.3)
        for i in range(5):
            assert (await decoder.decode(encoded("PNG"), until, ("small", i))).shape == (3, SIDE, SIDE)
        assert not any(task.done() for task in large)
        decoder.refresh_gauges()
        assert pool.metrics.registry.get_sample_value("reco_decoder_pixels") == 7000 * 7000
        for task in large:
            task.cancel()
        await asyncio.gather(*large, return_exceptions=True)
        assert decoder._budget.held == 0

    pool.run(work)


def test_requests_take_turns(pool: Pool) -> None:
    """One image of a small request waits for one image of a large one, not for all of them."""
    image, order = encoded("JPEG", size=(900, 900)), list[str]()

    async def work(decoder: Decoder) -> None:
        async def decode(caller: str) -> None:
            await decoder.decode(image, time.monotonic() + 30, caller)
            order.append(caller)

        await asyncio.gather(*(decode("large") for _ in range(12)), decode("small"))

    pool.run(work, workers=1)
    assert order.index("small") <= 2


def test_an_image_whose_deadline_comes_before_its_turn_is_never_decoded(pool: Pool, slow: bytes) -> None:
    async def work(decoder: Decoder) -> None:
        first = asyncio.create_task(decoder.decode(slow, time.monotonic() + 60, 0))
        await asyncio.sleep(0.1)
        for deadline in (time.monotonic() + 0.02, time.monotonic() - 1):
            with pytest.raises(DeadlinePassed):
                await decoder.decode(encoded("PNG"), deadline, 1)
        assert decoder._turns.depth == 0
        first.cancel()

    pool.run(work, workers=1)


def test_a_closed_decoder_refuses_and_its_processes_end(pool: Pool) -> None:
    async def work(decoder: Decoder) -> list[int]:
        pids = [worker.pid for worker in decoder._workers]
        await decoder.close()
        with pytest.raises(NotServing, match="shutting down"):
            await decoder.decode(encoded("PNG"), time.monotonic() + 30, 0)
        return pids

    for pid in pool.run(work):
        assert not Path(f"/proc/{pid}").exists()


def test_images_inside_are_refused_when_the_decoder_is_closed(pool: Pool, slow: bytes) -> None:
    """One is being decoded, one waits for its pixels, the others for their turn."""

    async def work(decoder: Decoder) -> None:
        until = time.monotonic() + 50
        inside = [asyncio.create_task(decoder.decode(slow, until, i)) for i in range(2)]
        await asyncio.sleep(0.3)
        inside += [asyncio.create_task(decoder.decode(slow, until, 2)) for _ in range(3)]
        await asyncio.sleep(0)
        assert decoder._turns.depth == 3
        await decoder.close()
        outcomes = await asyncio.gather(*inside, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [NotServing] * 5
        assert not decoder._recovering

    pool.run(work, workers=1)


def test_an_image_whose_process_is_being_replaced_is_refused_when_the_decoder_is_closed(
    pool: Pool, slow: bytes
) -> None:
    async def work(decoder: Decoder) -> None:
        lost = asyncio.create_task(decoder.decode(slow, time.monotonic() + 50, 0))
        await asyncio.sleep(0.3)
        (worker,) = decoder._workers
        os.kill(worker.pid, signal.SIGKILL)
        while not decoder._recovering:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await decoder.close()
        with pytest.raises(NotServing):
            await lost

    pool.run(work, workers=1)


def test_faults_in_an_image_print_nothing(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    whole = encoded("TIFF", size=(200, 200), compression="tiff_adobe_deflate")
    dirty = bytearray(whole)
    dirty[100:4000:50] = b"\xff" * len(dirty[100:4000:50])
    (outcome,) = pool.all(bytes(dirty), workers=1)
    assert isinstance(outcome, BrokenImage)
    assert capfd.readouterr().err == ""
