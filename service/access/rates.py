"""What one key may use per second: requests, items, bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from service.errors import RateExceeded


@dataclass(frozen=True, slots=True)
class Rates:
    """Limits of one key per second; None = no limit."""

    requests: float | None = None
    items: float | None = None
    bytes: float | None = None


class Allowance:
    """A rate per second with a burst of one second, one unit at least.

    An amount beyond the burst is allowed once the allowance is full, and is paid off afterwards, so
    that a large request is delayed and not refused for ever.
    State: what is left, negative while a large amount is paid off, and when that was known.
    """

    def __init__(self, rate: float, what: str) -> None:
        self._rate, self._what, self._most = rate, what, max(rate, 1.0)
        self._left, self._at = self._most, time.monotonic()

    def spend(self, amount: float) -> None:
        """Take an amount. Raises RateExceeded with the seconds after which it is allowed."""
        self._refill()
        lacking = min(amount, self._most) - self._left
        if lacking > 0:
            raise RateExceeded(
                f"this key may use {self._rate:g} {self._what} a second: retry after the seconds of Retry-After",
                retry_after_s=lacking / self._rate,
            )
        self._left -= amount

    def charge(self, amount: float) -> None:
        """Take an amount that has been used already."""
        self._refill()
        self._left -= amount

    def _refill(self) -> None:
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now


class Usage:
    """The allowances of one key; `spend` of a limit that is not set does nothing."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self._requests = None if rates.requests is None else Allowance(rates.requests, "requests")
        self._items = None if rates.items is None else Allowance(rates.items, "items")
        self._bytes = None if rates.bytes is None else Allowance(rates.bytes, "bytes")

    def begin(self, declared_bytes: int) -> None:
        """Take one request and the bytes that it declares. Raises RateExceeded."""
        if self._requests is not None:
            self._requests.spend(1)
        if self._bytes is not None:
            self._bytes.spend(declared_bytes)

    def spend_items(self, items: int) -> None:
        """Take the items of a request. Raises RateExceeded."""
        if self._items is not None:
            self._items.spend(items)

    def charge_bytes(self, undeclared: int) -> None:
        """Take bytes that a request sent without declaring them."""
        if self._bytes is not None:
            self._bytes.charge(undeclared)
