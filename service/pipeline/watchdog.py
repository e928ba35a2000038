"""The watchdog: sends a real item through an idle tower, and through an idle decoder, every few
seconds.

Readiness thereby says that each part answers, not only that the process lives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, get_args

from service.batching.batcher import QueueFull

log = logging.getLogger("reco")
IDLE_S = 5.0  # without a good item: the part is checked
STALE_S = 30.0  # without a good item: the part is not ready

Part = Literal["image", "text", "decoder"]  # two towers, and what decodes for the first
PARTS: tuple[Part, ...] = get_args(Part)
SendTestItem = Callable[[Part, float], Awaitable[Sequence[object]]]


class Watchdog:
    """send: one test item through one part by a deadline, to its outcomes.

    State: when the last good batch of each tower ended, and the last image was decoded.
    """

    def __init__(self, send: SendTestItem) -> None:
        self._send = send
        self._last_good: dict[Part, float] = dict.fromkeys(PARTS, -STALE_S)

    def note(self, part: Part) -> None:
        """Note that a batch of this tower has been answered, or an image decoded."""
        self._last_good[part] = time.monotonic()

    def stale(self) -> str | None:
        """None, or which part has answered nothing for STALE_S."""
        now = time.monotonic()
        silent = next((part for part, last in self._last_good.items() if now - last > STALE_S), None)
        if silent == "decoder":
            return f"no image has been decoded in the last {STALE_S:.0f} s"
        return f"no {silent} batch has passed in the last {STALE_S:.0f} s" if silent else None

    async def check(self, part: Part) -> None:
        """Send the test item. A failure is logged, and the part goes stale."""
        for outcome in await self._send(part, time.monotonic() + STALE_S):
            if isinstance(outcome, Exception):
                log.error("the %s failed on its test item: %s", _name_of(part), outcome)

    async def run(self) -> None:
        """Check idle parts until cancelled, each on its own."""
        async with asyncio.TaskGroup() as group:
            for part in PARTS:
                group.create_task(self._run(part))

    async def _run(self, part: Part) -> None:
        while True:
            await asyncio.sleep(IDLE_S)
            if time.monotonic() - self._last_good[part] > IDLE_S:
                try:
                    await self.check(part)
                except QueueFull:
                    log.warning("the %s queue is full: no room for the test item", part)


def _name_of(part: Part) -> str:
    return part if part == "decoder" else f"{part} tower"
