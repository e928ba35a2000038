"""Open-loop load at increasing rates until the service no longer keeps up."""

from __future__ import annotations

import argparse
from typing import Any

from loadtests.steady import add_load, photos_of, prepare, schedule, send_on_schedule, summarise
from loadtests.support.calls import open_client, run_to_end
from loadtests.support.picture import draw_ramp
from loadtests.support.report import environment, table, write

KEPT_UP = 0.9  # of what was due must be answered meanwhile


async def measure_rates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per rate; at the last rate the service did not keep up."""
    calls, weights = prepare(photos_of(arguments), arguments.mix)
    steps: list[dict[str, Any]] = []
    rate, seed = arguments.start, arguments.seed
    async with open_client(arguments.url, timeout_s=arguments.timeout) as client:
        # a service that is not there ends the program here
        (await client.get("/info")).raise_for_status()
        await send_on_schedule(client, calls, weights, schedule(rate, arguments.warmup, arguments.arrivals, seed), seed)
        while rate <= arguments.most:
            seed += 1
            of = summarise(
                await send_on_schedule(
                    client, calls, weights, schedule(rate, arguments.seconds, arguments.arrivals, seed), seed
                ),
                0.0,
            )["all"]
            steps.append({"rate": round(rate, 3), **of})
            steps[-1]["borne"] = keeps_up(steps[-1], steps[0], arguments.slower)
            print(f"{rate:.2f}/s: {of['ok']} of {of['sent']}, p95 {of['latency_ms'].get('p95', 0):.0f} ms", flush=True)
            if not steps[-1]["borne"]:
                break
            rate *= arguments.factor
    return steps


def keeps_up(step: dict[str, Any], first: dict[str, Any], slower: float) -> bool:
    """Whether the service kept up at this rate."""
    answered = step["ok"] == step["sent"] and step["answered_per_s"] >= KEPT_UP * step["rate"]
    return bool(answered and step["latency_ms"]["p95"] <= slower * first["latency_ms"]["p95"])


def show(steps: list[dict[str, Any]]) -> str:
    """The results as a table."""
    rows: list[list[object]] = [["rate per s", "sent", "ok", "answered per s", "p50 ms", "p95 ms", "p99 ms", "borne"]]
    for step in steps:
        latency = [step["latency_ms"].get(name, "-") for name in ("p50", "p95", "p99")]
        rows.append(
            [
                f"{step['rate']:g}",
                step["sent"],
                step["ok"],
                step["answered_per_s"],
                *latency,
                "yes" if step["borne"] else "no",
            ]
        )
    return table(rows)


def main() -> int:
    """Parse, climb, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.ramp", description="Raise the rate until the service does not keep up."
    )
    add_load(parser, "ramp")
    parser.add_argument("--start", type=float, default=1.0, help="requests per second of the first step")
    parser.add_argument("--factor", type=float, default=1.5, help="from one step to the next")
    parser.add_argument("--most", type=float, default=1000.0, help="requests per second at which the climb ends anyway")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each step")
    parser.add_argument("--slower", type=float, default=3.0, help="times the first step's p95 that is still borne")
    arguments = parser.parse_args()
    if arguments.factor <= 1:
        parser.error(f"--factor {arguments.factor:g}: the rate must grow, give more than 1")
    report = {**environment(), "settings": {name: str(value) for name, value in vars(arguments).items()}}
    report["steps"] = steps = run_to_end(measure_rates(arguments))
    report["knee_per_s"] = knee = max((step["rate"] for step in steps if step["borne"]), default=0.0)
    print(show(steps))
    print(f"knee: {knee:g} requests per second" if knee else "not even the first rate was borne: give a lower --start")
    write(arguments.out, report)
    draw_ramp(report, arguments.out.with_suffix(".png"))
    return 0 if knee else 1


if __name__ == "__main__":
    raise SystemExit(main())
