"""Callers who send half, never read, linger or come in crowds: raw sockets, a real process."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from service.tests.conftest import Server, serving

LIMITS = {
    "RECO_MAX_BODY_BYTES": "4000000", "RECO_MAX_INFLIGHT_BYTES": "10000000", "RECO_SEND_S": "1",
    "RECO_MAX_CONNECTIONS_PER_ADDRESS": "40", "RECO_RECEIVE_S": "20",
}  # fmt: skip


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("capacity"), **LIMITS) as server:
        yield server


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        yield connection


def head(length: int, *more: str) -> bytes:
    lines = ["POST /embed/text HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def open_sockets(server: Server) -> int:
    links = [path.readlink() for path in Path(f"/proc/{server.process.pid}/fd").iterdir() if path.is_symlink()]
    return sum(str(link).startswith("socket:") for link in links)


def wait_for_sockets(server: Server, most: int) -> None:
    end = time.monotonic() + 20
    while open_sockets(server) > most:
        assert time.monotonic() < end, f"{open_sockets(server)} sockets are open, {most} were"
        time.sleep(0.05)


def test_half_sent_bodies_hurt_their_senders_alone(limited: Server) -> None:
    with ExitStack() as stack:
        half = [stack.enter_context(connected(limited)) for _ in range(10)]
        for connection in half:
            connection.sendall(head(3_500_000) + b" " * 3_000_000)
        with limited.client() as client:
            assert client.post("/embed/text", json={"texts": ["a"]}).status_code == 200
        refused = 0
        for connection in half:
            connection.settimeout(0.5)
            try:
                reply = connection.recv(4096)
            except TimeoutError:
                continue
            assert reply.split()[1] == b"429", reply
            assert b"capacity_exceeded" in reply
            refused += 1
        assert refused >= 7  # at most 10 MB of 30 are kept


def test_a_caller_that_never_reads_is_disconnected(limited: Server) -> None:
    with limited.client() as client:
        client.get("/livez")
        before = open_sockets(limited)
        body = json.dumps({"texts": ["a"] * 256, "plain": True}).encode()
        with connected(limited) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for _ in range(4):
                connection.sendall(head(len(body)) + body)
            time.sleep(0.5)
            assert open_sockets(limited) > before - 1
            wait_for_sockets(limited, before)


def test_a_slow_reader_gets_all_of_its_reply(limited: Server) -> None:
    read_slowly(limited, 256)


def read_slowly(server: Server, items: int) -> None:
    """Read a reply of megabytes in pieces, and check that it is whole."""
    body = json.dumps({"texts": ["a"] * items, "plain": True}).encode()
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(head(len(body), "Connection: close") + body)
        received = b""
        while part := connection.recv(200_000):
            received += part
            time.sleep(0.02)
    top, _, reply = received.partition(b"\r\n\r\n")
    assert int(top.lower().split(b"content-length: ")[1].split()[0]) == len(reply)
    assert len(json.loads(reply)["data"]) == items


def test_a_body_that_goes_on_after_its_reply_is_not_read_for_ever(limited: Server) -> None:
    before = open_sockets(limited)
    with connected(limited) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        assert connection.recv(4096).split()[1] == b"200"
        end = time.monotonic() + 20
        with pytest.raises(OSError, match=r"pipe|reset"):
            while time.monotonic() < end:
                connection.sendall(b" ")
                time.sleep(0.5)
    wait_for_sockets(limited, before)


def test_a_connection_that_rests_after_a_late_body_is_closed(limited: Server) -> None:
    """The body ends after its reply, and nothing follows."""
    before = open_sockets(limited)
    with connected(limited) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n")
        assert connection.recv(4096).split()[1] == b"200"
        connection.sendall(b"{}")
        wait_for_sockets(limited, before)


def test_empty_lines_do_not_keep_a_connection(limited: Server) -> None:
    with connected(limited) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(4096).split()[1] == b"200"
        end = time.monotonic() + 15
        with pytest.raises(OSError, match=r"pipe|reset"):
            while time.monotonic() < end:
                connection.sendall(b"\r\n")
                time.sleep(0.3)


def test_requests_that_wait_on_one_connection_are_limited(limited: Server) -> None:
    with connected(limited) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        received = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                received += part
    assert received.count(b"HTTP/1.1 200") < 1000
    assert received.count(b"HTTP/1.1 400") <= 1


def test_replies_that_nobody_reads_are_limited_together(tmp_path: Path) -> None:
    body = json.dumps({"texts": ["a"] * 256, "plain": True}).encode()
    limits = {"RECO_MAX_BODY_BYTES": "100000", "RECO_MAX_INFLIGHT_BYTES": "100000", "RECO_MAX_ITEMS": "1000"}
    with serving(tmp_path, **limits) as server:
        read_slowly(server, 1000)  # one reply alone may be larger than the limit, and than the kernel's buffers
        with server.client() as client:
            client.get("/livez")
        before = open_sockets(server)
        with ExitStack() as stack:
            for _ in range(4):  # twelve replies of each are more than the kernel's buffers hold
                connection = stack.enter_context(connected(server))
                connection.sendall((head(len(body)) + body) * 12)
                assert connection.recv(1) == b"H"
            end = time.monotonic() + 20  # long before send_s
            while open_sockets(server) > before + 1 and time.monotonic() < end:
                time.sleep(0.05)
            assert open_sockets(server) <= before + 1


def test_connections_of_one_address_are_limited(limited: Server) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(limited)) for _ in range(40)]
        with connected(limited) as late:
            assert late.recv(4096).split()[1] == b"429"
        idle[0].close()
        end = time.monotonic() + 10
        answered = False
        while not answered and time.monotonic() < end:
            with connected(limited) as again:
                again.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answered = again.recv(4096).split()[1] == b"200"
        assert answered


def test_callers_behind_a_trusted_proxy_are_limited_by_their_own_address(tmp_path: Path) -> None:
    environ = {"RECO_TRUSTED_PROXIES": "127.0.0.0/8", "RECO_MAX_CONNECTIONS_PER_ADDRESS": "2"}
    with serving(tmp_path, **environ) as server, ExitStack() as stack:
        for _ in range(2):
            slow = stack.enter_context(connected(server))
            slow.sendall(head(1000, "X-Forwarded-For: 127.0.0.1, 203.0.113.9") + b"{")
        time.sleep(0.5)
        with server.client() as client:
            codes = {
                address: client.post(
                    "/embed/text", json={"texts": ["a"]}, headers={"x-forwarded-for": f"{address}, 127.0.0.9"}
                ).status_code
                for address in ("203.0.113.9", "203.0.113.10")
            }
        assert codes == {"203.0.113.9": 429, "203.0.113.10": 200}
