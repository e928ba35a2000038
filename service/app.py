"""The FastAPI application: routes, error handlers and middleware around an opened engine.

The engine is opened before, so that a wrong setting is one line on stderr and not a stack trace.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from index_store.errors import StoreError
from models.errors import ModelError
from service.api import pages
from service.api.dependencies import engine_of
from service.api.middleware import RequestMiddleware
from service.api.responses import count_refusal, dump_json, error_response
from service.api.routes import classify, embed, health, label_sets, memories, openai, reference
from service.batching.batcher import BatcherError
from service.engine import Engine
from service.errors import Refusal, ServiceError


def create_app(engine: Engine) -> FastAPI:
    """Assemble the application; its lifespan starts and stops the batchers of the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine.running():
            yield

    app = FastAPI(
        title="RECO Serve",
        version=version("reco-serve"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        summary="Retrieval-enhanced CLIP embeddings",
    )
    app.state.engine = engine
    for family in (embed, openai, classify, label_sets, memories, health, pages, reference):
        app.include_router(family.router)
    app.include_router(label_sets.write_router)
    app.include_router(memories.admin_router)
    app.mount("/page", StaticFiles(directory=pages.PAGE), name="page")
    for kind in (ServiceError, StoreError, ModelError, BatcherError):
        app.add_exception_handler(kind, _answer_refusal)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
    app.add_middleware(RequestMiddleware, engine=engine)
    return app


async def _answer_refusal(request: Request, error: Exception) -> Response:
    count_refusal(engine_of(request).metrics, error)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer Starlette's own errors (no such route, wrong method) in the one error body."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for this class alone
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    refusal = Refusal(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}; GET /docs lists the routes",
        "invalid_request_error",
        code,
    )
    return Response(dump_json(refusal.body), refusal.status, headers=error.headers, media_type="application/json")


async def _answer_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; it is counted and logged
