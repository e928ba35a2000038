"""Whether the towers still work: a real item goes through an idle one every few seconds, so that readiness speaks of the model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from index_store import Side
from index_store.types import SIDES
from service.batching.batcher import QueueFull

log = logging.getLogger("reco")
PULSE_S = 5.0
STALE_S = 30.0

Try = Callable[[Side, float], Awaitable[Sequence[object]]]


class Watchdog:
    """attempt: one item through one tower by a deadline, to its outcomes.  State: when each tower's last good batch ended."""

    def __init__(self, attempt: Try) -> None:
        self._attempt = attempt
        self._good: dict[Side, float] = dict.fromkeys(SIDES, -STALE_S)

    def felt(self, side: Side) -> None:
        """A real batch has passed."""
        self._good[side] = time.monotonic()

    def stale(self) -> str | None:
        """None, or which tower has been silent for too long."""
        now = time.monotonic()
        silent = next((side for side, last in self._good.items() if now - last > STALE_S), None)
        return f"no {silent} batch has passed in the last {STALE_S:.0f} s" if silent else None

    async def check(self, side: Side) -> None:
        """Send the item; a failure is logged, and the tower goes stale."""
        for outcome in await self._attempt(side, time.monotonic() + STALE_S):
            if isinstance(outcome, Exception):
                log.error("the %s tower failed on its test item: %s", side, outcome)

    async def keep(self) -> None:
        """Check idle towers for ever."""
        while True:
            await asyncio.sleep(PULSE_S)
            for side, last in self._good.items():
                if time.monotonic() - last > PULSE_S:
                    try:
                        await self.check(side)
                    except QueueFull:
                        log.warning("the %s queue is full: no room for the test item", side)
