"""POST /embed/image and /embed/text."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from index_store import Side
from service.api.auth import WithKey
from service.api.dependencies import EngineDep, deadline, query_of, unless_gone
from service.api.requests import ParsedRequest, read_images, read_texts
from service.api.responses import NPY, failing, frame, headers, npy, refuse, reply, vector
from service.api.schemas import EmbedOptions, documented
from service.engine import Engine
from service.errors import BadRequest, ItemRefused
from service.pipeline.stages import Answered, EmbeddedItem, Query

router = APIRouter(dependencies=[WithKey], tags=["embed"])


@router.post("/embed/image", response_class=Response, openapi_extra=documented(EmbedOptions, "images"))
async def embed_image(request: Request, engine: EngineDep) -> Response:
    """Embed images (multipart field `file`, a raw image body, or JSON {"images": [base64]}), each refined by its neighbours in memory."""
    request.state.modality = "image"
    intake = await read_images(request, EmbedOptions, engine.settings)
    return await _embed(request, engine, intake)


@router.post("/embed/text", response_class=Response, openapi_extra=documented(EmbedOptions, "texts"))
async def embed_text(request: Request, engine: EngineDep) -> Response:
    """Embed texts ({"texts": […]} or {"inputs": …}), each refined by its neighbours in memory."""
    request.state.modality = "text"
    intake = await read_texts(request, EmbedOptions, engine.settings)
    return await _embed(request, engine, intake)


async def _embed(request: Request, engine: EngineDep, intake: ParsedRequest[EmbedOptions]) -> Response:
    query = asked(request, engine, intake.options)
    answered = await unless_gone(request, engine.embed(intake.items, query, deadline(request, engine)))
    return told(request, engine, intake.items.side, intake.options, query, answered)


def asked(request: Request, engine: Engine, options: EmbedOptions) -> Query:
    """What a request wants of its items, its snapshot pinned here. Raises BadRequest, InvalidValue, NotServing, StoreError."""
    if _wants_npy(request) and options.on_error == "null":
        raise BadRequest("on_error=null cannot be told in one npy array: ask for JSON", "on_error")
    return query_of(engine, options, engine.memories.resolve(options.memory) if options.enhance else None)


def told(
    request: Request, engine: Engine, side: Side, options: EmbedOptions, query: Query, answered: Answered
) -> Response:
    """The vectors in the form the caller asked for. Raises the first refusal unless on_error=null."""
    rows = failing(answered.rows, options.on_error)
    memory = query.snapshot.ref if query.snapshot is not None else None
    with engine.timed("serialize", side):
        if _wants_npy(request):
            vectors = np.stack([row.vector for row in rows if isinstance(row, EmbeddedItem)])
            return Response(npy(vectors), media_type=NPY, headers=headers(answered, memory))
        data = [_item(i, row, options) for i, row in enumerate(rows)]
        usage = {"prompt_tokens": answered.tokens, "total_tokens": answered.tokens}
        return reply({**frame(engine, query.snapshot), "data": data, "usage": usage}, answered)


def _wants_npy(request: Request) -> bool:
    return NPY in request.headers.get("accept", "")


def _item(index: int, row: EmbeddedItem | ItemRefused, options: EmbedOptions) -> dict[str, Any]:
    item: dict[str, Any] = {"object": "embedding", "index": index}
    if isinstance(row, ItemRefused):
        return {**item, "embedding": None, **refuse(row).body}
    item |= {"embedding": vector(row.vector, options.encoding_format), "enhanced": row.enhanced}
    if options.plain:
        item["plain"] = vector(row.plain, options.encoding_format)
    if options.neighbors:
        item["neighbors"] = row.neighbors
    return item
