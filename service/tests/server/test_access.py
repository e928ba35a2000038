"""Who gets in: a real service behind a real nginx, over its Unix socket, by the command line."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import socketserver
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.access.token import read_token
from service.client import AsyncRecoClient, RecoClient
from service.tests.conftest import Server, one_line, reco, serving

ACTIVATE = "/memories/grocery/activate"
SWAP = {"version": "all", "dry_run": True}
TEXT = {"texts": ["a"]}
KEYS = """
[keys.editor]
key = "editor-secret"
role = "write"

[keys.slow]
key = "slow-secret"
role = "read"
requests_per_s = 0.5

[keys.narrow]
key = "narrow-secret"
role = "read"
items_per_s = 3
bytes_per_s = 2000

[keys.chunked]
key = "chunked-secret"
role = "read"
bytes_per_s = 2000
"""
NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {url}; }} }}
}}
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """API keys and a keys file, no admin key, a Unix socket."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys.toml").write_text(KEYS)
    (folder / "keys.toml").chmod(0o600)
    flags = ("--keys-file", str(folder / "keys.toml"), "--unix-socket", str(folder / "reco.sock"))
    with serving(folder / "store", *flags, RECO_API_KEYS="shop-secret") as server:
        yield server


def bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contextmanager
def behind_nginx(url: str, folder: Path) -> Iterator[str]:
    """The address of a plain nginx with `proxy_pass`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, url=url))
    process = subprocess.Popen(
        ["nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")],
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def refused(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_a_proxy_on_this_machine_makes_nobody_an_administrator(guarded: Server, tmp_path: Path) -> None:
    with behind_nginx(guarded.url, tmp_path) as url:
        for headers in ({}, {"host": "localhost"}, {"host": "127.0.0.1:8000", "x-forwarded-for": "127.0.0.1"}):
            assert refused(httpx.post(url + ACTIVATE, json=SWAP, headers=headers)) == (401, "missing_key")
            assert refused(httpx.post(url + "/embed/text", json=TEXT, headers=headers)) == (401, "missing_key")
        assert refused(httpx.post(url + ACTIVATE, json=SWAP, headers=bearer("shop-secret"))) == (403, "wrong_key")
        assert httpx.post(url + "/embed/text", json=TEXT, headers=bearer("shop-secret")).status_code == 200
        token = bearer(read_token(guarded.store))
        assert httpx.post(url + ACTIVATE, json={"version": "none"}, headers=token).status_code == 404
        # by whatever name the proxy is called: no page of another site has a key
        assert httpx.get(url + "/memories", headers={**token, "host": "shop.example"}).status_code == 200


def test_each_role_opens_its_routes(guarded: Server) -> None:
    token = read_token(guarded.store)
    opened: dict[tuple[str, str], dict[str | None, int]] = {
        ("POST", "/embed/text"): {None: 401, "shop-secret": 200, "editor-secret": 200, token: 200},
        ("GET", "/label-sets"): {None: 401, "shop-secret": 200, "editor-secret": 200, token: 200},
        ("GET", "/memories"): {None: 401, "shop-secret": 403, "editor-secret": 200, token: 200},
        ("GET", "/jobs/none"): {None: 401, "shop-secret": 403, "editor-secret": 404, token: 404},
        ("DELETE", "/label-sets/none"): {None: 401, "shop-secret": 403, "editor-secret": 404, token: 404},
        ("DELETE", "/memories/none/pairs/1"): {None: 401, "shop-secret": 403, "editor-secret": 404, token: 404},
        ("POST", "/memories/none/activate"): {None: 401, "shop-secret": 403, "editor-secret": 403, token: 404},
        ("POST", "/memories/none/rollback"): {None: 401, "shop-secret": 403, "editor-secret": 403, token: 404},
        ("POST", "/memories/none/compact"): {None: 401, "shop-secret": 403, "editor-secret": 403, token: 404},
    }
    bodies: dict[str, Any] = {"/embed/text": TEXT, "/memories/none/activate": SWAP}
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        for (method, path), codes in opened.items():
            for key, code in codes.items():
                headers = bearer(key) if key else {}
                reply = client.request(method, path, headers=headers, json=bodies.get(path))
                assert reply.status_code == code, (method, path, key == token, reply.text)


def test_limits_of_a_key(guarded: Server) -> None:
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        assert client.post("/embed/text", json=TEXT, headers=bearer("slow-secret")).status_code == 200
        reply = client.post("/embed/text", json=TEXT, headers=bearer("slow-secret"))
        assert refused(reply) == (429, "rate_exceeded")
        assert 1 <= int(reply.headers["retry-after"]) <= 2
        narrow = bearer("narrow-secret")
        assert client.post("/embed/text", json={"texts": ["a"] * 9}, headers=narrow).status_code == 200
        assert refused(client.post("/embed/text", json=TEXT, headers=narrow)) == (429, "rate_exceeded")
        time.sleep(1)
        large = client.get("/label-sets", headers=narrow, params={"x": "1"})
        assert large.status_code == 200
        assert refused(client.post("/embed/text", content=b"x" * 9000, headers=narrow))[0] in (415, 400)
        assert refused(client.post("/embed/text", content=b"x", headers=narrow)) == (429, "rate_exceeded")
        assert client.post("/embed/text", json=TEXT, headers=bearer("shop-secret")).status_code == 200


def test_the_bytes_of_a_chunked_body_are_charged_as_they_come(guarded: Server) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    head = (
        f"POST /embed/text HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        "Authorization: Bearer chunked-secret\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    body = {**TEXT, "on_error": "null"}
    with socket.create_connection((host, int(port)), timeout=60) as half:
        half.sendall(head.encode() + b"ffff\r\n" + b" " * 0xFFFF)
        give_up = time.monotonic() + 20
        while httpx.post(guarded.url + "/embed/text", json=body, headers=bearer("chunked-secret")).status_code == 200:
            assert time.monotonic() < give_up, "the body that is arriving is not charged"
            time.sleep(0.05)


def test_a_body_of_the_wrong_shape_is_audited_as_what_it_is(guarded: Server) -> None:
    def outcomes() -> list[str]:
        lines = [json.loads(line) for line in list(guarded.lines) if line.startswith("{")]
        return [line["outcome"] for line in lines if line.get("request_id") == "shapes" and line["what"] == "admin"]

    headers = {**bearer("editor-secret"), "x-request-id": "shapes"}
    with httpx.Client(base_url=guarded.url, timeout=60, headers=headers) as client:
        assert refused(client.put("/label-sets/a", json={"labels": 5})) == (422, "invalid_value")
        assert refused(client.put("/label-sets/a", json={})) == (400, "bad_request")
        assert refused(client.put("/label-sets/a", json={"labels": [], "lables": []})) == (400, "bad_request")
        assert refused(client.put("/label-sets/a", content=b"{")) == (415, "unsupported_type")
    give_up = time.monotonic() + 10
    while len(outcomes()) < 4 and time.monotonic() < give_up:
        time.sleep(0.05)
    assert outcomes() == ["422", "400", "400", "415"]


def test_the_unix_socket_needs_no_key_and_is_the_owners(guarded: Server) -> None:
    path = guarded.store.parent / "reco.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://anything.example") as client:
        assert client.get("/memories").status_code == 200
        assert client.post("/memories/grocery/activate", json={"version": "none"}).status_code == 404
    done = reco("memory", "activate", "grocery@all", "--url", f"unix:{path}")
    assert done.returncode == 0, done.stderr
    with RecoClient(f"unix:{path}") as reco_client:
        assert [row["name"] for row in reco_client.memories()] == ["grocery"]

    async def ask() -> list[dict[str, Any]]:
        async with AsyncRecoClient(f"unix:{path}") as asynchronous:
            return await asynchronous.memories()

    assert [row["name"] for row in asyncio.run(ask())] == ["grocery"]
    # what the socket proves is not to be had by a header
    for headers in ({"x-forwarded-for": "unix"}, {"host": "unix socket"}):
        assert httpx.get(f"{guarded.url}/memories", headers=headers).status_code == 401


def test_commands_on_the_same_store_find_the_token(guarded: Server, tmp_path: Path) -> None:
    command = ("memory", "activate", "grocery@all", "--url", guarded.url)
    assert "grocery@all is being served" in reco(*command, "--store", str(guarded.store)).stdout
    assert "grocery@all is being served" in reco(*command, RECO_ADMIN_KEY=str(read_token(guarded.store))).stdout
    line = one_line(reco(*command, "--store", str(tmp_path)), 1)
    assert "refused (401)" in line
    assert "token printed at the start" in line


@contextmanager
def recording_proxy() -> Iterator[tuple[str, list[bytes]]]:
    """The address of a server that takes every request for a failure, and what was sent to it."""
    seen: list[bytes] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.recv(65536))
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}", seen
        proxy.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_of_the_environment_never_sees_the_token(
    guarded: Server, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://{host}:{httpx.URL(guarded.url).port}"
    with recording_proxy() as (proxy, seen):
        environ = {"HTTP_PROXY": proxy, "http_proxy": proxy, "ALL_PROXY": proxy, "NO_PROXY": "", "no_proxy": ""}
        done = reco("memory", "activate", "grocery@all", "--url", url, "--store", str(guarded.store), **environ)
        assert done.returncode == 0, done.stderr
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with RecoClient(url, api_key=read_token(guarded.store)) as client:
            assert [row["name"] for row in client.memories()] == ["grocery"]
        assert seen == []
        # an address elsewhere is reached as the environment says, without the token of this store
        elsewhere = ("memory", "activate", "grocery@all", "--url", "http://192.0.2.1:8000")
        line = one_line(reco(*elsewhere, "--store", str(guarded.store), **environ), 1)
        assert "answered 502 without " in line
        assert seen
        assert b"authorization" not in seen[0].lower()


def test_the_token_is_printed_once_as_a_link_and_never_logged(guarded: Server) -> None:
    token = str(read_token(guarded.store))
    links = [line for line in guarded.lines if token in line]
    assert links == [f"  page with the admin token of this store: {guarded.url}/#token={token}"]


def test_every_change_and_every_refused_key_has_an_audit_line(guarded: Server) -> None:
    def lines() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in list(guarded.lines) if line.startswith("{")]
        return [line for line in found if line["logger"] == "reco.audit"]

    before = len(lines())
    token, trace = bearer(read_token(guarded.store)), {"x-request-id": "audited"}
    with httpx.Client(base_url=guarded.url, timeout=60, headers=trace) as client:
        client.post(ACTIVATE, json=SWAP)
        client.post(ACTIVATE, json=SWAP, headers=bearer("wrong-secret"))
        client.post(ACTIVATE, json=SWAP, headers=bearer("editor-secret"))
        client.delete("/label-sets/no%0Ane", headers=bearer("editor-secret"))
        client.get("/memories", headers=token)
        job = client.post(ACTIVATE, json={"version": "fruit-and-vegetables"}, headers=token).json()
        while client.get(f"/jobs/{job['id']}", headers=token).json()["state"] == "running":
            time.sleep(0.05)
        give_up = time.monotonic() + 10
        while len(lines()) < before + 6 and time.monotonic() < give_up:
            time.sleep(0.05)
        audited = lines()[before:]
        client.post(ACTIVATE, json={"version": "all"}, headers=token)
    route = "POST /memories/{name}/activate"
    assert [(line["who"], line["what"], line["outcome"]) for line in audited] == [
        ("nobody", "refused", "missing_key"),
        ("nobody", "refused", "missing_key"),
        ("editor", "refused", "wrong_key"),
        ("editor", "admin", "422"),
        ("token", "admin", "202"),
        ("token", "swap", "done"),
    ]
    assert {line["request_id"] for line in audited} == {"audited"}
    assert [line["route"] for line in audited[:5]] == [*[route] * 3, "DELETE /label-sets/{name}", route]
    accepted, swapped = audited[4:]
    assert accepted["name"] == swapped["memory"] == "grocery"
    assert (accepted["job"], swapped["job"]) == (job["id"], job["id"])
    assert (swapped["from"], swapped["to"]) == ("all", "fruit-and-vegetables")
    assert swapped["seconds"] > 0
    assert not any("-secret" in line for line in guarded.lines)


def test_a_page_of_another_site_reads_nothing_by_a_name_of_its_own(server: Server) -> None:
    """DNS rebinding of a keyless service: the browser sends the site's name in Host."""
    routes = ("/", "/page/page.js", "/docs", "/openapi.json", "/info", "/metrics", "/livez", "/label-sets", "/nothing")
    with httpx.Client(base_url=server.url) as client:
        for host in ("evil.example", f"evil.example:{httpx.URL(server.url).port}", "127.0.0.1.evil.example"):
            for route in routes:
                assert refused(client.get(route, headers={"host": host})) == (403, "wrong_host"), route
            assert refused(client.post("/embed/text", json=TEXT, headers={"host": host}))[0] == 403
        for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
            assert client.get("/label-sets", headers={"host": host}).status_code == 200


def test_loopback_alone_is_no_administrator(server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        assert refused(client.get("/memories")) == (401, "missing_key")
        assert refused(client.post(ACTIVATE, json=SWAP)) == (401, "missing_key")
        assert client.post("/embed/text", json=TEXT, headers=bearer("whatever an OpenAI client sends")).is_success
    with server.client() as client:
        assert client.get("/memories").status_code == 200


def test_security_headers_are_on_every_reply(server: Server) -> None:
    routes = ("/", "/page/page.js", "/page/nothing", "/docs", "/redoc", "/openapi.json", "/info", "/metrics", "/livez")
    with httpx.Client(base_url=server.url) as client:
        replies = [client.get(route) for route in (*routes, "/nothing", "/memories", "/label-sets")]
        replies += [client.post("/embed/text", content=b"{"), client.get("/", headers={"host": "evil.example"})]
        for reply in replies:
            assert reply.headers["x-content-type-options"] == "nosniff", reply.url
            assert reply.headers["referrer-policy"] == "no-referrer"
            (policy,) = reply.headers.get_list("content-security-policy")
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
        assert "script-src 'self';" in client.get("/").headers["content-security-policy"]
        reference = client.get("/docs").headers["content-security-policy"]
        assert "script-src" not in reference
        assert "://" not in reference


def test_a_socket_file_of_a_dead_service_is_replaced_and_others_stay(tmp_path: Path) -> None:
    from service.server.server import bind_unix
    from service.settings import UsageError

    path = tmp_path / "reco.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with bind_unix(path):
        with pytest.raises(UsageError, match="--unix-socket"), bind_unix(path):
            pass
        assert path.is_socket()
    assert not path.exists()
    with bind_unix(path), socket.socket(socket.AF_UNIX) as successor:
        path.unlink()
        successor.bind(str(path))
    assert path.is_socket()  # it is the successor's
    path.unlink()
    path.write_text("a file of the user's")
    with pytest.raises(UsageError), bind_unix(path):
        pass
    assert path.read_text() == "a file of the user's"
    assert os.umask(os.umask(0o022)) != 0o177
