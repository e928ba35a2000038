"""POST /v1/embeddings: the OpenAI shape, so that clients which speak it need no change. GET /v1/models is in `health`: it takes no key."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.auth import WithKey
from service.api.dependencies import EngineDep, deadline, unless_gone
from service.api.openai_input import Mixed, read_input
from service.api.routes.embed import asked, told
from service.api.schemas import OpenAIOptions, documented
from service.batching.gather import gather
from service.engine import Engine
from service.errors import BadRequest
from service.pipeline.stages import Answered, Query

router = APIRouter(dependencies=[WithKey], tags=["openai"])


@router.post("/v1/embeddings", response_class=Response, openapi_extra=documented(OpenAIOptions, "input"))
async def embeddings(request: Request, engine: EngineDep) -> Response:
    """Embed texts, images or both as OpenAI's API does, each refined by its neighbours in memory; our own options are further fields."""
    mixed = await read_input(request, engine.settings)
    request.state.modality = mixed.modality
    _same_width(mixed.options, engine.reco.encoder.dim)
    query = asked(request, engine, mixed.options)
    answered = await unless_gone(request, _embedded(engine, mixed, query, deadline(request, engine)))
    return told(request, engine, mixed.parts[0].side, mixed.options, query, answered)


async def _embedded(engine: Engine, mixed: Mixed, query: Query, until: float) -> Answered:
    """Both towers at once; where one refuses its part, the other's is withdrawn."""
    return mixed.join(await gather([engine.embed(part, query, until) for part in mixed.parts]))


def _same_width(options: OpenAIOptions, dim: int) -> None:
    if options.dimensions not in (None, dim):
        raise BadRequest(
            f"dimensions = {options.dimensions}: these vectors have {dim} and cannot be shortened, leave it out",
            "dimensions",
        )
