"""Worker threads of a batcher: run one blocking function on batches, isolate the items that fail,
replace a thread whose call never returns. Standard library alone.
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

from service.batching.executors import IdleThreads

__all__ = ["WorkerLost", "WorkerThread", "run_isolated"]

log = logging.getLogger("reco")
T = TypeVar("T")
R = TypeVar("R")


class WorkerLost(Exception):
    """The batch of the item did not come back within `stall_s`, and its thread was given up."""


class WorkerThread(Generic[T, R]):
    """One thread that runs `work`, replaced where a call does not return.

    work: returns one outcome per payload, in order, and raises nothing; `run_isolated` makes such a
    function of one that may raise.  stall_s: seconds that one call may take. A thread cannot be
    ended from outside, so a call that takes longer is left running and a new thread takes over.
    initialize: called once in each thread.

    State, changed on the event loop only: the pool in use, and `lost`: a thread was given up and
    its replacement has not finished a call yet.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Sequence[R | Exception]],
        *,
        name: str,
        stall_s: float,
        initialize: Callable[[], None] | None = None,
    ) -> None:
        self._work, self._name, self._stall_s = work, name, stall_s
        self._new_pool = partial(IdleThreads, 1, f"batcher-{name}", initialize)
        self._pool = self._new_pool()
        self.lost = False

    async def run(self, payloads: list[T]) -> Sequence[R | Exception]:
        """Return one outcome per payload. Raises only CancelledError."""
        try:
            call = self._pool.run(self._work, payloads)
        except RuntimeError as error:  # the pool is closed
            return [error] * len(payloads)
        done, _ = await asyncio.wait({call}, timeout=self._stall_s)
        if done:
            self.lost = False
            return call.result()
        self._replace()
        message = f"{self._name} did not answer within {self._stall_s:g} s and was replaced: retry"
        return [WorkerLost(message)] * len(payloads)

    def close(self) -> None:
        """Start no more calls; a running call is not waited for."""
        self._pool.close()

    def _replace(self) -> None:
        self.lost = True
        log.error(
            "%s did not answer within %g s and its thread was replaced; it hangs in:\n%s",
            self._name,
            self._stall_s,
            _format_stacks(f"batcher-{self._name}_"),
        )
        self.close()
        self._pool = self._new_pool()


def _format_stacks(prefix: str) -> str:
    """The stacks of the living threads whose names begin with `prefix`."""
    frames = sys._current_frames()
    threads = [each for each in threading.enumerate() if each.name.startswith(prefix) and each.ident in frames]
    return "".join("".join(traceback.format_stack(frames[thread.ident or 0])) for thread in threads)


def run_isolated(run: Callable[[list[T]], Sequence[R]], payloads: list[T]) -> list[R | Exception]:
    """Return one outcome per payload of `run`, with the error on the items that cause it.

    Where a batch fails, each half is run alone, until only the failing items are left.
    run: one result per payload; an Exception in the place of a payload is the error of that item.
    One failing item among B costs about 2·log2(B) further runs; a failure of every item, a lost
    device for example, costs 2·B - 2.
    """
    try:
        results = run(payloads)
        if len(results) == len(payloads):
            return list(results)
    except BaseException as error:  # noqa: BLE001  a SystemExit would end the event loop if it got there
        if len(payloads) == 1:
            return [error if isinstance(error, Exception) else RuntimeError(f"the batch raised {error!r}")]
    else:
        return [RuntimeError(f"{len(results)} results came back for {len(payloads)} items") for _ in payloads]
    middle = len(payloads) // 2
    return [*run_isolated(run, payloads[:middle]), *run_isolated(run, payloads[middle:])]
