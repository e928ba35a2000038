"""The memories: what is served, and replacing it while requests flow. By name and version, never by path."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body

from service.routes.deps import EngineDep, WithAdmin
from service.wire import ActivateBody

router = APIRouter(dependencies=[WithAdmin], tags=["memories"])


@router.get("/memories")
async def list_memories(engine: EngineDep) -> dict[str, Any]:
    """Every memory of the store, with its versions and the one being served."""
    return {"object": "list", "default": engine.memories.default, "data": engine.memories.table()}


@router.get("/memories/{name}")
async def get_memory(name: str, engine: EngineDep) -> dict[str, Any]:
    """One memory."""
    return engine.memories.row(name)


@router.post("/memories/{name}/activate", status_code=202)
async def activate(name: str, body: Annotated[ActivateBody, Body()], engine: EngineDep) -> dict[str, Any]:
    """Start serving another version; poll the job at GET /jobs/{id}. A failure leaves the current one serving."""
    return asdict(engine.swap(name, body.version, dry_run=body.dry_run))


@router.post("/memories/{name}/rollback", status_code=202)
async def rollback(name: str, engine: EngineDep) -> dict[str, Any]:
    """Start serving the version that was served before."""
    return asdict(engine.swap(name, engine.memories.rollback_version(name)))


@router.get("/jobs/{job_id}")
async def job(job_id: str, engine: EngineDep) -> dict[str, Any]:
    """A swap's phase, timings and outcome."""
    return asdict(engine.memories.job(job_id))
