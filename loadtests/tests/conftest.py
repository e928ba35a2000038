"""A small HTTP server that behaves as told: the oracle of what the load tests must report."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

Handle = Callable[
    [str, str, bytes], tuple[int, object, dict[str, str]]
]  # method, path, body -> status, JSON or text, headers


class Scripted(ThreadingHTTPServer):
    """Answers with whatever `handle` returns at the time of the request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.handle: Handle = lambda method, path, body: (200, {}, {})
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Scripted

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, content, headers = self.server.handle(self.command, self.path, sent)
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer  # noqa: N815 - the names are http.server's

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the name is http.server's
        """Nothing: requests are counted by the tests themselves."""


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Stall:
    """Requests that arrive inside the stall are answered when it ends, as behind a paused service.

    start, end: seconds since the first.
    """

    def __init__(self, start: float, end: float) -> None:
        self._start, self._end = start, end
        self._zero: float | None = None

    def __call__(self, method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        self._zero = self._zero or time.perf_counter()
        now = time.perf_counter() - self._zero
        if self._start < now < self._end:
            time.sleep(self._end - now)
        return 200, {"data": []}, {"Server-Timing": "queue;dur=1.5, encode;dur=20.0"}


@pytest.fixture
def nowhere() -> str:
    """A URL at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
