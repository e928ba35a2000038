"""A real `reco serve`, started and ended by a load test."""

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

from loadtests.report import ROOT

__all__ = ["Served", "service"]

POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Served:
    """Where it listens, and the seconds from its start until it was ready."""

    url: str
    ready_s: float


@contextmanager
def service(environ: Mapping[str, str], log: Path) -> Iterator[Served]:
    """The service on a free port, once it is ready; ended by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        command, begun = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)], time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)
        try:
            while not _ready(url):
                if process.poll() is not None:
                    raise SystemExit(f"the service did not start; {log} ends:\n{log.read_text()[-2000:]}")
                time.sleep(POLL_S)
            yield Served(url, time.perf_counter() - begun)
        finally:
            process.terminate()
            process.wait(60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
