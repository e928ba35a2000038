"""One uvicorn process: a socket taken before anything is loaded, and an end that leaves no admitted request unanswered."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from service.batching.executors import run_in_own_thread
from service.observability.logging import configure_logging
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from service.engine import Engine

log = logging.getLogger("reco")
M_ARENA_MAX, ARENAS = -8, 2  # of malloc.h


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new requests with 503, answer those inside, then stop; a second signal stops at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = (
            None  # known once started; before that a signal just ends the start
        )
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal; the listening socket stays open while the requests inside are answered."""
        if self._engine.draining or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._engine.draining = True
        log.info("%s: draining, %d requests inside", signal.Signals(sig).name, self._engine.inside)
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
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
        """Say where we are once we answer there."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started and not self.should_exit and sockets:
            host, port = sockets[0].getsockname()[:2]
            _greet(self._engine, f"http://{f'[{host}]' if ':' in host else host}:{port}")


def bind(host: str, port: int) -> socket.socket:
    """Take the port now: loading a model only to find it in use would waste the operator's minute. Raises UsageError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}; choose another --host or --port"
        ) from error
    return taken


def few_arenas() -> None:
    """IdleThreads come and go in a service, and glibc would give each a heap of its own, which keeps what was freed in it."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def serve(settings: Settings) -> None:
    """Open everything, then answer until told to stop, and end the process. Raises what cannot be opened, in one line.

    Not by way of the interpreter, which would wait for the thread of a compaction or of a reading: minutes of training that nothing can
    stop. Every request is answered and everything closed by then, and what such a thread leaves is as whole as after `kill -9`.
    """
    configure_logging(
        settings.log_format, verbose=logging.getLogger().isEnabledFor(logging.INFO), access_log=settings.access_log
    )
    few_arenas()
    with bind(settings.host, settings.port) as taken:
        print(f"loading {settings.model}: this takes some seconds…", flush=True)
        from models.encoder.loading import import_libraries  # torch takes seconds: only now that the port is ours
        from service.engine import Engine

        import_libraries()
        opening = run_in_own_thread(partial(Engine.open, settings))
        from service.app import create_app  # most of a second too, while the weights are read and hashed
        from service.server.connection_limits import bounded

        engine = opening.result()
        config = uvicorn.Config(
            create_app(engine), log_config=None, access_log=False, proxy_headers=False, server_header=False, lifespan="on", loop="uvloop",
            http=bounded(settings.receive_s), backlog=2048,
        )  # fmt: skip
        DrainingServer(config, engine).run(sockets=[taken])
        sys.stdout.flush()
        os._exit(0)


def _greet(engine: Engine, url: str) -> None:
    memory = engine.memories.default
    print(f"RECO Serve answers on {url}   (page: {url}/   reference: {url}/docs)", flush=True)
    print(
        f"  model {engine.reco.encoder.fingerprint}   memory {engine.memories.resolve(None).ref if memory else 'none'}",
        flush=True,
    )
    print("  try it:", flush=True)
    print(f"  curl -s -F file=@photo.jpg '{url}/embed/image?neighbors=true'", flush=True)
    print("  Ctrl-C stops it.", flush=True)
