"""Threads that run one blocking function of a list: the guilty item of a failure is found, a call that never returns is given up.

Standard library alone, like `batcher`, whose hands these are.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from service.batching.executors import Threads

__all__ = ["WorkerLost", "Workers", "isolated"]

log = logging.getLogger("reco")
T = TypeVar("T")
R = TypeVar("R")


class WorkerLost(Exception):
    """The item's batch did not come back in time, and its thread was given up."""


class Workers(Generic[T, R]):
    """A pool of threads around `work`.

    work: one outcome per payload, in the payloads' order, raising nothing, as `isolated` makes it of a function that may.
    stall_s: how long a call may take; a thread cannot be ended from outside, so one that takes longer is left to itself and a new pool
    takes its place.  begin: called once in each thread.

    State, on the event loop: the pool in use, and whether nothing has come back since one was given up.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Sequence[R | Exception]],
        *,
        name: str,
        threads: int,
        stall_s: float,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self._work, self._name, self._stall_s = work, name, stall_s
        self._made = partial(Threads, threads, f"batcher-{name}", begin)
        self._pool = self._made()
        self.lost = False

    async def answers(self, payloads: list[T]) -> Sequence[R | Exception]:
        """One outcome per payload; only cancelling it raises."""
        try:
            doing = self._pool.run(self._work, payloads)
        except RuntimeError as error:  # the pool is closed
            return [error] * len(payloads)
        done, _ = await asyncio.wait({doing}, timeout=self._stall_s)
        if done:
            self.lost = False
            return doing.result()
        self.lost = True
        log.error(
            "%s did not answer within %g s and its thread was replaced; it hangs in:\n%s",
            self._name,
            self._stall_s,
            _stacks(f"batcher-{self._name}_"),
        )
        self.close()
        self._pool = self._made()
        return [WorkerLost(f"{self._name} did not answer within {self._stall_s:g} s and was replaced: retry")] * len(
            payloads
        )

    def close(self) -> None:
        """Begin nothing more; what runs is not waited for."""
        self._pool.close()


def _stacks(prefix: str) -> str:
    """The stacks of the living threads whose names begin with `prefix`."""
    frames = sys._current_frames()
    found = [thread for thread in threading.enumerate() if thread.name.startswith(prefix) and thread.ident in frames]
    return "".join("".join(traceback.format_stack(frames[thread.ident or 0])) for thread in found)


def isolated(run: Callable[[list[T]], Sequence[R]], payloads: list[T]) -> list[R | Exception]:
    """One outcome per payload: where the whole fails, each half is tried alone, until only the guilty items have the error.

    run: one result per payload; an Exception in a payload's place is that item's error.
    A guilty item among B costs about 2·log2(B) further runs; an error of every item, the device lost for example, costs 2·B - 2.
    """
    try:
        results = run(payloads)
        if len(results) == len(payloads):
            return list(results)
    except BaseException as error:  # noqa: BLE001  SystemExit and the like would end the event loop if they reached it
        if len(payloads) == 1:
            return [error if isinstance(error, Exception) else RuntimeError(f"the batch raised {error!r}")]
    else:
        return [RuntimeError(f"{len(results)} results came back for {len(payloads)} items") for _ in payloads]
    middle = len(payloads) // 2
    return [*isolated(run, payloads[:middle]), *isolated(run, payloads[middle:])]
