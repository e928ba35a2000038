"""Stored label sets: list, read, replace, delete.

Files are read and written outside the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body

from service.api.auth import ReadRoute, WriteRoute
from service.api.dependencies import EngineDep
from service.api.schemas import LabelSetBody
from service.engine import Engine
from service.labels.store import DamagedLabelSet

router = APIRouter(route_class=ReadRoute, tags=["label sets"])
write_router = APIRouter(route_class=WriteRoute, tags=["label sets"])


@router.get("/label-sets")
async def list_label_sets(engine: EngineDep) -> dict[str, Any]:
    """List the stored sets."""
    return {"object": "list", "data": await asyncio.to_thread(_list, engine)}


@router.get("/label-sets/{name}")
async def get_label_set(name: str, engine: EngineDep) -> dict[str, Any]:
    """Return one stored set.

    `versions` may be pinned as NAME@VERSION; `embedded` says how many labels have vectors under
    which memory.
    """
    found = await asyncio.to_thread(engine.label_sets.get, name)
    name = name.partition("@")[0]
    versions = await asyncio.to_thread(engine.label_sets.versions, name)
    embedded = engine.label_sets.vectors.progress(found)
    return {"name": name, "version": found.version, "versions": versions, **found.body, "embedded": embedded}


@write_router.put("/label-sets/{name}")
async def put_label_set(name: str, body: Annotated[LabelSetBody, Body()], engine: EngineDep) -> dict[str, Any]:
    """Store or replace a set.

    It is embedded at its first use and at each swap; a large one from now on, and GET tells how far
    that is.
    """
    found = await asyncio.to_thread(engine.label_sets.check, body.labels, body.templates, stored=True)
    await engine.label_sets.replace(name, found, engine.default_snapshot())
    return {"name": name, "version": found.version, **found.body}


@write_router.delete("/label-sets/{name}")
async def delete_label_set(name: str, engine: EngineDep) -> dict[str, Any]:
    """Delete a set."""
    await engine.label_sets.delete(name)
    return {"name": name, "deleted": True}


def _list(engine: Engine) -> list[dict[str, Any]]:
    """One row per set; a damaged set is named with its error."""
    rows: list[dict[str, Any]] = []
    for name in engine.label_sets.names():
        try:
            found = engine.label_sets.get(name)
        except DamagedLabelSet as error:
            rows.append({"name": name, "error": str(error)})
        else:
            rows.append(
                {"name": name, "version": found.version, "labels": len(found.labels), "templates": found.templates}
            )
    return rows
