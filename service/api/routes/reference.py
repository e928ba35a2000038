"""The reference of the routes at /docs, written from the OpenAPI document.

A page without a script that asks no other host: a viewer from a content network would run foreign
code beside the keys that are typed into this site, and would be empty without the internet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse

POLICY = (
    "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CODE = re.compile(r"`([^`]+)`")

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body. default: "required", JSON in backticks, or "" without one."""

    name: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route, as the OpenAPI document describes it.

    parameters: (name, place, meaning).  bodies: the fields by content type; none where the bytes
    themselves are the body.
    """

    title: str
    description: str
    parameters: Sequence[tuple[str, str, str]]
    bodies: Mapping[str, Sequence[Field]]


@router.get("/docs")
async def reference(request: Request) -> HTMLResponse:
    """The reference of the routes."""
    return HTMLResponse(_page(request.app.openapi()), headers={"Content-Security-Policy": POLICY})


@router.get("/redoc")
async def redoc() -> RedirectResponse:
    """The same page, where readers of FastAPI's services look for it."""
    return RedirectResponse("docs")


def operations(document: Mapping[str, Any]) -> Iterator[Operation]:
    """Every method of every route of an OpenAPI document."""
    schemas = document.get("components", {}).get("schemas", {})
    for path, methods in document["paths"].items():
        for method, found in methods.items():
            content = found.get("requestBody", {}).get("content", {})
            yield Operation(
                f"{method.upper()} {path}",
                found.get("description", found.get("summary", "")),
                [(each["name"], each["in"], each.get("description", "")) for each in found.get("parameters", [])],
                {kind: _fields(_resolve(body.get("schema", {}), schemas), schemas) for kind, body in content.items()},
            )


def _resolve(schema: dict[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = schemas.get(name, schema)
    return found


def _fields(schema: dict[str, Any], schemas: Mapping[str, Any]) -> list[Field]:
    required = set(schema.get("required", []))
    return [
        Field(
            name,
            _kind(each, schemas),
            "required" if name in required else _shown(each.get("default")),
            each.get("description", ""),
        )
        for name, each in schema.get("properties", {}).items()
    ]


def _kind(schema: dict[str, Any], schemas: Mapping[str, Any]) -> str:
    schema = _resolve(schema, schemas)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        kinds = [_kind(each, schemas) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(kinds)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}), schemas)}"
    return str(schema.get("type", "any"))


def _shown(default: object) -> str:
    return "" if default is None else f"`{json.dumps(default)}`"


def _page(document: Mapping[str, Any]) -> str:
    found = list(operations(document))
    links = "".join(f'<li><a href="#{i}">{escape(each.title)}</a></li>' for i, each in enumerate(found))
    sections = "".join(_section(str(i), each) for i, each in enumerate(found))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>RECO Serve: reference</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="page/reference.css"></head><body><h1>RECO Serve: reference</h1>'
        '<p>For programs: <a href="openapi.json">openapi.json</a>. To try it: <a href="./">the page</a>. '
        "A key is sent as <code>Authorization: Bearer KEY</code>.</p>"
        f"<nav><ul>{links}</ul></nav><main>{sections}</main></body></html>"
    )


def _section(anchor: str, operation: Operation) -> str:
    text = "".join(f"<p>{_html(part)}</p>" for part in operation.description.split("\n\n"))
    tables = _table(("parameter", "in", "meaning"), operation.parameters)
    for kind, fields in operation.bodies.items():
        rows = [(each.name, each.kind, each.default, each.meaning) for each in fields]
        bytes_alone = "" if rows else ": the bytes themselves; options are query parameters"
        tables += f"<h3>{escape(kind)}{bytes_alone}</h3>" + _table(("field", "type", "default", "meaning"), rows)
    return f'<section id="{anchor}"><h2>{escape(operation.title)}</h2>{text}{tables}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{_html(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f"<table><tr>{''.join(f'<th>{each}</th>' for each in head)}</tr>{lines}</table>"


def _html(text: str) -> str:
    return CODE.sub(r"<code>\1</code>", escape(text))
