"""A real `reco serve` process, started and stopped by a load test."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from loadtests.support.report import ROOT

__all__ = ["Served", "service"]

POLL_S = 0.05
START_S = 600.0  # with a large model on a busy machine


@dataclass(frozen=True, slots=True)
class Served:
    """The URL of the service, and the seconds from its start until it was ready."""

    url: str
    ready_s: float


@contextmanager
def service(environ: Mapping[str, str], log: Path) -> Iterator[Served]:
    """Start the service on a free port; yields once it is ready; SIGTERM ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("w") as file,
        httpx.Client(base_url=url, timeout=5, trust_env=False) as client,
    ):  # one: a new one takes 50 ms of a core
        command, begun = [sys.executable, "-m", "service.cli.main", "serve", "--port", str(port)], time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)
        try:
            while reason := _not_ready(client):
                if process.poll() is not None:
                    raise SystemExit(f"the service did not start; {log} ends:\n{log.read_text()[-2000:]}")
                if time.perf_counter() - begun > START_S:
                    raise SystemExit(f"the service was not ready within {START_S:g} s: {reason}; its log is {log}")
                time.sleep(POLL_S)
            yield Served(url, time.perf_counter() - begun)
        finally:
            process.terminate()
            process.wait(60)


def _not_ready(client: httpx.Client) -> str:
    """Why it takes no requests yet; empty once it does."""
    try:
        reply = client.get("/readyz")
    except httpx.TransportError as error:
        return type(error).__name__
    return "" if reply.status_code == 200 else str(reply.json()["reason"])
