"""A scripted service that mixes, fails or behaves: the verdict must follow."""

import argparse
import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests import swap
from loadtests.support.calls import PreparedCall, TimedReply, Unexpected
from loadtests.support.gauges import Gauges, growth
from loadtests.support.known import CheckedReply, KnownCall, distinguishing_calls, find_fault
from loadtests.tests.conftest import Scripted

ROWS = {"m@a": np.array([[1.0, 0.0]], np.float32), "m@b": np.array([[0.6, 0.8]], np.float32)}
KNOWN = KnownCall(PreparedCall("embed/image", "/embed/image", b"", "image/jpeg"), ROWS)


def reply(named: str, rows: list[list[float]], header: str | None = None, status: int = 200) -> TimedReply:
    body = {"memory": named, "data": [{"embedding": row} for row in rows]}
    return TimedReply(status, json.dumps(body).encode(), {"x-memory-version": header or named})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (reply("m@a", [[1.0, 0.0]]), ""),
        (reply("m@b", [[0.6004, 0.7997]]), ""),
        (reply("m@a", [[0.6, 0.8]]), "mixed: the reply names m@a, row 0"),
        (reply("m@a", [[0.8, 0.4]]), "mixed: the reply names m@a, row 0"),
        (reply("m@a", [[1.0, 0.0]], header="m@b"), "mixed: the body names m@a, the header m@b"),
        (reply("m@c", [[1.0, 0.0]]), "mixed: the body names m@c"),
        (TimedReply(503, b"draining"), "status 503: draining"),
        (TimedReply(0, b"ReadError: "), "status 0: ReadError: "),
    ],
)
def test_a_reply_is_whole_or_its_fault_is_named(answer: TimedReply, expected: str) -> None:
    assert find_fault(answer, KNOWN, 0.01).startswith(expected)
    assert bool(find_fault(answer, KNOWN, 0.01)) == bool(expected)


def test_calls_that_could_not_show_a_mix_are_left_out() -> None:
    same = np.ones((1, 2), np.float32)
    learned = {"m@a": [ROWS["m@a"], same], "m@b": [ROWS["m@b"], same]}
    assert [known.call for known in distinguishing_calls([KNOWN.call, KNOWN.call], learned, 0.1)] == [KNOWN.call]
    with pytest.raises(Unexpected, match="no answer differs"):
        distinguishing_calls([KNOWN.call], {"m@a": [same], "m@b": [same]}, 0.1)


def test_what_lies_between_two_swaps_is_not_called_steady() -> None:
    """Only quick replies fit there: the slow ones reach into a swap."""
    swaps = [
        swap.Activation("a", 10.0, 12.0, {}, Gauges(1.0, 1.0)),
        swap.Activation("b", 13.0, 15.0, {}, Gauges(1.0, 1.0)),
    ]
    times = [(1.0, 2.0), (9.0, 10.5), (12.2, 12.3), (12.5, 14.0), (15.0, 18.0)]
    report = swap.judge([CheckedReply(start, end, "m@a", "") for start, end in times], swaps)
    assert report["replies_in"] == {"in swap windows": 2, "steady": 2}
    assert report["latency_ms"]["steady"]["max"] == 3000.0


class TwoVersions:
    """A service of two versions; `mixing` lets it name the new one while it still answers by the
    old.
    """

    def __init__(self, *, mixing: bool = False, failing: bool = False, leaking: bool = False) -> None:
        self._lock = threading.Lock()
        self._serving = self._named = "a"
        self._mixing, self._failing, self._leaking = mixing, failing, leaking
        self._activations = 0

    def __call__(self, method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        with self._lock:
            if path == "/metrics":
                return (
                    200,
                    f'process_resident_memory_bytes 1e9\nreco_snapshots_alive{{name="m"}} {1 + self._leaking * self._activations}\n',
                    {},
                )
            if path.endswith("/activate"):
                self._named = json.loads(body)["version"]
                self._activations += 1
                if not (self._mixing and self._activations > 2):
                    self._serving = self._named
                return 202, {"id": "1", "state": "running"}, {}
            if path.startswith("/jobs/"):
                return (
                    200,
                    {"id": "1", "state": "done", "phase": "done", "seconds": {"verify": 0.02, "publish": 0.0004}},
                    {},
                )
            if self._failing and self._activations > 2:
                return 503, {"error": {"message": "busy"}}, {}
            rows = body.count(b"image/jpeg") or (len(json.loads(body)["texts"]) if "text" in path else 1)
            data = [{"embedding": ROWS[f"m@{self._serving}"][0].tolist()}] * rows
            return 200, {"memory": f"m@{self._named}", "data": data}, {"X-Memory-Version": f"m@{self._named}"}


def run(server: Scripted) -> dict[str, Any]:
    chosen = {
        "url": server.url,
        "memory": "m",
        "versions": ["a", "b"],
        "workers": 4,
        "swaps": 4,
        "pause": 0.05,
        "calm": 0.1,
        "apart": 1e-3,
    }
    return asyncio.run(swap.run(argparse.Namespace(**chosen, image=None, admin_key=None)))


def test_a_clean_swap_passes(scripted: Scripted) -> None:
    scripted.handle = TwoVersions()
    report = run(scripted)
    assert (report["swaps"], report["failed"], report["mixed"]) == (4, 0, 0)
    assert set(report["replies_by_version"]) == {"m@a", "m@b"}
    assert report["replies_in"]["steady"] > 0
    assert "0 failed, 0 mixed" in swap.show(report)
    assert report["phases_ms"]["publish"]["p99"] == 0.4
    assert report["resident"] == {"first_mb": 1000.0, "last_mb": 1000.0, "most_mb": 1000.0, "growth": 0.0}


def test_a_service_that_names_one_version_and_answers_by_another_is_caught(scripted: Scripted) -> None:
    scripted.handle = TwoVersions(mixing=True)
    report = run(scripted)
    assert report["mixed"] > 0
    assert report["first_faults"][0].startswith("mixed: the reply names")


def test_failed_replies_are_caught(scripted: Scripted) -> None:
    scripted.handle = TwoVersions(failing=True)
    assert run(scripted)["failed"] > 0


def test_a_version_that_lives_on_is_caught(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "SETTLE_S", 0.3)
    scripted.handle = TwoVersions(leaking=True)
    report = run(scripted)
    assert report["snapshots_alive"] == 7  # two to learn, four swaps
    assert {"figure": "live snapshots at the end", "value": 7.0, "target": "<= 1", "reached": False} in swap.verdicts(
        report
    )


def test_growth_is_of_the_last_fifth_over_the_first() -> None:
    assert growth([100e6] * 4 + [102e6] * 12 + [104e6] * 4) == {
        "first_mb": 100.0,
        "last_mb": 104.0,
        "most_mb": 104.0,
        "growth": 0.04,
    }
    assert growth([100e6, 300e6, 100e6, 100e6, 100e6])["growth"] == 0  # one peak is no growth


def test_a_refused_activation_ends_the_run_in_one_line(scripted: Scripted) -> None:
    scripted.handle = lambda method, path, body: (401, {"error": {"message": "wrong key"}}, {})
    with pytest.raises(Unexpected, match="activate m@a: 401"):
        run(scripted)


@pytest.mark.parametrize(("mixing", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_is_the_verdict(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixing: bool, code: int
) -> None:
    scripted.handle = TwoVersions(mixing=mixing)
    out = tmp_path / "swap.json"
    options = [
        "--memory",
        "m",
        "--versions",
        "a",
        "b",
        "--swaps",
        "20",
        "--pause",
        "0.02",
        "--calm",
        "0.05",
        "--url",
        scripted.url,
        "--out",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", ["swap.py", *options])
    assert swap.main() == code
    report = json.loads(out.read_text())
    assert {"commit", "hardware", "versions", "command"} <= set(report)
    assert bool(report["mixed"]) is mixing


def test_no_service_is_one_line(nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--memory", "m", "--versions", "a", "b", "--url", nowhere, "--out", str(tmp_path / "swap.json")]
    monkeypatch.setattr("sys.argv", ["swap.py", *options])
    with pytest.raises(SystemExit, match="ConnectError"):
        swap.main()
