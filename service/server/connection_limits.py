"""Limits of a connection: seconds and bytes of a head, reading of a reply, connections per address.

After the head, `api/middleware` limits the body. The protocol of uvicorn is subclassed, so uvicorn
is pinned; `test_connection_limits` asserts the methods that are overridden.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.access.hosts import is_within
from service.settings import Network, Settings

__all__ = ["ConnectionLimits", "LimitedProtocol"]

MAX_HEAD_BYTES = 64 * 2**10  # of the head of a request
LINGER_S = 5.0  # for the rest of a body whose request is already answered
MIN_SEND_BYTES = 4096  # a second, of a reply that a caller reads; one that reads less is disconnected
MAX_PIPELINED = 64  # requests that wait on one connection for the reply to the one before
FILES_SHARE = 0.75  # of the files that the process may still open, for the connections of one address


@dataclass(eq=False)
class ConnectionLimits:
    """What all connections of one server share.

    head_s, send_s: seconds.  per_address: connections of one peer address; trusted peers are
    proxies and have no limit here.  unread_bytes: of all replies that callers have yet to read; one
    larger reply is allowed alone.
    State: the open connections by address, and those with an unread reply, longest first.
    """

    head_s: float = 30.0
    send_s: float = 30.0
    per_address: int = 1024
    trusted: tuple[Network, ...] = ()
    unread_bytes: int = 512 * 2**20
    connections: Counter[str] = field(default_factory=Counter)
    unread: dict[asyncio.Transport, None] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, settings: Settings) -> ConnectionLimits:
        """The operator's limits."""
        per_address = settings.max_connections_per_address
        return cls(
            settings.receive_s, settings.send_s, per_address, settings.trusted_proxies, settings.max_inflight_bytes
        )

    def leave_files(self) -> None:
        """Lower `per_address`, so that one address never takes all files that the process may open.

        To be called once everything else is open: the event loop and the decoders have files too.
        """
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            free = files - len(list(Path("/dev/fd").iterdir()))
            self.per_address = min(self.per_address, max(1, int(FILES_SHARE * free)))

    def trusts(self, address: str) -> bool:
        """Whether a peer is a proxy of the operator's."""
        return is_within(address, self.trusted)

    def hold_unread(self, transport: asyncio.Transport) -> None:
        """Count a reply as unread; where all are too large, end the connections that have waited
        longest for their readers.

        The limit is never below the size of this reply, so that a lone reader gets the largest.
        """
        self.unread.setdefault(transport)
        sizes = {each: each.get_write_buffer_size() for each in self.unread}
        self.unread = dict.fromkeys(each for each, size in sizes.items() if size)
        excess = sum(sizes.values()) - max(self.unread_bytes, sizes[transport])
        for each in list(self.unread):
            if excess <= 0:
                break
            excess -= sizes[each]
            del self.unread[each]
            each.abort()


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits.

    A head must be complete within `head_s` seconds of the connection or, on a connection that is
    kept alive, of its first byte. A reply must be read at MIN_SEND_BYTES a second, looked at every
    `send_s` seconds; a body that goes on after its reply is read for LINGER_S. At most
    MAX_PIPELINED requests wait on it. Empty lines between requests do not prolong its rest.
    State: the timers of an incomplete head, of an unread reply and of an unfinished body; the bytes
    of the head so far, and of the reply at the last look.
    """

    limits = ConnectionLimits()
    _timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _address: str | None = None
    _over_unix_socket = False

    @classmethod
    def with_limits(cls, limits: ConnectionLimits) -> type[LimitedProtocol]:
        """The protocol class with other limits, since uvicorn makes the instances."""
        return type("LimitedProtocol", (cls,), {"limits": limits})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer: a connection without a byte ends like one with a slow head.

        One connection too many of an address is answered 429 and closed.
        """
        super().connection_made(transport)
        self._over_unix_socket = transport.get_extra_info("socket").family == socket.AF_UNIX
        self._timer = self.loop.call_later(self.limits.head_s, self._refuse, b"408 Request Timeout")
        peer = transport.get_extra_info("peername")
        if not isinstance(peer, tuple) or self.limits.trusts(peer[0]):  # a Unix socket has no address
            return
        self._address = str(peer[0])
        self.limits.connections[self._address] += 1
        if self.limits.connections[self._address] > self.limits.per_address:
            self._refuse(b"429 Too Many Requests")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_timer()
        for timer in (self._send_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        if self._address is not None:
            self.limits.connections -= Counter((self._address,))  # an address without any is forgotten
        self.limits.unread.pop(self.transport, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of an incomplete head."""
        running, rest = self._timer, self.timeout_keep_alive_task
        super().data_received(data)
        if self._is_resting() and self.timeout_keep_alive_task is None:  # uvicorn has ended its timer
            until = self.loop.time() + self.timeout_keep_alive if rest is None else rest.when()
            self.timeout_keep_alive_task = self.loop.call_at(until, self.timeout_keep_alive_handler)
        # still the same head: bytes that end one request and begin another are not counted
        if running is not None and self._timer is running:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Start the timer at the first byte of a request, and note over which socket it comes."""
        super().on_message_begin()
        self.scope["state"]["unix_socket"] = self._over_unix_socket
        if self._timer is None:
            self._timer = self.loop.call_later(self.limits.head_s, self._refuse, b"408 Request Timeout")
        if self._send_timer is not None and not self.transport.get_write_buffer_size():
            self._send_timer.cancel()  # the reply before this request was read
            self._send_timer = None

    def on_headers_complete(self) -> None:
        """Stop the timer: the head is complete.

        Raises RuntimeError, which the parser answers with 400, for a request too many that waits.
        """
        self._stop_timer()
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise RuntimeError(f"more than {MAX_PIPELINED} requests wait on one connection")

    def on_message_complete(self) -> None:
        """Stop the timer of a body that went on after its reply."""
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
            self.cycle.more_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Watch that the reply is read, and that a body which is still arriving ends soon."""
        unfinished = self.cycle is not None and self.cycle.response_complete and self.cycle.more_body
        super().on_response_complete()
        if unfinished and self._linger_timer is None and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)
        self._watch_reply()

    def pause_writing(self) -> None:
        """Watch that a reply which fills the buffer is read."""
        super().pause_writing()
        self._watch_reply()

    def _watch_reply(self) -> None:
        """Look again in `send_s` seconds, unless a look is due or all is sent."""
        unread = self.transport.get_write_buffer_size()
        if unread:
            self.limits.hold_unread(self.transport)
        if unread and self._send_timer is None:
            self._send_timer = self.loop.call_later(self.limits.send_s, self._check_reply, unread)

    def _check_reply(self, before: int) -> None:
        """End a connection whose reply is not read.  before: bytes left at the last look."""
        self._send_timer = None
        left = self.transport.get_write_buffer_size()
        if left and before - left < self.limits.send_s * MIN_SEND_BYTES:
            self.transport.abort()
        else:
            self._watch_reply()

    def _is_resting(self) -> bool:
        """Whether all that came is answered and no request has begun."""
        answered = self.cycle is not None and self.cycle.response_complete and not self.cycle.more_body
        return answered and self._timer is None and not self.transport.is_closing()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._head_bytes = None, 0

    def _refuse(self, status: bytes) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
