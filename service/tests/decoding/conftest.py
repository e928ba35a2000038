"""One fork server for each module of tests, and a pool on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.decoding.fork_server import ForkServer
from service.tests.decoding.pool import Pool, slow_image


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def pool(fork_server: ForkServer) -> Pool:
    return Pool(fork_server)


@pytest.fixture(scope="module")
def slow() -> bytes:
    return slow_image()
