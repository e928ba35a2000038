"""Health, metrics and what is running. No key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from service.api.dependencies import EngineDep

router = APIRouter(tags=["health"])


@router.get("/livez")
@router.get("/v2/health/live", include_in_schema=False)
@router.get("/ping", include_in_schema=False)
async def livez(engine: EngineDep) -> JSONResponse:
    """The loop and every worker answer."""
    return _told(engine.not_live())


@router.get("/readyz")
@router.get("/health")
@router.get("/v2/health/ready", include_in_schema=False)
async def readyz(engine: EngineDep) -> JSONResponse:
    """The model is warm, a memory is loaded, a real batch has passed lately, and the service is not
    shutting down.
    """
    return _told(engine.not_ready())


@router.get("/metrics", response_class=Response)
async def metrics(engine: EngineDep) -> Response:
    """Prometheus text."""
    engine.refresh_gauges()
    body, content_type = engine.metrics.render()
    return Response(body, media_type=content_type)


@router.get("/info")
async def info(engine: EngineDep) -> dict[str, Any]:
    """The model, the fusion, the live memories and the limits."""
    return engine.info()


@router.get("/v1/models")
async def models(engine: EngineDep) -> dict[str, Any]:
    """The OpenAI shape of `which model is this`."""
    name = engine.reco.encoder.fingerprint.rpartition("@")[0]
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "reco-serve"}]}


def _told(problem: str | None) -> JSONResponse:
    return JSONResponse(
        {"status": "ok"} if problem is None else {"status": "unavailable", "reason": problem},
        200 if problem is None else 503,
    )
