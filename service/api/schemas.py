"""Schemas of requests: the options of each route and the bodies of admin routes, as pydantic
models.

Options come as JSON, form fields or query parameters; `Options.read` makes one model of all three.
No request model is used outside `api`; replies are plain dictionaries (see `responses`).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from index_store.types import MAX_ID_BYTES
from service.errors import BadRequest, InvalidValue

Enhance = Literal["both", "image", "text", "none"]
# fail_fast: of a list of a million wrong items only the first is reported, and looked at.
Texts = Annotated[list[str], Field(fail_fast=True)]
ExcludedId = int | Annotated[str, Field(max_length=MAX_ID_BYTES)]


class Options(BaseModel):
    """Options that every embedding route takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: str | None = Field(None, description="a memory's name, or name@version to pin; default: the server's")
    # the upper limit is the model's: `Engine.query`
    k: int | None = Field(None, ge=1, description="neighbours per item; default: the fusion's")
    neighbors: bool = Field(False, description="return the neighbours of each item")
    max_similarity: float | None = Field(None, gt=-1, le=1.001, description="ignore neighbours nearer than this")
    exclude: Annotated[list[ExcludedId], Field(fail_fast=True)] = Field(
        default_factory=list, max_length=1000, description="ignore neighbours with these ids"
    )
    on_error: Literal["fail", "null"] = Field(
        "fail", description="null: a bad item becomes null, the others are answered"
    )

    @classmethod
    def read(cls, *sources: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Self:
        """Make one model of JSON objects and of repeated (name, text) pairs; later sources win.

        Raises BadRequest for an option that does not exist, InvalidValue for a wrong type or range.
        """
        merged: dict[str, Any] = {}
        for source in sources:
            merged.update(source if isinstance(source, Mapping) else cls._from_text(source))
        for name in merged.keys() - cls.model_fields.keys():
            known = ", ".join(sorted(cls.model_fields))
            raise BadRequest(f"unknown option {name[:80]!r}: this route takes {known}", name[:80])
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise cls._refuse(error) from error

    @classmethod
    def _from_text(cls, fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Form fields or query parameters: a list is one JSON string or a repeated field."""
        values: dict[str, list[Any]] = {}
        for name, value in fields:
            values.setdefault(name, []).append(value)
        return {name: _parse_list(name, found) if name in LIST_OPTIONS else found[-1] for name, found in values.items()}

    @classmethod
    def _refuse(cls, error: ValidationError) -> InvalidValue:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "body"
        shown = _show(first["input"]) if first["type"] != "value_error" else ""
        return InvalidValue(
            f"{name} = {shown}: {first['msg']}" if shown else first["msg"].removeprefix("Value error, "), name
        )


class EmbedOptions(Options):
    """Options of /embed/image and /embed/text."""

    enhance: bool = Field(True, description="false gives the plain CLIP vector")
    plain: bool = Field(False, description="return the plain vector beside the enhanced one")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 = little-endian float32")


class OpenAIOptions(EmbedOptions):
    """Options of /v1/embeddings: ours, and OpenAI's own."""

    model: str | None = Field(None, description="any name: the reply tells which model answered")
    modality: Literal["text", "image"] = Field(
        "text", description="what a bare string of input is; image: base64 or a data URI"
    )
    dimensions: int | None = Field(
        None, description="the model's own width, or left out: CLIP vectors cannot be shortened"
    )
    user: str | None = Field(None, description="ignored")


class ClassifyOptions(Options):
    """Options of /classify."""

    enhance: Enhance = Field("both", description="enhance the items (image), the labels (text), both or none")
    labels: Texts | None = Field(None, description="candidate labels; or name a stored set in label_set")
    label_set: str | None = Field(None, description="a stored label set, or NAME@VERSION to pin what it held")
    templates: Texts = Field(default_factory=lambda: ["a photo of a {}."], min_length=1, description="each with one {}")
    top_k: int = Field(
        5,
        ge=1,
        description="labels returned per item; scores are a softmax over all labels, returned or not, or with "
        "a model trained by sigmoids (SigLIP) independent probabilities; `scores` of the reply says which",
    )

    @model_validator(mode="after")
    def _require_one_source_of_labels(self) -> Self:
        if (self.labels is None) == (self.label_set is None):
            raise ValueError("send either labels or label_set")
        return self


class LabelSetBody(BaseModel):
    """PUT /label-sets/{name}."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: Texts
    templates: Texts = Field(default_factory=lambda: ["a photo of a {}."], min_length=1)


class ActivateBody(BaseModel):
    """POST /memories/{name}/activate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    dry_run: bool = False


def _decode_floats(value: object) -> object:
    """Decode base64 of little-endian float32; a list of numbers stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return np.frombuffer(base64.b64decode(value, validate=True), "<f4").tolist()
    except (binascii.Error, ValueError) as error:
        raise ValueError("neither a list of numbers nor base64 of little-endian float32") from error


Vector = Annotated[list[float], Field(fail_fast=True), BeforeValidator(_decode_floats)]


class PairBody(BaseModel):
    """One pair; each side is given as it is, or as the vector that this encoder made of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | int
    caption: str
    image: str | None = Field(None, description="base64 or data URI")
    image_embedding: Vector | None = Field(None, description="the plain CLIP vector; numbers, or base64 float32")
    image_key: Vector | None = Field(
        None, description="with image_embedding, where the memory's image search compares trunk features"
    )
    text_embedding: Vector | None = Field(None, description="the plain CLIP vector of the caption")
    metadata: dict[str, Any] = {}


class PairsBody(BaseModel):
    """POST /memories/{name}/pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pairs: Annotated[list[PairBody], Field(fail_fast=True)] = Field(min_length=1)


def describe_body(options: type[Options], *items: Literal["images", "texts", "input"]) -> dict[str, Any]:
    """The request body for /docs, since routes read several shapes by hand, which FastAPI cannot
    see.
    """
    known = options.model_json_schema()["properties"]
    strings = {"type": "array", "items": {"type": "string"}}
    descriptions = {
        "images": "base64 or data URIs",
        "texts": "texts",
        "input": "strings, or objects {text} and {image}",
    }
    shapes = {"input": {"type": "array", "items": {}}}  # not strings alone
    given = {name: {**shapes.get(name, strings), "description": descriptions[name]} for name in items}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object", "properties": {**given, **known}}}}
    if "images" in items:
        files = {"type": "array", "items": {"type": "string", "format": "binary"}}
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": {"file": files, **known}, "required": ["file"]}
        }
        content["image/*"] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}


LIST_OPTIONS = frozenset({"exclude", "labels", "templates"})


def _parse_list(name: str, found: list[Any]) -> list[Any]:
    if len(found) == 1 and isinstance(found[0], str) and found[0].lstrip().startswith("["):
        try:
            parsed = orjson.loads(found[0])
        except orjson.JSONDecodeError as error:
            raise InvalidValue(f"{name} is neither a JSON list nor a repeated field: {error}", name) from error
        return list(parsed)
    return found


def _show(value: object) -> str:
    """The beginning of a wrong value, for a message; of a list or an object its size alone."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return json.dumps(value[:80] if isinstance(value, str) else value, default=str)[:80]
