"""Real `reco serve` processes, and real photos that may be redistributed (scikit-image's own)."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import skimage.data
from PIL import Image

from service.access.token import read_token
from service.tests import warm

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("RECO_DATA", ROOT.parent / "shared" / "data"))
# more on a machine that is busy with other things
START_S = float(os.environ.get("RECO_TEST_START_S", "300"))


@dataclass
class Server:
    """A running service. lines: what it has printed so far, both streams."""

    url: str
    process: warm.Forked
    lines: list[str]
    store: Path

    def client(self, **given: Any) -> httpx.Client:
        """A client that sends the admin token of the store, where there is one."""
        return httpx.Client(base_url=self.url, **{"timeout": 60, "headers": self.admin, **given})

    @property
    def admin(self) -> dict[str, str]:
        """The header with the admin token of the store; empty where the operator has set a key."""
        token = read_token(self.store)
        return {"authorization": f"Bearer {token}"} if token else {}


def _environ(given: dict[str, str]) -> dict[str, str]:
    """Ours, without what the developer's shell may say about RECO."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RECO_")} | given


def reco(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run one command as a process of its own, forked from one that has imported everything."""
    return warm.run(args, _environ(environ), timeout_s=240)


def start_reco(*args: str, stderr: Path = Path(os.devnull), **environ: str) -> warm.Forked:
    """Start one command as such a process, without its output; stderr goes to a file where one is
    given.
    """
    return warm.Forked(args, _environ(environ), Path(os.devnull), stderr)


def cold_reco(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run one command in a fresh interpreter: slow, for tests of what a user's shell does."""
    command = [sys.executable, "-m", "service.cli.main", *args]
    return subprocess.run(command, cwd=ROOT, env=_environ(environ), capture_output=True, text=True, timeout=240)


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The error a user reads: one line, the right exit code, no stack."""
    assert done.returncode == code, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("reco: ")]
    assert len(told) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return told[0]


@contextmanager
def serving(store: Path, *flags: str, **environ: str) -> Iterator[Server]:
    """`reco serve` on a free port, ended at the end if it still runs."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        os.mkfifo(output)
        process = warm.Forked(
            ("serve", "--port", "0", "--store", str(store), *flags), _environ(environ), output, output
        )
        stream = output.open(encoding="utf-8")
    lines: list[str] = []
    known = threading.Event()
    url: list[str] = []

    def read() -> None:
        for line in stream:
            lines.append(line.rstrip())
            if "answers on " in line:
                url.append(line.split("answers on ")[1].split()[0])
                known.set()
        known.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        known.wait(START_S)
        if not url:
            raise AssertionError("the service did not start:\n" + "\n".join(lines))
        yield Server(url[0], process, lines, store)
    finally:
        with suppress(subprocess.TimeoutExpired):
            process.send_signal(signal.SIGTERM)  # an orderly end also writes what it covered
            process.wait(10)
        process.kill()
        process.wait(10)
        reader.join(10)
        stream.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The starter with its own memory, as `make serve` gives it.

    Shared: leave "grocery" serving "all" behind you.
    """
    with serving(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start further services: serve(store, *flags, **environ)."""
    with ExitStack() as stack:
        yield lambda store, *flags, **environ: stack.enter_context(serving(store, *flags, **environ))


def jpeg(pixels: np.ndarray, size: int | None = None) -> bytes:
    """JPEG bytes of an (H, W, 3) uint8 array."""
    image = Image.fromarray(pixels).convert("RGB")
    if size is not None:
        image = image.resize((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos() -> dict[str, bytes]:
    """Three real photos as JPEG bytes."""
    return {name: jpeg(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee")}


@pytest.fixture(scope="session")
def grocery() -> list[tuple[bytes, str]]:
    """(JPEG, class) of Grocery test photos; skipped where the data set is not there."""
    tars = sorted((DATA / "grocery").glob("test-*.tar"))
    if not tars:
        pytest.skip(f"no Grocery Store photos under {DATA}: set RECO_DATA")
    return [pair for path in tars for pair in labelled(path)]


def labelled(path: Path) -> list[tuple[bytes, str]]:
    """(JPEG, class) of every sample of a webdataset tar, read with the standard library alone."""
    import json

    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                key, _, kind = member.name.partition(".")
                found.setdefault(key, {})[kind] = file.read()
    return [(parts["jpg"], json.loads(parts["json"])["class"]) for parts in found.values()]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Settings, the starter's Reco and its store, loaded in this process: what an Engine is made
    of.
    """
    from index_store import Store
    from models.starter import install_starter
    from service.pipeline.load import load_reco
    from service.settings import Settings

    chosen = Settings(store=tmp_path_factory.mktemp("store"), device="cpu", stall_s=1.0, max_batch=2)
    store = Store(chosen.store)
    install_starter(store)
    return chosen, load_reco(chosen), store


@pytest.fixture
def engine(opened: tuple[Any, Any, Any]) -> Any:
    """An engine in this process, not yet running (`inside.scenario`)."""
    from service.decoding.fork_server import ForkServer
    from service.engine import Engine
    from service.observability.metrics import Metrics

    return Engine(*opened, Metrics(version="0", torch="0", faiss="0"), ForkServer())
