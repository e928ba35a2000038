"""A real Prometheus for the tests: the shipped configuration and rules, on a clock fast enough for
them.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

FOLDER = Path(__file__).parents[2] / "deploy/prometheus"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())

binaries = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs Debian's prometheus package (prometheus, promtool)",
)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """The shipped configuration in `folder`, scraping `target` and judging every second; yields
    Prometheus' URL.
    """
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "targets.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    shutil.copy(FOLDER / "rules.yml", folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
    ]
    process = subprocess.Popen(["prometheus", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str, expression: str) -> list[Any]:
    """The instant vector of a query without its NaNs; empty while Prometheus starts."""
    try:
        reply = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10, trust_env=False)
    except httpx.TransportError:
        return []
    if reply.status_code == 503:
        return []
    body = reply.json()
    assert body["status"] == "success", body
    return [sample for sample in body["data"]["result"] if sample["value"][1] != "NaN"]


def wait_until(met: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not met():
        if time.monotonic() > end:
            return False
        time.sleep(0.3)
    return True


def promtool(*arguments: str) -> None:
    """Run it in the rules' folder; fails with what it says."""
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
