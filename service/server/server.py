"""The uvicorn process: binds its socket before it loads anything, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from service.batching.executors import run_in_own_thread
from service.observability.logging import configure_logging
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from service.engine import Engine
    from service.server.connection_limits import ConnectionLimits

BACKLOG = 2048  # connections that wait to be accepted

log = logging.getLogger("reco")


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new requests with 503, answer those inside, then stop.

    A second signal stops at once.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, limits: ConnectionLimits) -> None:
        super().__init__(config)
        self._engine, self._limits = engine, limits
        self._loop: asyncio.AbstractEventLoop | None = (
            None  # None before the start: a signal then just ends the process
        )
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining; the listening socket stays open while the requests inside are
        answered.

        A signal handler may interrupt a write to the log, and a second write inside it raises
        RuntimeError: so it writes nothing, and the event loop does.
        """
        if self._engine.draining or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._engine.draining = True
        self._loop.call_soon_threadsafe(self._start_draining, signal.Signals(sig).name)

    def _start_draining(self, signal_name: str) -> None:
        log.info("%s: draining, %d requests inside", signal_name, self._engine.inside)
        self._drain = asyncio.ensure_future(self._stop_when_empty())

    async def _stop_when_empty(self) -> None:
        give_up = time.monotonic() + self._engine.settings.drain_s
        while self._engine.inside and time.monotonic() < give_up:  # noqa: ASYNC110  a poll, so that the gate stays a plain counter
            await asyncio.sleep(0.02)
        if self._engine.inside:
            log.warning(
                "%d requests were still inside after %.0f s: stopping all the same",
                self._engine.inside,
                self._engine.settings.drain_s,
            )
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Print the address once the service answers."""
        await super().startup(sockets)
        self._limits.leave_files()
        self._loop = asyncio.get_running_loop()
        if self.started and not self.should_exit and sockets:
            host, port = sockets[0].getsockname()[:2]
            _print_address(self._engine, f"http://{f'[{host}]' if ':' in host else host}:{port}")


def bind(host: str, port: int) -> socket.socket:
    """Bind the port before the model is loaded, so that a port in use is found at once.

    Raises UsageError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}; choose another --host or --port"
        ) from error
    return bound


@contextmanager
def bind_unix(path: Path | None) -> Iterator[list[socket.socket]]:
    """The listening Unix socket with mode 600, none without a path; its file goes at the end.

    A file that a killed service left behind is replaced; at the end, one that another service has
    put there stays. Callers may connect at once, so that nobody takes the socket for such a
    remnant, and wait for the model. Raises UsageError.
    """
    if path is None:
        yield []
        return
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # of the process: nothing else runs yet
    try:
        _remove_dead_socket(path)
        bound.bind(str(path))
        bound.listen(BACKLOG)
        ours = path.stat().st_ino
    except OSError as error:
        bound.close()
        raise UsageError(f"cannot listen on {path}: {error.strerror or error}; choose another --unix-socket") from error
    finally:
        os.umask(before)
    with bound:
        try:
            yield [bound]
        finally:
            with suppress(FileNotFoundError):
                if path.stat().st_ino == ours:
                    path.unlink()


def _remove_dead_socket(path: Path) -> None:
    """Remove a socket file on which nobody listens; any other file stays, and binding fails."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


def serve(settings: Settings) -> None:
    """Open everything, answer until a signal comes, and end the process.

    Raises ServiceError, StoreError, ModelError.

    The process ends without the interpreter's own shutdown, which would wait for the thread of a
    compaction or a verification: minutes of training that nothing can stop. Every request is
    answered and everything is closed by then; what such a thread leaves is as whole as after `kill
    -9`.
    """
    configure_logging(
        settings.log_format, verbose=logging.getLogger().isEnabledFor(logging.INFO), access_log=settings.access_log
    )
    faulthandler.enable()  # a fatal signal, as after an I/O error under a mapping, writes the stacks
    with bind(settings.host, settings.port) as bound, bind_unix(settings.unix_socket) as unix:
        print(f"loading {settings.model}: this takes some seconds…", flush=True)
        # torch takes seconds: import it once the port is bound
        from models.encoder.loading.load import import_libraries
        from service.engine import Engine

        import_libraries()
        opening = run_in_own_thread(partial(Engine.open, settings))
        # most of a second, while the weights are read and hashed
        from service.app import create_app
        from service.server.connection_limits import ConnectionLimits, LimitedProtocol

        engine, limits = opening.result(), ConnectionLimits.from_settings(settings)
        config = uvicorn.Config(
            create_app(engine), log_config=None, access_log=False, proxy_headers=False, server_header=False, lifespan="on", loop="uvloop",
            http=LimitedProtocol.with_limits(limits), backlog=BACKLOG, ws="none",
        )  # fmt: skip
        DrainingServer(config, engine, limits).run(sockets=[bound, *unix])
    sys.stdout.flush()
    os._exit(0)


def _print_address(engine: Engine, url: str) -> None:
    snapshot = engine.default_snapshot()
    print(f"RECO Serve answers on {url}   (page: {url}/   reference: {url}/docs)", flush=True)
    memory = snapshot.ref if snapshot is not None else engine.memories.not_ready() or "none"
    print(f"  model {engine.reco.encoder.fingerprint}   memory {memory}", flush=True)
    if engine.gate.token is not None:
        print(f"  page with the admin token of this store: {url}/#token={engine.gate.token}", flush=True)
    print("  try it:", flush=True)
    print(f"  curl -s -F file=@photo.jpg '{url}/embed/image?neighbors=true'", flush=True)
    print("  Ctrl-C stops it.", flush=True)
