"""Every failure can be traced: its request id is in the reply, in the metrics and in one
log line.
"""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine import Engine
from service.tests.conftest import serving
from service.tests.inside import scenario

TEXTS = {"texts": ["a secret caption"], "enhance": False}


def count(metrics: str, code: str) -> float:
    """Requests that were counted with this status."""
    found = re.findall(rf'reco_requests_total{{code="{code}",[^}}]*}} (\S+)', metrics)
    return sum(map(float, found))


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_bug_in_a_route_has_an_id_a_count_and_one_line_with_its_stack(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> None:
        raise ZeroDivisionError("a bug in the code behind the route")

    async def work(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(engine, "embed", break_down)
        reply = await client.post("/embed/text", json={"texts": ["x"]}, headers={"x-request-id": "trace-me"})
        assert reply.status_code == 500
        assert reply.headers["x-request-id"] == "trace-me"
        assert reply.json()["error"]["code"] == "internal_error"
        metrics = (await client.get("/metrics")).text
        assert (count(metrics, "500"), count(metrics, "499")) == (1, 0)

    scenario(engine, work)
    (record,) = errors(caplog)
    assert (record.request_id, record.route) == ("trace-me", "/embed/text")  # type: ignore[attr-defined]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_a_bug_outside_the_guarded_routes_has_an_id_too(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down() -> None:
        raise ZeroDivisionError("a bug")

    async def work(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(engine, "info", break_down)
        reply = await client.get("/info")
        assert reply.status_code == 500
        assert reply.headers["x-request-id"] == errors(caplog)[0].request_id  # type: ignore[attr-defined]

    scenario(engine, work)
    assert len(errors(caplog)) == 1


def test_a_failure_in_the_model_is_logged_once_for_each_request(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory in a kernel")

    async def work(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(engine.reco.encoder, "encode", run_out)
        caplog.clear()
        for name in ("first", "second"):
            reply = await client.post("/embed/text", json=TEXTS, headers={"x-request-id": name})
            assert reply.status_code == 500, reply.text
            assert reply.headers["x-request-id"] == name
        body = {"texts": ["one", "two"], "on_error": "null", "enhance": False}
        reply = await client.post("/embed/text", json=body, headers={"x-request-id": "third"})
        assert reply.status_code == 200
        assert {item["error"]["code"] for item in reply.json()["data"]} == {"internal_error"}

    scenario(engine, work)
    logged = [record for record in errors(caplog) if hasattr(record, "route")]
    assert [record.request_id for record in logged] == ["first", "second", "third", "third"]  # type: ignore[attr-defined]
    for record in logged:
        assert record.exc_info is not None
        assert "out of memory in a kernel" in str(record.exc_info[1])


def test_a_worker_that_is_replaced_is_logged_with_the_stack_it_hangs_in(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_in_this_call(*_: object, **__: object) -> None:
        time.sleep(3)

    async def work(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(engine.reco.encoder, "encode", hang_in_this_call)
        caplog.clear()
        reply = await client.post("/embed/text", json=TEXTS, headers={"x-request-id": "hung"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "worker_lost")

    scenario(engine, work)
    replaced = [
        record for record in errors(caplog) if "replaced" in record.getMessage() and not hasattr(record, "route")
    ]
    assert len(replaced) == 1
    assert "hang_in_this_call" in replaced[0].getMessage()
    (refused,) = [record for record in caplog.records if getattr(record, "request_id", None) == "hung"]
    assert refused.route == "/embed/text"  # type: ignore[attr-defined]


def test_a_real_service_logs_json_lines_without_what_callers_sent(tmp_path: Path) -> None:
    """A folder in the place of a label set's file: a 503 with its id and route in one line."""
    environ = {"RECO_LOG_FORMAT": "json", "RECO_API_KEYS": "a-secret-key"}
    with (
        serving(tmp_path, **environ) as server,
        server.client(headers={"authorization": "Bearer a-secret-key"}) as client,
    ):
        (tmp_path / ".label-sets" / "broken.json").mkdir(parents=True)
        reply = client.get("/label-sets/broken", headers={"x-request-id": "on-call"})
        assert (reply.status_code, reply.headers["x-request-id"]) == (503, "on-call")
        assert client.post("/embed/text?k=3", json={"texts": ["a secret caption"]}).status_code == 200
        assert client.get("/livez").status_code == 200
        lines = wait_for(server.lines, '"/embed/text"')
    records = [json.loads(line) for line in lines if line.startswith("{")]
    (failure,) = [record for record in records if record["level"] == "WARNING" and "route" in record]
    assert (failure["request_id"], failure["route"]) == ("on-call", "/label-sets/{name}")
    assert failure["status"] == 503
    assert "label set 'broken' cannot be read (IsADirectoryError)" in failure["message"]
    access = [record for record in records if record["logger"] == "reco.access"]
    assert [(record["route"], record["status"]) for record in access] == [
        ("/label-sets/{name}", 503),
        ("/embed/text", 200),
    ]
    assert 0 < access[1]["seconds"] < 60
    assert not any("secret" in line for line in lines)


def test_access_lines_can_be_left_out(tmp_path: Path) -> None:
    with serving(tmp_path, RECO_ACCESS_LOG="false") as server, server.client() as client:
        assert client.post("/embed/text", json={"texts": ["x"]}).status_code == 200
        (tmp_path / ".label-sets" / "broken.json").mkdir(parents=True)
        assert client.get("/label-sets/broken", headers={"x-request-id": "on-call"}).status_code == 503
        lines = wait_for(server.lines, "on-call")
    assert not any("/embed/text 200" in line for line in lines)
    assert sum("on-call" in line for line in lines) == 1


def wait_for(lines: list[str], wanted: str) -> list[str]:
    """The lines printed so far, once one of them holds `wanted`."""
    give_up = time.monotonic() + 20
    while not any(wanted in line for line in lines):
        assert time.monotonic() < give_up, "\n".join(lines)
        time.sleep(0.02)
    return list(lines)


def test_head_is_answered_as_get_without_a_body(engine: Engine) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for path in ("/readyz", "/livez", "/", "/info"):
            reply, whole = await client.head(path), await client.get(path)
            assert (reply.status_code, reply.headers["content-type"]) == (200, whole.headers["content-type"]), path

    scenario(engine, work)


def test_the_log_formats_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    from service.observability.logging import configure_logging

    before = logging.getLogger().handlers[:], logging.getLogger().level
    shown: dict[str, Any] = {}
    try:
        for kind in ("text", "json"):
            configure_logging(kind, verbose=False, access_log=True)
            logging.getLogger("reco").warning("memory %s is not served", "shop")
            shown[kind] = capsys.readouterr().err
    finally:
        logging.getLogger().handlers[:], _ = before
        logging.getLogger().setLevel(before[1])
        logging.getLogger("reco").setLevel(logging.NOTSET)
        logging.getLogger("reco.access").setLevel(logging.NOTSET)
    assert re.fullmatch(r"\S+ \S+ WARNING memory shop is not served\n", shown["text"])
    record = json.loads(shown["json"])
    assert (record["level"], record["logger"], record["message"]) == ("WARNING", "reco", "memory shop is not served")
