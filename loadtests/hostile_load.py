"""Honest callers beside hostile ones, with swaps and edits (`make soak`): their replies must
stay correct and their p99 below twice the baseline.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtests.soak import watch
from loadtests.support.calls import Unexpected, open_client, run_to_end
from loadtests.support.gauges import growth
from loadtests.support.hostile import HostileLoad, hostile_calls
from loadtests.support.known import CheckedReply, KnownCall, distinguishing_calls, learn, prepare, send_in_closed_loop
from loadtests.support.photos import crops
from loadtests.support.picture import draw_hostile_load
from loadtests.support.report import (
    ROOT,
    Goal,
    compare_to_targets,
    environment,
    format_verdicts,
    quantiles,
    table,
    write,
)
from loadtests.support.serving import service
from loadtests.swap import Admin, alternate_versions

MEMORY, VERSIONS, EDITED = "grocery", ("fruit-and-vegetables", "all"), "edited"
HOSTILE_SHARE = 0.1
SWAP_EVERY_S, EDIT_EVERY_S, READ_EVERY_S = 30.0, 1.0, 5.0
MIN_DIFFERENCE = 1e-3  # between the vectors of two versions
MAX_P99_RATIO, MAX_GROWTH = 2.0, 0.03
ADMIN_KEY = "load-test-admin-key"


async def edit_until_cancelled(client: httpx.AsyncClient, photo: bytes, edits: list[int]) -> None:
    """Add and remove one pair in turn; status codes are appended to `edits`."""
    headers, image = {"Authorization": f"Bearer {ADMIN_KEY}"}, base64.b64encode(photo).decode()
    while True:
        pair = {"id": f"edit-{len(edits)}", "caption": "a photo of a thing", "image": image}
        put = await client.post(f"/memories/{EDITED}/pairs", json={"pairs": [pair]}, headers=headers)
        gone = await client.delete(f"/memories/{EDITED}/pairs/{pair['id']}", headers=headers)
        edits += [put.status_code, gone.status_code]
        await asyncio.sleep(EDIT_EVERY_S)


async def run(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load without hostile callers, then with them; return the report."""
    photos = [photo for _, photo in crops(16)]
    async with open_client(url) as client, open_client(url) as hostile_client:
        admin = Admin(client, MEMORY, ADMIN_KEY)
        known = await _learn_answers(client, admin, photos)
        baseline = await _send_for(client, known, arguments.workers, 60 * arguments.baseline)
        rate = HOSTILE_SHARE / (1 - HOSTILE_SHARE) * len(baseline) / (60 * arguments.baseline)
        rng = random.Random(0)
        hostile_load, edits = HostileLoad(hostile_client, hostile_calls(photos[0], rng), rng, rate), list[int]()
        reading = asyncio.create_task(watch(client, READ_EVERY_S))
        beside = [
            asyncio.create_task(hostile_load.run()),
            asyncio.create_task(edit_until_cancelled(client, photos[0], edits)),
        ]
        swaps = max(2, int(60 * arguments.minutes / SWAP_EVERY_S))
        swapping = asyncio.create_task(alternate_versions(admin, VERSIONS, swaps, SWAP_EVERY_S, 0.0))
        answers = await _send_for(client, known, arguments.workers, 60 * arguments.minutes)
        for task in (*beside, swapping, reading):
            task.cancel()
        readings = await reading
        failures = await asyncio.gather(*beside, swapping, return_exceptions=True)
        for failure in failures:
            if isinstance(failure, Exception):
                raise failure
    return {
        "settings": {"minutes": arguments.minutes, "baseline": arguments.baseline, "workers": arguments.workers},
        "hostile_per_s": round(rate, 2),
        "hostile_codes": {str(code): count for code, count in sorted(hostile_load.codes.items())},
        "edits": {str(code): edits.count(code) for code in sorted({*edits})},
        "replies": len(answers),
        "faults": len([answer for answer in answers if answer.fault]),
        "first_faults": [answer.fault for answer in answers if answer.fault][:5],
        "latency_ms": {
            name: _latency(these) for name, these in (("baseline", baseline), ("with hostile callers", answers))
        },
        "resident": growth([held.resident for _, held in readings]),
        "readings": [{"s": round(at, 1), "resident_mb": round(held.resident / 1e6, 1)} for at, held in readings],
    }


async def _learn_answers(client: httpx.AsyncClient, admin: Admin, photos: Sequence[bytes]) -> list[KnownCall]:
    """Record the right answer of each call under each version."""
    calls, learned = prepare(photos, MEMORY), {}
    for version in VERSIONS:
        await admin.activate(version)
        learned[f"{MEMORY}@{version}"] = await learn(client, calls, f"{MEMORY}@{version}")
    return distinguishing_calls(calls, learned, MIN_DIFFERENCE)


async def _send_for(
    client: httpx.AsyncClient, known: Sequence[KnownCall], workers: int, seconds: float
) -> list[CheckedReply]:
    stop = asyncio.Event()
    load = asyncio.create_task(send_in_closed_loop(client, known, MIN_DIFFERENCE, workers, stop))
    await asyncio.sleep(seconds)
    stop.set()
    return await load


def _latency(answers: Sequence[CheckedReply]) -> dict[str, float]:
    return quantiles([answer.end - answer.start for answer in answers])


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure beside its target."""
    baseline, hostile = (report["latency_ms"][name]["p99"] for name in ("baseline", "with hostile callers"))
    goals: list[Goal] = [
        ("honest replies that were wrong or refused", report["faults"], "<=", 0),
        ("p99 with hostile callers / baseline", round(hostile / baseline, 3), "<=", MAX_P99_RATIO),
        ("growth of resident memory", report["resident"]["growth"], "<=", MAX_GROWTH),
        ("edits that failed", sum(count for code, count in report["edits"].items() if code != "200"), "<=", 0),
    ]
    return compare_to_targets(goals)


def show(report: dict[str, Any]) -> str:
    """The results as tables, and the first faults."""
    rows: list[list[object]] = [["", "p50 ms", "p95 ms", "p99 ms", "max ms"]]
    rows += [[name, *(found[q] for q in ("p50", "p95", "p99", "max"))] for name, found in report["latency_ms"].items()]
    head = f"{report['replies']} honest replies; hostile: {report['hostile_codes']}; edits: {report['edits']}"
    return "\n".join([table(rows), format_verdicts(verdicts(report)), head, *report["first_faults"]])


def _import_edited(environ: dict[str, str]) -> None:
    """A second memory with the pairs of the first, for the edits."""
    command = [sys.executable, "-m", "service.cli.main", "memory", "import", EDITED]
    command += [f"{environ['RECO_STORE']}/{MEMORY}/{VERSIONS[1]}", "--activate"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unexpected(f"{' '.join(command)}: {done.stderr}")


def main() -> int:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.hostile_load", description="Honest callers beside hostile ones."
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="with hostile callers")
    parser.add_argument("--baseline", type=float, default=2.0, help="minutes before it, for comparison")
    parser.add_argument("--workers", type=int, default=4, help="honest callers, each in a closed loop")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/hostile_load.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "RECO_STORE": f"{folder}/store",
            "RECO_ADMIN_KEY": ADMIN_KEY,
            "RECO_SEND_S": "5",
            "RECO_LOG_FORMAT": "json",
        }
        environ = {**{name: value for name, value in os.environ.items() if not name.startswith("RECO_")}, **own}
        with service(environ, Path(folder) / "first.log"):
            pass  # installs the starter's memory
        begun = time.perf_counter()
        _import_edited(environ)
        with service(environ, Path(folder) / "log") as served:
            report = run_to_end(run(served.url, arguments))
        print(show(report), f"\n{time.perf_counter() - begun:.0f} s")
    write(arguments.out, {**environment(), **report, "targets": verdicts(report)})
    draw_hostile_load(report, arguments.out.with_suffix(".png"))
    return 0 if all(row["reached"] for row in verdicts(report)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
