"""Shares of one service: bytes of bodies in flight, and requests of one caller behind a proxy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from starlette.types import Scope

from service.access.hosts import is_within
from service.errors import CapacityExceeded
from service.settings import Network

__all__ = ["BodyBudget", "ForwardedCallers"]


class Body(Protocol):
    """The body of one request. read_bytes: so far."""

    read_bytes: int
    complete: bool

    def refuse(self, error: CapacityExceeded) -> None:
        """Let the next, or the waiting, read raise `error`."""
        ...


class BodyBudget:
    """At most `max_bytes` of the bodies of all requests that are not yet answered.

    Beyond that the largest body that is still arriving is refused, so that whoever sends much and
    slowly loses, not whoever sends little.
    State: the bodies in flight and the sum of their bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._total = max_bytes, 0
        self._bodies: set[Body] = set()

    def add(self, body: Body, size: int) -> None:
        """Count `size` bytes that came, and refuse a body where they are too many."""
        self._bodies.add(body)
        body.read_bytes += size
        self._total += size
        if self._total <= self._max_bytes:
            return
        arriving = [each for each in self._bodies if not each.complete]
        if arriving:
            largest = max(arriving, key=lambda each: each.read_bytes)
            largest.refuse(
                CapacityExceeded(
                    f"the bodies of all requests have {self._total} bytes, at most {self._max_bytes}, and this is the "
                    f"largest that is still arriving ({largest.read_bytes}): retry later, or send smaller requests"
                )
            )

    def release(self, body: Body) -> None:
        """The request of this body is answered."""
        if body in self._bodies:
            self._bodies.remove(body)
            self._total -= body.read_bytes


class ForwardedCallers:
    """At most `per_address` requests at a time of one caller behind a trusted proxy.

    State: the requests inside, by the address that the nearest untrusted hop had.
    """

    def __init__(self, per_address: int, trusted: tuple[Network, ...]) -> None:
        self._per_address, self._trusted = per_address, trusted
        self._inside: Counter[str] = Counter()

    @contextmanager
    def count(self, scope: Scope) -> Iterator[None]:
        """Count a request as inside. Raises CapacityExceeded."""
        address = self._address(scope)
        if address is None:
            yield
            return
        if self._inside[address] >= self._per_address:
            raise CapacityExceeded(
                f"{address} has {self._per_address} requests inside, the limit for one address: wait for their replies"
            )
        self._inside[address] += 1
        try:
            yield
        finally:
            self._inside -= Counter((address,))

    def _address(self, scope: Scope) -> str | None:
        """The last untrusted address of X-Forwarded-For; None where the peer is not trusted."""
        client = scope.get("client")
        if not client or not is_within(client[0], self._trusted):
            return None
        named = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        hops = [hop.strip() for hop in b",".join(named).decode("latin-1").split(",") if hop.strip()]
        return next((hop[:64] for hop in reversed(hops) if not is_within(hop, self._trusted)), None)
