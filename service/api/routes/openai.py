"""POST /v1/embeddings: the shape of OpenAI's API, for clients that speak it.

GET /v1/models is in `health`, since it takes no key.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.auth import ReadRoute
from service.api.dependencies import EngineDep, deadline, run_until_disconnect, spend_items
from service.api.openai_input import MixedInput, read_input
from service.api.routes.embed import build_reply, pin_query
from service.api.schemas import OpenAIOptions, describe_body
from service.batching.run_parts import gather_parts
from service.engine import Engine
from service.errors import BadRequest
from service.pipeline.stages import EmbedResult, Query

router = APIRouter(route_class=ReadRoute, tags=["openai"])


@router.post("/v1/embeddings", response_class=Response, openapi_extra=describe_body(OpenAIOptions, "input"))
async def embeddings(request: Request, engine: EngineDep) -> Response:
    """Embed texts, images or both as OpenAI's API does, each refined by its neighbours in memory.

    Our own options are further fields.
    """
    mixed = await read_input(request, engine.settings)
    request.state.modality = mixed.modality
    _check_dimensions(mixed.options, engine.reco.encoder.dim)
    spend_items(request, *mixed.parts)
    query = pin_query(request, engine, mixed.options)
    result = await run_until_disconnect(request, _embed(engine, mixed, query, deadline(request, engine)))
    return build_reply(request, engine, mixed.parts[0].side, mixed.options, query, result)


async def _embed(engine: Engine, mixed: MixedInput, query: Query, until: float) -> EmbedResult:
    """Run both towers at once; where one refuses its part, the other part is withdrawn."""
    return mixed.join(await gather_parts([engine.embed(part, query, until) for part in mixed.parts]))


def _check_dimensions(options: OpenAIOptions, dim: int) -> None:
    if options.dimensions not in (None, dim):
        raise BadRequest(
            f"dimensions = {options.dimensions}: these vectors have {dim} and cannot be shortened, leave it out",
            "dimensions",
        )
