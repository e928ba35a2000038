"""Limits of a connection before its request has a head: seconds and bytes.

After the head, `api/middleware` limits the body. The protocol of uvicorn is subclassed, so uvicorn
is pinned; `test_connection_limits` asserts the methods that are overridden.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["LimitedProtocol"]

MAX_HEAD_BYTES = 64 * 2**10


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a limit on heads.

    A head must be complete within `head_s` seconds of the connection or, on a connection that is
    kept alive, of its first byte. State: the timer of an incomplete head, and its bytes so far.
    """

    head_s = 30.0
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    @classmethod
    def with_head_limit(cls, head_s: float) -> type[LimitedProtocol]:
        """The protocol class with another limit in seconds, since uvicorn makes the instances."""
        return type("LimitedProtocol", (cls,), {"head_s": head_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer: a connection without a byte ends like one with a slow head."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.head_s, self._refuse, b"408 Request Timeout")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of an incomplete head."""
        running = self._timer
        super().data_received(data)
        # still the same head: bytes that end one request and begin another are not counted
        if running is not None and self._timer is running:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Start the timer at the first byte of a request."""
        super().on_message_begin()
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self._refuse, b"408 Request Timeout")

    def on_headers_complete(self) -> None:
        """Stop the timer: the head is complete."""
        self._stop_timer()
        super().on_headers_complete()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._head_bytes = None, 0

    def _refuse(self, status: bytes) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
