"""Ramp and soak against a service of known capacity, growth and speed."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from loadtests import ramp, soak
from loadtests.steady import TimedRequest
from loadtests.tests.conftest import Scripted


class Slow:
    """One request at a time, so many seconds each; resident memory grows with every reading of the
    metrics.
    """

    def __init__(self, seconds: float, growth: float = 0.0) -> None:
        self._seconds, self._growth = seconds, growth
        self._turn, self._resident = threading.Lock(), 1e9

    def __call__(self, method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        if path == "/metrics":
            self._resident *= 1 + self._growth
            lines = [
                "# TYPE process_resident_memory_bytes gauge",
                f"process_resident_memory_bytes {self._resident}",
                "",
            ]
            return 200, "\n".join(lines), {"Content-Type": "text/plain; version=0.0.4"}
        if method == "POST":
            with self._turn:
                time.sleep(self._seconds)
        return 200, {}, {}


def program(
    module: Any, url: str, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[int, dict[str, Any]]:
    arguments = [
        "--url",
        url,
        "--out",
        str(out),
        "--mix",
        "embed/text=1",
        "--arrivals",
        "constant",
        "--warmup",
        "0.1",
        *options,
    ]
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *arguments])
    code: int = module.main()
    assert out.with_suffix(".png").stat().st_size > 1000
    return code, json.loads(out.read_text())


def test_the_knee_is_the_last_rate_that_one_at_a_time_can_bear(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.handle = Slow(0.02)  # 50 a second
    code, report = program(
        ramp,
        scripted.url,
        tmp_path / "r.json",
        monkeypatch,
        "--start",
        "10",
        "--factor",
        "2",
        "--seconds",
        "1.5",
        "--slower",
        "8",
    )
    assert code == 0
    rates, borne = ([step[name] for step in report["steps"]] for name in ("rate", "borne"))
    # which rate below 50 is the last depends on what else the machine does
    assert rates == [10, 20, 40, 80][: len(rates)]
    assert borne == [True] * (len(rates) - 1) + [False]
    assert report["knee_per_s"] == rates[-2]


@pytest.mark.parametrize(
    ("ok", "answered", "p95", "borne"),
    [(20, 9.5, 30, True), (19, 9.5, 30, False), (20, 8.9, 30, False), (20, 9.5, 31, False)],
)
def test_a_rate_is_borne_where_all_are_answered_in_time(ok: int, answered: float, p95: float, borne: bool) -> None:
    step = {"rate": 10, "sent": 20, "ok": ok, "answered_per_s": answered, "latency_ms": {"p95": p95}}
    assert ramp.keeps_up(step, {"latency_ms": {"p95": 10.0}}, slower=3) is borne


@pytest.mark.parametrize(("growth", "code"), [(0.0, 0), (0.02, 1)])
def test_a_soak_tells_of_memory_that_grows(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growth: float, code: int
) -> None:
    scripted.handle = Slow(0.001, growth)
    monkeypatch.setattr(soak, "SLOWER", 1000.0)  # a thousandth of a second has no steady p99
    told, report = program(
        soak, scripted.url, tmp_path / "s.json", monkeypatch, "--rate", "20", "--minutes", "0.02", "--every", "0.1"
    )
    assert told == code
    assert (report["resident"]["growth"] > 0.03) is bool(code)
    assert len(report["readings"]) >= 8


def test_fifths_are_of_the_time_after_the_warm_up() -> None:
    samples = [TimedRequest("embed/text", due, due, due + (1 if due < 8 else 3), 200, {}) for due in range(2, 12)]
    assert [fifth["p50"] for fifth in soak.quantiles_of_fifths(samples, warmup=2)] == [1000, 1000, 1000, 3000, 3000]


def test_no_service_is_one_line(nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ramp, soak):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", "--url", nowhere, "--out", str(tmp_path / "x.json")])
        with pytest.raises(SystemExit, match="ConnectError"):
            module.main()
