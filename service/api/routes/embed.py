"""POST /embed/image and /embed/text."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from index_store import Side
from service.api.auth import ReadRoute
from service.api.dependencies import EngineDep, deadline, query_of, run_until_disconnect, spend_items
from service.api.requests import ParsedRequest, read_images, read_texts
from service.api.responses import (
    NPY,
    encode_vector,
    json_reply,
    npy_bytes,
    raise_first_refusal,
    refuse,
    reply_head,
    reply_headers,
)
from service.api.schemas import EmbedOptions, describe_body
from service.engine import Engine
from service.errors import BadRequest, ItemRefused
from service.pipeline.stages import EmbeddedItem, EmbedResult, Query

router = APIRouter(route_class=ReadRoute, tags=["embed"])


@router.post("/embed/image", response_class=Response, openapi_extra=describe_body(EmbedOptions, "images"))
async def embed_image(request: Request, engine: EngineDep) -> Response:
    """Embed images, each refined by its neighbours in memory.

    The body is a form (field `file`), the bytes of one image, or JSON {"images": [base64]}.
    """
    request.state.modality = "image"
    return await _embed(request, engine, await read_images(request, EmbedOptions, engine.settings))


@router.post("/embed/text", response_class=Response, openapi_extra=describe_body(EmbedOptions, "texts"))
async def embed_text(request: Request, engine: EngineDep) -> Response:
    """Embed texts ({"texts": […]} or {"inputs": …}), each refined by its neighbours in memory."""
    request.state.modality = "text"
    return await _embed(request, engine, await read_texts(request, EmbedOptions, engine.settings))


async def _embed(request: Request, engine: Engine, parsed: ParsedRequest[EmbedOptions]) -> Response:
    spend_items(request, parsed.items)
    query = pin_query(request, engine, parsed.options)
    result = await run_until_disconnect(request, engine.embed(parsed.items, query, deadline(request, engine)))
    return build_reply(request, engine, parsed.items.side, parsed.options, query, result)


def pin_query(request: Request, engine: Engine, options: EmbedOptions) -> Query:
    """The query of a request, its snapshot pinned here.

    Raises BadRequest, InvalidValue, NotServing, StoreError.
    """
    if _wants_npy(request) and options.on_error == "null":
        raise BadRequest("on_error=null cannot be told in one npy array: ask for JSON", "on_error")
    return query_of(engine, options, engine.memories.resolve(options.memory) if options.enhance else None)


def build_reply(
    request: Request, engine: Engine, side: Side, options: EmbedOptions, query: Query, result: EmbedResult
) -> Response:
    """The vectors as JSON or .npy. Raises the first refusal unless on_error=null."""
    rows = raise_first_refusal(result.rows, options.on_error)
    memory = query.snapshot.ref if query.snapshot is not None else None
    with engine.metrics.time_stage("serialize", side):
        if _wants_npy(request):
            vectors = np.stack([row.vector for row in rows if isinstance(row, EmbeddedItem)])
            return Response(npy_bytes(vectors), media_type=NPY, headers=reply_headers(result, memory))
        data = [_describe(i, row, options) for i, row in enumerate(rows)]
        usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
        return json_reply({**reply_head(engine, query.snapshot), "data": data, "usage": usage}, result)


def _wants_npy(request: Request) -> bool:
    return NPY in request.headers.get("accept", "")


def _describe(index: int, row: EmbeddedItem | ItemRefused, options: EmbedOptions) -> dict[str, Any]:
    """One element of `data`."""
    item: dict[str, Any] = {"object": "embedding", "index": index}
    if isinstance(row, ItemRefused):
        return {**item, "embedding": None, **refuse(row).body}
    item |= {"embedding": encode_vector(row.vector, options.encoding_format), "enhanced": row.enhanced}
    if options.plain:
        item["plain"] = encode_vector(row.plain, options.encoding_format)
    if options.neighbors:
        item["neighbors"] = row.neighbors
    return item
