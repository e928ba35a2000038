"""The page for people at `/`, with its policy.

It may load what it needs and nothing else, and no other site may frame it.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

PAGE = Path(__file__).parents[1] / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> FileResponse:
    """The page that compares plain and enhanced answers."""
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})
