"""Swaps of a memory under load: no request may fail, no reply may mix two versions."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from loadtests.support.calls import Unexpected, open_client, run_to_end
from loadtests.support.gauges import Gauges, growth, read_gauges
from loadtests.support.known import CheckedReply, distinguishing_calls, learn, prepare, send_in_closed_loop
from loadtests.support.photos import crops, read_photos
from loadtests.support.picture import draw_swap
from loadtests.support.report import Goal, compare_to_targets, environment, format_verdicts, quantiles, table, write

SLOWER = 1.5  # p99 of replies that a swap touched, against the others
PUBLISH_MS = 1.0  # the phase in which the old snapshot is replaced by the new one
SETTLE_S = 10.0
TELLING_SWAPS = 100  # fewer say nothing about growth
GROWTH = 0.03  # of the resident memory, from the first fifth of the swaps to the last


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation, from its request to the end of its job.

    phases: seconds per phase, as the job reports them.  held: gauges afterwards.
    """

    version: str
    start: float
    end: float
    phases: Mapping[str, float]
    held: Gauges


class Admin:
    """The admin routes of one memory: activate a version and wait for its job."""

    def __init__(self, client: httpx.AsyncClient, memory: str, key: str | None) -> None:
        self._client = client
        self._memory = memory
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def activate(self, version: str, timeout_s: float = 120.0) -> Activation:
        """Activate a version and wait until it serves. Unexpected where the activation is refused
        or fails.
        """
        start = time.perf_counter()
        asked = await self._client.post(
            f"/memories/{self._memory}/activate", json={"version": version}, headers=self._headers
        )
        if asked.status_code != 202:
            raise Unexpected(f"activate {self._memory}@{version}: {asked.status_code} {asked.text}")
        while time.perf_counter() - start < timeout_s:
            job = (
                (await self._client.get(f"/jobs/{asked.json()['id']}", headers=self._headers)).raise_for_status().json()
            )
            if job["state"] == "done":
                return Activation(version, start, time.perf_counter(), job.get("seconds", {}), await self.read_gauges())
            if job["state"] == "failed":
                raise Unexpected(f"activate {self._memory}@{version}: {job}")
            await asyncio.sleep(0.02)
        raise Unexpected(f"activate {self._memory}@{version}: not done after {timeout_s:.0f} s")

    async def read_gauges(self) -> Gauges:
        """Gauges of this memory."""
        return await read_gauges(self._client, self._memory)

    async def wait_for_one_snapshot(self) -> float:
        """Number of live snapshots, once it has fallen to one or after SETTLE_S seconds."""
        until = time.perf_counter() + SETTLE_S
        now = await self.read_gauges()
        while now.alive > 1 and time.perf_counter() < until:
            await asyncio.sleep(0.1)
            now = await self.read_gauges()
        return now.alive


async def alternate_versions(
    admin: Admin, versions: Sequence[str], swaps: int, pause: float, calm: float
) -> list[Activation]:
    """Activate the versions in turn, with `calm` seconds without swaps before and after."""
    await asyncio.sleep(calm)
    done = []
    for number in range(swaps):
        await asyncio.sleep(pause if number else 0)
        done.append(await admin.activate(versions[number % 2]))
    await asyncio.sleep(calm)
    return done


def _admin_key() -> str | None:
    """The operator's key, else the token that a service on this machine keeps in its store."""
    token = Path(os.environ.get("RECO_STORE", "var/store")) / ".admin-token"
    return os.environ.get("RECO_ADMIN_KEY") or (token.read_text().strip() if token.is_file() else None)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole test; returns the report."""
    photos = read_photos(arguments.image, limit=16) if arguments.image else [photo for _, photo in crops(16)]
    calls = prepare(photos, arguments.memory)
    async with open_client(arguments.url) as client:
        admin = Admin(client, arguments.memory, arguments.admin_key or _admin_key())
        learned: dict[str, list[np.ndarray]] = {}
        for version in arguments.versions:
            await admin.activate(version)
            learned[f"{arguments.memory}@{version}"] = await learn(client, calls, f"{arguments.memory}@{version}")
        known = distinguishing_calls(calls, learned, arguments.apart)
        stop = asyncio.Event()
        load = asyncio.create_task(send_in_closed_loop(client, known, arguments.apart, arguments.workers, stop))
        try:
            swaps = await alternate_versions(
                admin, arguments.versions, arguments.swaps, arguments.pause, arguments.calm
            )
        finally:
            stop.set()
            answers = await load
        alive = await admin.wait_for_one_snapshot()
    settings = {
        name: getattr(arguments, name) for name in ("url", "memory", "versions", "workers", "pause", "calm", "apart")
    }
    return {
        "settings": settings,
        "calls": len(calls),
        "telling": len(known),
        **judge(answers, swaps),
        "snapshots_alive": alive,
    }


def judge(answers: Sequence[CheckedReply], swaps: Sequence[Activation]) -> dict[str, Any]:
    """Faults, latency of replies during swaps and outside, and live snapshots at the end."""
    when = [_is_touched(answer, swaps) for answer in answers]
    spans = ("in swap windows", "steady")
    faults = [a.fault for a in answers if a.fault]
    phases = dict.fromkeys(phase for swap in swaps for phase in swap.phases)
    return {
        "swaps": len(swaps),
        "replies": len(answers),
        "failed": sum(not text.startswith("mixed") for text in faults),
        "mixed": sum(text.startswith("mixed") for text in faults),
        "first_faults": faults[:5],
        "replies_by_version": dict(sorted(Counter(a.memory for a in answers).items())),
        "swap_ms": quantiles([s.end - s.start for s in swaps]),
        "phases_ms": {phase: quantiles([s.phases[phase] for s in swaps if phase in s.phases]) for phase in phases},
        "resident": growth([s.held.resident for s in swaps]),
        "resident_mb": [round(s.held.resident / 1e6, 1) for s in swaps],
        "replies_in": {name: when.count(name) for name in spans},
        "latency_ms": {
            name: quantiles([a.end - a.start for a, span in zip(answers, when, strict=True) if span == name])
            for name in spans
        },
    }


def _is_touched(answer: CheckedReply, swaps: Sequence[Activation]) -> str:
    if any(answer.start < swap.end and swap.start < answer.end for swap in swaps):
        return "in swap windows"
    return "steady" if answer.end <= swaps[0].start or answer.start >= swaps[-1].end else "between"


def verdicts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each figure beside its target. Latencies have no target here, since they also depend on other
    load of the machine.
    """
    goals: list[Goal] = [
        ("failed replies", report["failed"], "<=", 0),
        ("mixed replies", report["mixed"], "<=", 0),
        ("live snapshots at the end", report["snapshots_alive"], "<=", 1),
        ("growth of resident memory", report["resident"]["growth"], "<=", GROWTH),
    ]
    touched, steady = (report["latency_ms"][span].get("p99") for span in ("in swap windows", "steady"))
    if touched and steady:
        goals.append(("p99 in swap windows / steady", round(touched / steady, 3), "<=", SLOWER))
    if publish := report["phases_ms"].get("publish"):
        goals.append(("publish, ms (p99)", publish["p99"], "<=", PUBLISH_MS))
    return compare_to_targets(goals)


def show(report: dict[str, Any]) -> str:
    """The results as tables, and the first faults."""
    rows: list[list[object]] = [["", "replies", "p50 ms", "p95 ms", "p99 ms", "max ms"]]
    for name, latency in report["latency_ms"].items():
        rows.append([name, report["replies_in"][name], *(latency.get(q, "-") for q in ("p50", "p95", "p99", "max"))])
    head = f"{report['swaps']} swaps, {report['replies']} replies: {report['failed']} failed, {report['mixed']} mixed"
    return "\n".join([table(rows), format_verdicts(verdicts(report)), head, *report["first_faults"]])


def main() -> int:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.swap", description="Swaps under closed-loop load: no reply may fail or mix."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--memory", required=True, help="the memory to swap")
    parser.add_argument("--versions", nargs=2, required=True, metavar=("A", "B"))
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two swaps")
    parser.add_argument(
        "--calm",
        type=float,
        default=15.0,
        help="seconds of load before the first swap and after the last, for comparison",
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--apart", type=float, default=1e-3, help="least difference between the versions' answers")
    parser.add_argument("--admin-key", help="default: RECO_ADMIN_KEY, else the admin token of the store in RECO_STORE")
    parser.add_argument("--image", type=Path, nargs="+", help="photos to send (default: crops of scikit-image's)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/swap.json"))
    arguments = parser.parse_args()
    report = run_to_end(run(arguments))
    print(show(report))
    write(arguments.out, {**environment(), **report, "targets": verdicts(report)})
    draw_swap(report, arguments.out.with_suffix(".png"))
    if len(report["replies_by_version"]) < 2 or not report["replies_in"]["in swap windows"]:
        print("no reply in a swap window, or of one version only: nothing is shown; use more --workers or --swaps")
        return 1
    grown = report["swaps"] >= TELLING_SWAPS and report["resident"]["growth"] > GROWTH
    return 1 if report["failed"] or report["mixed"] or report["snapshots_alive"] > 1 or grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
