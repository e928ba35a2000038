"""The whole application in this process, where its parts can be held up, slowed and counted;
nothing but the socket is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from service.app import create_app
from service.engine import Engine

PATIENCE_S = 60.0


def scenario(engine: Engine, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Run `work` against the application, which starts and stops around it; an engine runs once."""

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), engine.running():
            transport = httpx.ASGITransport(create_app(engine))
            headers = {"authorization": f"Bearer {engine.gate.token}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
                await work(client)

    asyncio.run(run())
