"""Processes of the `reco` command, forked from one that has imported torch, faiss and the service.

A fresh interpreter spends 14 CPU-seconds on imports before it serves; a fork needs none of them.
Each child is a process of its own: own memory, own sockets, own signals, own exit code.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRELOAD = ["service.tests.preload"]
SERVER_ENVIRON = {
    "OMP_NUM_THREADS": "1",  # a fork must not inherit a thread pool
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


class Forked:
    """A running `reco` command, with the methods of `subprocess.Popen` that the tests use.

    stdout, stderr: files or named pipes that the child opens for writing; they may be the same.
    """

    def __init__(
        self, args: Sequence[str], environ: Mapping[str, str], stdout: Path, stderr: Path, folder: Path = ROOT
    ) -> None:
        self.args = list(args)
        with _fork_server() as context:
            self._process: ForkServerProcess = context.Process(
                target=_run, args=(self.args, dict(environ), str(stdout), str(stderr), str(folder))
            )
            self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        """Return None while it runs, else its exit code, or minus the signal that ended it."""
        self._process.join(0)
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()


def run(
    args: Sequence[str], environ: Mapping[str, str], timeout_s: float, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run one command in `folder` to its end, as `subprocess.run(capture_output=True)` does."""
    with tempfile.TemporaryDirectory() as outputs:
        stdout, stderr = Path(outputs) / "stdout", Path(outputs) / "stderr"
        process = Forked(args, environ, stdout, stderr, folder)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        return subprocess.CompletedProcess(["reco", *args], code, stdout.read_text(), stderr.read_text())


@contextmanager
def _fork_server() -> Iterator[ForkServerContext]:
    """The context whose fork server has everything imported, with thread pools of one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = {name: os.environ.get(name) for name in SERVER_ENVIRON}
    os.environ.update(SERVER_ENVIRON)
    try:
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def reco_on_path(folder: Path) -> Iterator[Path]:
    """A folder for PATH with a `reco` that shell scripts can call: each call is a forked process.

    The script sends its arguments, variables and working folder over a socket and prints the
    output.
    """
    place = str(folder / "reco.socket")
    script = folder / "reco"
    script.write_text(CALL.format(python=sys.executable, place=place))
    script.chmod(0o755)
    with socketserver.UnixStreamServer(place, _Call) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield folder
        finally:
            server.shutdown()
            thread.join()


CALL = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as call:
    call.connect("{place}")
    call.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode() + b"\\n")
    code, stdout, stderr = json.load(call.makefile())
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(code)
"""


class _Call(socketserver.StreamRequestHandler):
    """One call of the script."""

    def handle(self) -> None:
        args, environ, folder = json.loads(self.rfile.readline())
        done = run(args, environ, 240, Path(folder))
        self.wfile.write(json.dumps([done.returncode, done.stdout, done.stderr]).encode())


def _run(args: list[str], environ: dict[str, str], stdout: str, stderr: str, folder: str) -> None:
    """In the child: `reco args` with these variables, and streams of its own."""
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    # a background shell would have it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    out = os.open(stdout, flags, 0o600)
    error = out if stdout == stderr else os.open(stderr, flags, 0o600)
    os.dup2(out, 1)
    os.dup2(error, 2)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  for the process's life
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["reco", *args]
    from service.cli.main import main

    try:
        code: object = main(args)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  as the interpreter does at its own end
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
