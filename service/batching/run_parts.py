"""Run the parts of one request at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

__all__ = ["gather_parts"]

T = TypeVar("T")


async def gather_parts(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the result of each part, in order.

    The first failure cancels the other parts and is raised as it is.
    """
    if len(parts) == 1:
        return [await parts[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in parts]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
