"""Commands run inside the test process: a process of its own costs seconds of imports each time."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from service.cli.main import main


@dataclass(frozen=True)
class Completed:
    """What a command printed and its exit code, as `subprocess.CompletedProcess` holds them."""

    returncode: int
    stdout: str
    stderr: str


def run(*args: str, **environ: str) -> Completed:
    """One command with only the RECO_* variables given."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RECO_")}
    stdout, stderr = io.StringIO(), io.StringIO()
    with patch.dict(os.environ, others | environ, clear=True), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            code: object = main(args)
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int)
    return Completed(code, stdout.getvalue(), stderr.getvalue())


def error_line(done: Completed, code: int) -> str:
    """The error of a failed command: exactly one line on stderr, the right exit code, no stack."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("reco: "), line
    return line
