"""Child processes that tests can kill, forked from one that has imported everything."""

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
    """How often a test kills its child process: `make chaos` sets RECO_KILLS to 200."""
    return int(os.environ.get("RECO_KILLS", "5"))


@contextmanager
def tiny_disk(root: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of a given size, such as "300k", at `root`; skips the test where that fails."""
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
    """A process that forks one child at a time, so that no child has to import anything.

    prepare: source text that defines build(root: Path), which the child calls.
    """

    def __init__(self, prepare: str) -> None:
        # a fork must not inherit a pool of threads that do not exist in the child
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LOOP.format(prepare=prepare)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **single},
        )

    def begin(self, root: Path) -> int:
        """Start a child that builds in the store at `root`; returns its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{root}\n")
        self._process.stdin.flush()
        return self._read_number()

    def end(self) -> int:
        """Wait for the child; returns its exit code, or minus the signal that killed it.

        Until then its process id is not used again.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read_number()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read_number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())
