"""Decoding of images: untrusted bytes to pixels, in a bounded pool of threads.

An image that cannot be decoded is refused here and never enters a batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from service.batching.batcher import DeadlinePassed
from service.errors import NotServing

__all__ = ["Decoder"]


class Decoder:
    """A bounded pool of threads that decode and preprocess.

    read: encoded image to (3, H, W) uint8, or an ImageError; called from several threads.
    workers: how many images are held as full pixels at a time, whatever the number of callers. An
    image whose caller leaves, or whose deadline comes, before its turn is skipped.
    """

    def __init__(self, read: Callable[[bytes], np.ndarray], *, workers: int) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._closed = False

    async def decode(self, data: bytes, deadline: float | None = None) -> np.ndarray:
        """Return the encoder's input of one encoded image: (3, H, W) uint8.

        deadline: a `time.monotonic()` instant; an image whose turn has not come by then is skipped.
        Raises ImageError (UnsupportedImage, ImageTooLarge by the header alone, BrokenImage),
        DeadlinePassed, NotServing after close.
        """
        if self._closed:
            raise NotServing("the service is shutting down and decodes no new image: retry elsewhere or later")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                return await loop.run_in_executor(self._pool, self._read, data)
        except TimeoutError as error:
            raise DeadlinePassed(
                "the image was not decoded before its deadline: allow more time, or send less"
            ) from error

    def close(self) -> None:
        """Take no more images; those that were submitted are still decoded."""
        self._closed = True
        self._pool.shutdown(wait=False)
