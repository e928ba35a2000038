"""The service's end of the fork server: starts it, and orders decoding processes from it."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress

from service.decoding.messages import DecodeJob

__all__ = ["ForkFailed", "ForkServer"]

log = logging.getLogger("reco")
ANSWER_S = 30.0  # the first answer waits for the imports of the fork server
START = (
    "import json, socket, sys\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from service.decoding.child import serve_forks\n"
    "serve_forks(socket.socket(fileno=int(sys.argv[2])))\n"
)
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
    State: the process and the control socket, None until started; a lock around each order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start the process, unless it runs; its imports go on in the background.

        Raises ForkFailed.
        """
        with self._lock:
            self._start()

    def fork(self, job: DecodeJob, descriptors: list[int]) -> int:
        """Fork a decoding process and return its id. Raises ForkFailed.

        descriptors: its end of the socket, then the shared memory where there is some.
        """
        with self._lock:
            try:
                reply = self._order({"fork": job.as_dict()}, descriptors)
            except OSError as error:
                self._stop()
                raise ForkFailed(f"the fork server does not answer: {error}") from error
        if "pid" not in reply:
            raise ForkFailed(f"no process can be forked: {reply.get('error')}")
        return int(str(reply["pid"]))

    def end(self, pid: int) -> int:
        """Kill a decoding process, unless it has ended.

        Returns its exit code, or minus the signal that ended it.
        """
        with self._lock:
            try:
                return int(str(self._order({"end": pid}, [])["status"]))
            except (OSError, KeyError) as error:
                log.warning("the fork server of the decoders ended and is started again: %s", error)
                self._stop()  # and with it every process that it forked
                return -9

    def close(self) -> None:
        """End the fork server, and with it what it forked."""
        with self._lock:
            self._stop()

    def _order(self, order: dict[str, object], descriptors: list[int]) -> dict[str, object]:
        control = self._start()
        socket.send_fds(control, [json.dumps(order).encode()], descriptors)
        reply = control.recv(2**16)
        if not reply:
            raise ConnectionResetError("it has ended")
        found: dict[str, object] = json.loads(reply)
        return found

    def _start(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-S", "-c", START, json.dumps(sys.path), str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and code
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, **ENVIRON}
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
