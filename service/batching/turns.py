"""A fair queue of places for waiting callers, and a budget of pixels. Standard library."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

__all__ = ["PixelBudget", "Turns"]


class Turns:
    """A number of places. A place that is free goes to the next caller in rotation, so that one
    image waits for one image of each other request, not for all of them.

    State, changed on the event loop only: free places, and the waiting of each caller in order.
    """

    def __init__(self) -> None:
        self._free = 0
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def depth(self) -> int:
        """How many wait."""
        return sum(len(each) for each in self._waiting.values())

    async def take(self, caller: Hashable) -> None:
        """Wait for a place.

        caller: a request; the images of one request are first come, first served.
        """
        if self._free and not self._waiting:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()  # it came, and nobody takes it
            else:
                self._leave(caller, turn)
            raise

    def give(self) -> None:
        """Free a place, or add one."""
        while self._waiting:
            caller, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            self._waiting.move_to_end(caller)
            if not turns:
                del self._waiting[caller]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _leave(self, caller: Hashable, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(caller)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[caller]


class PixelBudget:
    """Pixels that large images may hold at one time, and how many such images; first come, first
    served.

    State, changed on the event loop only: what is held, and who waits.
    """

    def __init__(self, pixels: int, images: int) -> None:
        self._limit, self._images = pixels, images
        self.held, self._inside = 0, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, pixels: int) -> AsyncIterator[None]:
        """Hold the pixels inside, once they are free."""
        wanted = min(pixels, self._limit)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (wanted, turn)
        self._waiting.append(entry)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(wanted)
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._admit()
            raise
        try:
            yield
        finally:
            self._release(wanted)

    def _release(self, pixels: int) -> None:
        self.held -= pixels
        self._inside -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._inside < self._images and self.held + self._waiting[0][0] <= self._limit:
            pixels, turn = self._waiting.popleft()
            if not turn.done():
                self.held += pixels
                self._inside += 1
                turn.set_result(None)
