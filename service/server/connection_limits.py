"""What a connection may cost before its request has a head: so many seconds, so many bytes. Behind the head the gate takes over."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["bounded"]

HEAD_BYTES = 64 * 2**10


def bounded(head_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol; a head must be whole within `head_s` of the connection or, on one that is kept alive, of its first byte."""

    class Bounded(HttpToolsProtocol):
        """State: the clock of a head that is not whole, and its bytes so far."""

        _clock: asyncio.TimerHandle | None = None
        _head = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """A connection on which nothing comes ends like one on which a head trickles in."""
            super().connection_made(transport)
            self._clock = self.loop.call_later(head_s, self._end, b"408 Request Timeout")

        def connection_lost(self, exc: Exception | None) -> None:
            """Nobody is left to be told."""
            self._stop()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Count what belongs to a head that is not whole yet."""
            running = self._clock
            super().data_received(data)
            if (
                running is not None and self._clock is running
            ):  # the same head: what ends one request and begins another is not counted
                self._head += len(data)
                if self._head > HEAD_BYTES:
                    self._end(b"431 Request Header Fields Too Large")

        def on_message_begin(self) -> None:
            """The first byte of a request."""
            super().on_message_begin()
            if self._clock is None:
                self._clock = self.loop.call_later(head_s, self._end, b"408 Request Timeout")

        def on_headers_complete(self) -> None:
            """The head is whole."""
            self._stop()
            super().on_headers_complete()

        def _stop(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
            self._clock, self._head = None, 0

        def _end(self, status: bytes) -> None:
            self._stop()
            if not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                self.transport.close()

    return Bounded
