"""Real builder processes, started quickly so that many can be killed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOOP = """
import os, sys
from pathlib import Path
{prepare}
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        build(Path(line.strip()))
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def kill_count() -> int:
    """How often a test kills: `make chaos` asks for 200."""
    return int(os.environ.get("RECO_KILLS", "5"))


@contextmanager
def tiny_disk(root: Path, size: str) -> Iterator[Path]:
    """A real file system with little room, such as "300k"."""
    root.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system can only be mounted by root")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(root)], capture_output=True
    ).returncode:
        pytest.skip("this machine does not let even root mount a file system")
    try:
        yield root
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


class ForkServer:
    """Starts real builder processes, one at a time, without importing everything for each.

    prepare: source text that defines build(root: Path).
    """

    def __init__(self, prepare: str) -> None:
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork must not inherit half a thread pool
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LOOP.format(prepare=prepare)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **single},
        )

    def begin(self, root: Path) -> int:
        """Start a builder in the store at `root`; its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{root}\n")
        self._process.stdin.flush()
        return self._number()

    def end(self) -> int:
        """How that builder ended: 0, or minus the signal. Until asked, its process id stays its own."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._number()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())
