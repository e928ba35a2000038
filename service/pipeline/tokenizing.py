"""Tokenizing of texts: in a small pool of threads, in steps, so that requests take turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from service.batching.batcher import DeadlinePassed
from service.batching.shared_threads import SharedThreads

__all__ = ["Tokenizing"]

THREADS = 2
STEP_TEXTS = 64
STEP_CHARACTERS = 8192  # of texts in rare scripts, which take 10 µs a character to clean


class Tokenizing:
    """Tokenizes texts in a small pool of threads, in steps.

    tokenize: texts to (B, L) int64, blocking, called from several threads.
    A request whose deadline comes, or whose caller leaves, stops after its current step.
    """

    def __init__(self, tokenize: Callable[[Sequence[str]], np.ndarray]) -> None:
        self._tokenize, self._threads = tokenize, SharedThreads(THREADS, "tokenize")

    async def tokenize(self, texts: Sequence[str], deadline: float) -> np.ndarray:
        """(B, L) int64. deadline: a `time.monotonic()` instant.

        Raises DeadlinePassed, ThreadsClosed once closed.
        """
        request, steps = object(), list[np.ndarray]()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                for some in _split_into_steps(texts):
                    steps.append(await self._threads.run(request, self._tokenize, some))
        except TimeoutError as error:
            done = sum(len(step) for step in steps)
            raise DeadlinePassed(
                f"{done} of {len(texts)} texts were tokenized before the deadline: allow more time, or send less"
            ) from error
        return steps[0] if len(steps) == 1 else np.concatenate(steps)

    def close(self) -> None:
        """Start no more steps; a request in the middle of its steps gets ThreadsClosed."""
        self._threads.close()


def _split_into_steps(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in parts of at most STEP_TEXTS and about STEP_CHARACTERS."""
    step: list[str] = []
    characters = 0
    for text in texts:
        if step and (len(step) == STEP_TEXTS or characters + len(text) > STEP_CHARACTERS):
            yield step
            step, characters = [], 0
        step.append(text)
        characters += len(text)
    yield step
