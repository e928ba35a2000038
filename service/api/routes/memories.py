"""The memories: what is served, and replacing it while requests flow.

By name and version, never by path.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request

from service.api.auth import AdminRoute, WriteRoute
from service.api.dependencies import EngineDep, deadline
from service.api.requests import new_pairs
from service.api.schemas import ActivateBody, PairsBody
from service.memories.jobs import Job

router = APIRouter(route_class=WriteRoute, tags=["memories"])
admin_router = APIRouter(route_class=AdminRoute, tags=["memories"])


@router.get("/memories")
async def list_memories(engine: EngineDep) -> dict[str, Any]:
    """Every memory of the store, with its versions and the one being served."""
    rows = await asyncio.to_thread(engine.memories.rows)
    return {"object": "list", "default": engine.memories.default, "data": rows}


@router.get("/memories/{name}")
async def get_memory(name: str, engine: EngineDep) -> dict[str, Any]:
    """One memory."""
    return await asyncio.to_thread(engine.memories.row, name)


@admin_router.post("/memories/{name}/activate", status_code=202)
async def activate(
    request: Request, name: str, body: Annotated[ActivateBody, Body()], engine: EngineDep
) -> dict[str, Any]:
    """Start serving another version; poll the job at GET /jobs/{id}.

    A failure leaves the current one serving.
    """
    return _accepted(request, engine.swaps.swap(name, body.version, dry_run=body.dry_run))


@admin_router.post("/memories/{name}/rollback", status_code=202)
async def rollback(request: Request, name: str, engine: EngineDep) -> dict[str, Any]:
    """Start serving the version that was served before."""
    previous = await asyncio.to_thread(engine.memories.previous, name)
    return _accepted(request, engine.swaps.swap(name, previous))


@admin_router.post("/memories/{name}/compact", status_code=202)
async def compact(request: Request, name: str, engine: EngineDep) -> dict[str, Any]:
    """Start folding the online edits into a new version, which is then served; edits go on
    meanwhile.
    """
    return _accepted(request, engine.swaps.compact(name))


@router.post("/memories/{name}/pairs")
async def put_pairs(
    request: Request, name: str, body: Annotated[PairsBody, Body()], engine: EngineDep
) -> dict[str, Any]:
    """Add pairs, or replace those of the same id: on the disk, and visible to the next request,
    before this is answered.
    """
    request.state.key.usage.spend_items(len(body.pairs))
    return await engine.edits.put(name, new_pairs(body, engine.settings), deadline(request, engine))


@router.delete("/memories/{name}/pairs/{pair_id:path}")
async def delete_pair(name: str, pair_id: str, engine: EngineDep) -> dict[str, Any]:
    """Remove one pair, as durable and as visible."""
    return await engine.edits.delete(name, pair_id)


@router.get("/jobs/{job_id}")
async def job(job_id: str, engine: EngineDep) -> dict[str, Any]:
    """The phase, timings and outcome of a swap or a compaction."""
    return asdict(engine.jobs.get(job_id))


def _accepted(request: Request, started: Job) -> dict[str, Any]:
    """The fields of a job that was started; its id goes into the audit line of the request."""
    request.state.job = started.id
    return asdict(started)
