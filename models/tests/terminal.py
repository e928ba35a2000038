"""A terminal in place of stdout and stderr."""

from __future__ import annotations

import os
import pty
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from unittest.mock import patch


@contextmanager
def terminal(columns: int) -> Iterator[list[str]]:
    """Stdout and stderr are a terminal of this width; its lines are in the list afterwards."""
    leader, follower = pty.openpty()
    parts: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # Linux's end of file, once the other side is closed
            while part := os.read(leader, 4096):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    lines: list[str] = []
    with (
        os.fdopen(follower, "w", encoding="utf-8") as stream,
        patch.dict(os.environ, TERM="xterm-256color", COLUMNS=str(columns)),
        redirect_stdout(stream),
        redirect_stderr(stream),
    ):
        yield lines
    reader.join()
    os.close(leader)
    lines += b"".join(parts).decode().splitlines()
