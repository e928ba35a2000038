"""Processes that break the protocol: real ones, which answer what the image tells them to."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from models.errors import BrokenImage, ImageError
from service.decoding import fork_server as fork_server_module
from service.decoding.decoder import Decoder
from service.decoding.fork_server import ForkServer
from service.decoding.messages import ANSWER, ASKS, PIXELS, PIXELS_SENT, REFUSED
from service.tests.decoding.pool import SIDE, Pool, encoded

# Code of a fork server whose processes answer an image that begins with MISLEAD by what follows
# it, and send what follows UNASKED after their answer.
MISLEADING_START = """
import time
from service.decoding import child
honest = child.DecodingProcess._answer
def answer(self, data, *, granted):
    if data.startswith(b"UNASKED"):
        self._connection.sendall(honest(self, b"", granted=granted))
        time.sleep(0.1)
        return data[7:]
    return data[7:] if data.startswith(b"MISLEAD") else honest(self, data, granted=granted)
child.DecodingProcess._answer = answer
"""


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(ANSWER.pack(ASKS, 2**31), id="asks for more than one image may have"),
        pytest.param(ANSWER.pack(ASKS, 0), id="asks for nothing"),
        pytest.param(ANSWER.pack(PIXELS, 5), id="too few pixels"),
        pytest.param(ANSWER.pack(PIXELS_SENT, 3 * SIDE * SIDE) + bytes(3 * SIDE * SIDE), id="pixels in the answer"),
        pytest.param(ANSWER.pack(PIXELS, 3 * SIDE * SIDE) * 2, id="two answers"),
        pytest.param(ANSWER.pack(REFUSED, 2**31), id="an endless refusal"),
        pytest.param(ANSWER.pack(REFUSED, 40_000) + b"[" * 40_000, id="a deep refusal"),
        pytest.param(ANSWER.pack(REFUSED, 13) + b'["OSError",1]', id="another error"),
        pytest.param(ANSWER.pack(99, 0), id="another kind"),
    ],
)
def test_a_process_that_breaks_the_protocol_costs_its_own_image_alone(misleading: Pool, answer: bytes) -> None:
    check_misled(misleading, b"MISLEAD" + answer)


def test_pixels_without_shared_memory_break_the_protocol(misleading: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", exhausted)
    check_misled(misleading, b"MISLEAD" + ANSWER.pack(PIXELS, 3 * SIDE * SIDE))


def test_a_process_that_asks_again_for_what_was_granted_breaks_the_protocol(misleading: Pool) -> None:
    check_misled(misleading, b"MISLEAD" + ANSWER.pack(ASKS, 49_000_000))


def test_an_answer_that_nobody_asked_for_costs_no_image(misleading: Pool) -> None:
    """Three bytes come after an answer, and would be the head of the next."""

    async def work(decoder: Decoder) -> None:
        (worker,) = decoder._workers
        with pytest.raises(ImageError):
            await decoder.decode(b"UNASKED" + ANSWER.pack(PIXELS, 0)[:3], time.monotonic() + 30, 0)
        while worker.alive:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (await decoder.decode(encoded("PNG"), time.monotonic() + 30, 0)).shape == (3, SIDE, SIDE)

    misleading.run(work, workers=1)


def check_misled(pool: Pool, data: bytes) -> None:
    async def work(decoder: Decoder) -> None:
        workers = set(decoder._workers)
        until = time.monotonic() + 30
        images = [data, encoded("PNG"), encoded("PNG")]
        outcomes = await asyncio.gather(*(decoder.decode(each, until, 0) for each in images), return_exceptions=True)
        assert isinstance(outcomes[0], BrokenImage)
        assert "misled its decoder" in str(outcomes[0])
        assert [type(outcome) for outcome in outcomes[1:]] == [np.ndarray] * 2
        while len(decoder._idle) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert len(workers & decoder._workers) == 1
        assert decoder._budget.held == 0

    before = pool.replaced("protocol")
    pool.run(work)
    assert pool.replaced("protocol") == before + 1


def test_a_message_of_a_process_is_printable(misleading: Pool) -> None:
    body = b'["BrokenImage", "a\\ud800\\u0000\\n"]'
    (outcome,) = misleading.all(b"MISLEAD" + ANSWER.pack(REFUSED, len(body)) + body, workers=1)
    assert str(outcome) == "a???"


@pytest.fixture(scope="module")
def misleading_server() -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        first, _, last = fork_server_module.START.rpartition("serve_forks")
        patch.setattr(fork_server_module, "START", first + MISLEADING_START + "child.serve_forks" + last)
        server = ForkServer()
        server.start()
    yield server
    server.close()


@pytest.fixture
def misleading(misleading_server: ForkServer) -> Pool:
    return Pool(misleading_server)
