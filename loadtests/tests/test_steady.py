"""Latency is felt from the scheduled moment; failures are counted, not raised."""

import asyncio
import statistics
from itertools import pairwise

import pytest

from loadtests.steady import TimedRequest, prepare, schedule, send_on_schedule, show, summarise
from loadtests.support.calls import open_client
from loadtests.tests.conftest import Scripted, Stall

PHOTOS = [b"one", b"two"]


def run(url: str, moments: list[float], mix: str = "embed/image") -> list[TimedRequest]:
    async def go() -> list[TimedRequest]:
        calls, weights = prepare(PHOTOS, mix)
        async with open_client(url) as client:
            return await send_on_schedule(client, calls, weights, moments, seed=0)

    return asyncio.run(go())


def test_constant_arrivals_are_a_metronome() -> None:
    assert schedule(4, 1, "constant", 0) == [0, 0.25, 0.5, 0.75]


def test_poisson_arrivals_reach_the_rate_and_repeat_with_their_seed() -> None:
    moments = schedule(100, 100, "poisson", 1)
    gaps = [b - a for a, b in pairwise(moments)]
    assert len(moments) == pytest.approx(10_000, rel=0.05)
    # an exponential's deviation is its mean
    assert statistics.stdev(gaps) == pytest.approx(0.01, rel=0.1)
    assert moments == schedule(100, 100, "poisson", 1)


def test_a_stall_is_felt_by_every_request_due_in_it(scripted: Scripted) -> None:
    scripted.handle = Stall(0.2, 0.8)
    samples = run(scripted.url, [i * 0.02 for i in range(60)])
    stalled = [s for s in samples if 0.25 < s.due < 0.75]
    assert len(stalled) >= 24
    for sample in stalled:
        assert sample.done - sample.due >= 0.8 - sample.due - 0.1
    latency = summarise(samples, 0)["all"]["latency_ms"]
    assert (
        latency["p95"] > 400
    )  # a closed loop would have sent one request into the stall and reported a p95 of a few ms


def test_failures_are_counted_by_status(scripted: Scripted) -> None:
    answers = iter([200, 429, 200, 503])
    scripted.handle = lambda method, path, body: (next(answers), {}, {})
    of = summarise(run(scripted.url, [0, 0.05, 0.1, 0.15]), 0)["embed/image"]
    assert (of["sent"], of["ok"], of["failed"]) == (4, 2, {"429": 1, "503": 1})


def test_a_service_that_is_gone_is_a_failure_not_a_traceback(nowhere: str) -> None:
    of = summarise(run(nowhere, [0.0, 0.01]), 0)["all"]
    assert (of["ok"], of["failed"], of["latency_ms"]) == (0, {"0": 2}, {})


def test_warm_up_does_not_count() -> None:
    samples = [TimedRequest("embed/image", due, due, due + 1, 200, {}) for due in (0.0, 1.0, 2.0, 3.0)]
    assert summarise(samples, 2)["all"]["sent"] == 2


def test_routes_and_stages_are_reported_apart(scripted: Scripted) -> None:
    scripted.handle = Stall(0, 0)
    summary = summarise(run(scripted.url, [0.0] * 30, "embed/image=1,embed/text=1,classify=1"), 0)
    assert set(summary) == {"all", "embed/image", "embed/text", "classify"}
    assert summary["all"]["stages_ms"]["encode"]["p50"] == 20.0
    assert show(summary).splitlines()[0].split()[:4] == ["route", "sent", "ok", "failed"]


def test_the_mix_is_weighted_by_route_and_refuses_unknown_ones() -> None:
    calls, weights = prepare(PHOTOS, "embed/image=3,embed/text=1")
    share = sum(w for c, w in zip(calls, weights, strict=True) if c.route == "embed/image") / sum(weights)
    assert share == pytest.approx(0.75)
    with pytest.raises(SystemExit, match="embed/sound"):
        prepare(PHOTOS, "embed/sound=1")
