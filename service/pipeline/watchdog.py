"""The watchdog of the towers: sends a real item through an idle tower every few seconds.

Readiness thereby says that the model answers, not only that the process lives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from index_store import Side
from index_store.types import SIDES
from service.batching.batcher import QueueFull

log = logging.getLogger("reco")
IDLE_S = 5.0  # without a batch: the tower is checked
STALE_S = 30.0  # without a good batch: the tower is not ready

SendTestItem = Callable[[Side, float], Awaitable[Sequence[object]]]


class Watchdog:
    """send: one test item through one tower by a deadline, to its outcomes.

    State: when the last good batch of each tower ended.
    """

    def __init__(self, send: SendTestItem) -> None:
        self._send = send
        self._last_good: dict[Side, float] = dict.fromkeys(SIDES, -STALE_S)

    def note_batch(self, side: Side) -> None:
        """Note that a batch of this tower has been answered."""
        self._last_good[side] = time.monotonic()

    def stale(self) -> str | None:
        """None, or which tower has answered no batch for STALE_S."""
        now = time.monotonic()
        silent = next((side for side, last in self._last_good.items() if now - last > STALE_S), None)
        return f"no {silent} batch has passed in the last {STALE_S:.0f} s" if silent else None

    async def check(self, side: Side) -> None:
        """Send the test item. A failure is logged, and the tower goes stale."""
        for outcome in await self._send(side, time.monotonic() + STALE_S):
            if isinstance(outcome, Exception):
                log.error("the %s tower failed on its test item: %s", side, outcome)

    async def run(self) -> None:
        """Check idle towers until cancelled."""
        while True:
            await asyncio.sleep(IDLE_S)
            for side, last in self._last_good.items():
                if time.monotonic() - last > IDLE_S:
                    try:
                        await self.check(side)
                    except QueueFull:
                        log.warning("the %s queue is full: no room for the test item", side)
