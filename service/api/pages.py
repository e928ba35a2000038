"""The pages for people: the page at `/` and the reference at /docs and /redoc, with their policies.

Each page may load what it needs and nothing else, and no other site may frame it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse

PAGE = Path(__file__).parents[1] / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ASSETS = "https://cdn.jsdelivr.net"
INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> FileResponse:
    """The page that compares plain and enhanced answers."""
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})


@router.get("/docs")
async def swagger(request: Request) -> HTMLResponse:
    """The reference of the routes, to try them."""
    return _with_policy(get_swagger_ui_html(openapi_url=_schema(request), title="RECO Serve"))


@router.get("/redoc")
async def redoc(request: Request) -> HTMLResponse:
    """The reference of the routes, to read."""
    return _with_policy(get_redoc_html(openapi_url=_schema(request), title="RECO Serve", with_google_fonts=False))


def _schema(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/") + "/openapi.json"


def _with_policy(page: HTMLResponse) -> HTMLResponse:
    """The page with a policy that runs its own scripts, by their sha256, and the viewer's."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in INLINE_SCRIPT.findall(bytes(page.body).decode())
    ]
    own = " ".join(f"'sha256-{each}'" for each in hashes)
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src {ASSETS} {own}; style-src {ASSETS} 'unsafe-inline'; img-src 'self' https: data:; "
        "font-src data:; worker-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page
