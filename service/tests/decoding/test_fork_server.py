"""What the fork server passes on to the decoding processes, and how it starts and ends."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from models.errors import ImageError
from service.decoding.decoder import Decoder
from service.decoding.fork_server import ForkFailed, ForkServer
from service.decoding.messages import DecodeJob
from service.decoding.worker import fork_worker
from service.tests.decoding.pool import CROP, LYING_AVIF, Pool, encoded


def process_of(server: ForkServer) -> subprocess.Popen[bytes]:
    assert server._process is not None
    return server._process


def runs(server: ForkServer) -> bool:
    return server._process is not None


def environ_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_a_limit_of_memory_of_the_operator_is_kept(fork_server: ForkServer) -> None:
    """`ulimit -v` of 8 GiB, hard and soft, and a lower soft limit alone."""
    own = ForkServer()
    own.start()
    pool = Pool(own)
    try:
        for limits in ((7 * 2**30, resource.RLIM_INFINITY), (6 * 2**30, 8 * 2**30), (2**32, 2**32)):
            resource.prlimit(process_of(own).pid, resource.RLIMIT_AS, limits)

            async def work(decoder: Decoder, limits: tuple[int, int] = limits) -> None:
                (worker,) = decoder._workers
                for _ in range(2):
                    await decoder.decode(encoded("PNG"), time.monotonic() + 30, 0)
                assert resource.prlimit(worker.pid, resource.RLIMIT_AS) == limits
                with pytest.raises(ImageError):
                    await decoder.decode(LYING_AVIF, time.monotonic() + 30, 0)

            pool.run(work, workers=1)
    finally:
        own.close()


def test_keys_and_tokens_stay_out_of_the_environment_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECO_API_KEYS", "RECO_ADMIN_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a-secret-of-ours")
    monkeypatch.setenv("LC_TIME", "C")
    server = ForkServer()

    async def work(decoder: Decoder) -> None:
        await decoder.decode(encoded("PNG"), time.monotonic() + 30, 0)
        for pid in (process_of(server).pid, *(worker.pid for worker in decoder._workers)):
            assert b"LC_TIME=C" in environ_of(pid)
            assert b"a-secret-of-ours" not in environ_of(pid)

    try:
        Pool(server).run(work)
    finally:
        server.close()


def test_a_closed_fork_server_is_started_by_start_alone() -> None:
    server = ForkServer()
    job = DecodeJob(CROP, max_pixels=1, free_pixels=1, cpu_s=1)
    fork_worker(server, job).connection.close()
    server.close()
    assert server.end(1) == -signal.SIGKILL
    with pytest.raises(ForkFailed, match="closed"):
        fork_worker(server, job)
    assert not runs(server)
    server.start()
    seat = fork_worker(server, job)
    process_of(server).kill()
    process_of(server).wait()
    assert server.end(seat.pid) == -signal.SIGKILL
    assert server.end(seat.pid) == -signal.SIGKILL
    assert not runs(server)  # what is dead is not started again to end what ended with it
    seat.connection.close()
    server.close()
