"""The service's end of the fork server: starts it, and orders decoding processes from it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

from service.decoding.messages import DecodeJob, Order, OrderReply

__all__ = ["ForkFailed", "ForkServer"]

log = logging.getLogger("reco")
ANSWER_S = 30.0  # the first answer waits for the imports of the fork server
START = (
    "import json, socket, sys\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from service.decoding.child import serve_forks\n"
    "serve_forks(socket.socket(fileno=int(sys.argv[2])))\n"
)
# Of the service's environment, what a process needs to start. Keys and tokens are not among it: a
# process that hostile bytes took over reads its own environment first.
KEPT_NAMES = {"GLIBC_TUNABLES", "LANG", "PATH", "TMPDIR", "TZ"}
KEPT_PREFIXES = ("DYLD_", "LC_", "LD_", "OPENBLAS_")
# One thread and one heap in each process. glibc gives freed memory back at once by default, and the
# page faults of the next photo then take a quarter of its time: up to 64 MiB are kept.
ENVIRON = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}


class ForkFailed(OSError):
    """The fork server could not be started, or could not fork."""


class ForkServer:
    """One child process that has imported what decoding needs, and forks on demand in 1 ms.

    Python's own (`multiprocessing.forkserver`) is one for the whole process, forks what others have
    preloaded into it, torch for example, and reads pickles. Methods block, and may be called from
    any thread.
    State: the process and the control socket, None until started; whether it was closed; a lock
    around each order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def start(self) -> None:
        """Start the process, unless it runs, also after `close`; its imports go on in the
        background.

        Raises ForkFailed.
        """
        with self._lock:
            self._closed = False
            self._start()

    def fork(self, job: DecodeJob, descriptors: list[int]) -> int:
        """Fork a decoding process and return its id. Raises ForkFailed, also after `close`.

        descriptors: its end of the socket, then the shared memory where there is some.
        """
        with self._lock:
            if self._closed:
                raise ForkFailed("the fork server was closed")
            try:
                reply = self._order(self._start(), {"fork": job.as_dict()}, descriptors)
            except (OSError, ValueError) as error:
                self._stop()
                raise ForkFailed(f"the fork server does not answer: {error}") from error
        if "pid" not in reply:
            raise ForkFailed(f"no process can be forked: {reply.get('error')}")
        return reply["pid"]

    def end(self, pid: int) -> int:
        """Kill a decoding process, unless it has ended.

        Returns its exit code, or minus the signal that ended it.
        """
        with self._lock:
            if self._control is not None:
                try:
                    return self._order(self._control, {"end": pid}, [])["status"]
                except (OSError, ValueError, KeyError) as error:
                    log.warning("the fork server of the decoders ended: %s", error)
                    self._stop()
            return -signal.SIGKILL  # what it forked ended with it

    def close(self) -> None:
        """End the fork server, and with it what it forked; only `start` starts it again."""
        with self._lock:
            self._closed = True
            self._stop()

    def _order(self, control: socket.socket, order: Order, descriptors: list[int]) -> OrderReply:
        socket.send_fds(control, [json.dumps(order).encode()], descriptors)
        message = control.recv(2**16)
        if not message:
            raise ConnectionResetError("it has ended")
        reply: OrderReply = json.loads(message)
        return reply

    def _start(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-S", "-c", START, json.dumps(sys.path), str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and code
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_environ()
            )
        except OSError as error:
            ours.close()
            raise ForkFailed(f"the fork server of the decoders does not start: {error.strerror or error}") from error
        finally:
            theirs.close()
        ours.settimeout(ANSWER_S)
        self._control = ours
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            # it ends as soon as it reads the closed socket
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self._process.kill()
            self._process.wait()
            self._process = None


def _environ() -> dict[str, str]:
    kept = {name: os.environ[name] for name in os.environ if name in KEPT_NAMES or name.startswith(KEPT_PREFIXES)}
    return kept | ENVIRON
