"""POST /classify, and the label sets it may name."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from starlette.responses import Response

from service.api.auth import WithAdmin, WithKey
from service.api.dependencies import EngineDep, deadline, query_of, unless_gone
from service.api.requests import ParsedRequest, read_either
from service.api.responses import failing, frame, refuse, reply
from service.api.schemas import ClassifyOptions, LabelSetBody, documented
from service.engine import Engine
from service.errors import ItemRefused
from service.labels.label_set import LabelSet
from service.labels.scoring import Ranked
from service.pipeline.stages import Answered, EmbeddedItem

router = APIRouter(tags=["classify"])


@router.post(
    "/classify",
    dependencies=[WithKey],
    response_class=Response,
    openapi_extra=documented(ClassifyOptions, "images", "texts"),
)
async def classify(request: Request, engine: EngineDep) -> Response:
    """Score images or texts against labels; `enhance`: which side the memory refines: image (the items), text (the labels), both, none."""
    intake = await read_either(request, ClassifyOptions, engine.settings)
    request.state.modality = intake.items.side
    labels = await asyncio.to_thread(
        _labels, engine, intake.options
    )  # a large stored set takes a second to read and check
    body, answered = await unless_gone(request, _classified(request, engine, intake, labels))
    with engine.timed("serialize", intake.items.side):
        return reply(body, answered)


async def _classified(
    request: Request, engine: Engine, intake: ParsedRequest[ClassifyOptions], labels: LabelSet
) -> tuple[dict[str, Any], Answered]:
    options, until = intake.options, deadline(request, engine)
    snapshot = None if options.enhance == "none" else engine.memories.resolve(options.memory)  # one for both sides
    query = query_of(engine, options, snapshot if options.enhance in ("both", "image") else None)
    answered = await engine.embed(intake.items, query, until)
    rows = failing(answered.rows, options.on_error)
    good = [row for row in rows if isinstance(row, EmbeddedItem)]
    refined = snapshot if options.enhance in ("both", "text") else None
    ranked = iter(_named(await engine.rank(good, labels, refined, options.top_k, until), labels) if good else [])
    stored = (
        {} if options.label_set is None else {"label_set": f"{options.label_set.partition('@')[0]}@{labels.version}"}
    )
    body = {
        **frame(engine, snapshot),
        **stored,
        "data": [None if isinstance(row, ItemRefused) else next(ranked) for row in rows],
    }
    if options.neighbors:
        body["neighbors"] = [[] if isinstance(row, ItemRefused) else row.neighbors for row in rows]
    if len(good) < len(rows):
        body["errors"] = [refuse(row).body["error"] if isinstance(row, ItemRefused) else None for row in rows]
    return body, answered


def _labels(engine: Engine, options: ClassifyOptions) -> LabelSet:
    if options.label_set is not None:
        return engine.label_sets.get(options.label_set)
    return engine.label_sets.checked(options.labels or [], options.templates)


def _named(ranked: Ranked, labels: LabelSet) -> list[list[dict[str, Any]]]:
    """The best labels of each row, as the wire shows them."""
    rows = zip(ranked.labels.tolist(), ranked.scores.tolist(), strict=True)
    return [
        [{"label": labels.labels[j], "score": score} for j, score in zip(best, scores, strict=True)]
        for best, scores in rows
    ]


@router.get("/label-sets", dependencies=[WithKey])
async def list_label_sets(engine: EngineDep) -> dict[str, Any]:
    """The stored sets."""
    sets = {name: engine.label_sets.get(name) for name in engine.label_sets.names()}
    rows = [
        {"name": name, "version": s.version, "labels": len(s.labels), "templates": s.templates}
        for name, s in sets.items()
    ]
    return {"object": "list", "data": rows}


@router.get("/label-sets/{name}", dependencies=[WithKey])
async def get_label_set(name: str, engine: EngineDep) -> dict[str, Any]:
    """One stored set, whole, the versions that may be pinned as NAME@VERSION, and how much of it is embedded under which memory."""
    found = await asyncio.to_thread(engine.label_sets.get, name)
    name = name.partition("@")[0]
    versions = await asyncio.to_thread(engine.label_sets.versions, name)
    embedded = engine.label_sets.vectors.progress(found)
    return {"name": name, "version": found.version, "versions": versions, **found.body, "embedded": embedded}


@router.put("/label-sets/{name}", dependencies=[WithAdmin])
async def put_label_set(name: str, body: Annotated[LabelSetBody, Body()], engine: EngineDep) -> dict[str, Any]:
    """Store or replace a set. It is embedded at its first use and at each swap; a large one from now on, and GET tells how far that is."""
    found = await asyncio.to_thread(engine.label_sets.checked, body.labels, body.templates, stored=True)
    await engine.label_sets.replace(name, found, engine.default_snapshot())
    return {"name": name, "version": found.version, **found.body}


@router.delete("/label-sets/{name}", dependencies=[WithAdmin])
async def delete_label_set(name: str, engine: EngineDep) -> dict[str, Any]:
    """Forget a set."""
    engine.label_sets.delete(name)
    return {"name": name, "deleted": True}
