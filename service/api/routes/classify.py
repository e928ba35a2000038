"""POST /classify: zero-shot classification of images or texts against labels."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.auth import ReadRoute
from service.api.dependencies import EngineDep, deadline, query_of, run_until_disconnect, spend_items
from service.api.requests import ParsedRequest, read_images_or_texts
from service.api.responses import json_reply, raise_first_refusal, refuse, reply_head
from service.api.schemas import ClassifyOptions, describe_body
from service.engine import Engine
from service.errors import ItemRefused, TooLarge
from service.labels.label_set import MAX_LABEL_CHARS, LabelSet
from service.labels.scoring import Ranked
from service.pipeline.stages import EmbeddedItem, EmbedResult

router = APIRouter(route_class=ReadRoute, tags=["classify"])
SCORE_BYTES = 50  # {"label":"","score":0.0123456789012345},


@router.post(
    "/classify",
    response_class=Response,
    openapi_extra=describe_body(ClassifyOptions, "images", "texts"),
)
async def classify(request: Request, engine: EngineDep) -> Response:
    """Score images or texts against labels.

    `enhance` says which side the memory refines: image (the items), text (the labels), both, none.
    `scores` of the reply says how the model was trained: "softmax" over all labels, or "sigmoid",
    a probability of each label by itself.
    """
    parsed = await read_images_or_texts(request, ClassifyOptions, engine.settings)
    request.state.modality = parsed.items.side
    spend_items(request, parsed.items)
    # reading a large set takes a second
    labels = await asyncio.to_thread(_find_labels, engine, parsed)
    body, result = await run_until_disconnect(request, _classify(request, engine, parsed, labels))
    with engine.metrics.time_stage("serialize", parsed.items.side):
        return json_reply(body, result)


async def _classify(
    request: Request, engine: Engine, parsed: ParsedRequest[ClassifyOptions], labels: LabelSet
) -> tuple[dict[str, Any], EmbedResult]:
    options, until = parsed.options, deadline(request, engine)
    # one for both sides
    snapshot = None if options.enhance == "none" else engine.memories.resolve(options.memory)
    query = query_of(engine, options, snapshot if options.enhance in ("both", "image") else None)
    result = await engine.embed(parsed.items, query, until)
    rows = raise_first_refusal(result.rows, options.on_error)
    good = [row for row in rows if isinstance(row, EmbeddedItem)]
    labels_snapshot = snapshot if options.enhance in ("both", "text") else None
    ranked = await engine.rank(good, labels, labels_snapshot, options.top_k, until) if good else None
    scores = iter(await asyncio.to_thread(_describe, ranked, labels) if ranked is not None else [])
    body: dict[str, Any] = {**reply_head(engine, snapshot)}
    if options.label_set is not None:
        body["label_set"] = f"{options.label_set.partition('@')[0]}@{labels.version}"
    body["scores"] = engine.score_function.name
    body["data"] = [None if isinstance(row, ItemRefused) else next(scores) for row in rows]
    if options.neighbors:
        body["neighbors"] = [[] if isinstance(row, ItemRefused) else row.neighbors for row in rows]
    if len(good) < len(rows):
        body["errors"] = [refuse(row).body["error"] if isinstance(row, ItemRefused) else None for row in rows]
    return body, result


def _check_reply_size(parsed: ParsedRequest[ClassifyOptions], labels: LabelSet, max_bytes: int) -> None:
    """Raise TooLarge where the labels and scores alone would be longer than a reply may be."""
    items, shown = max(len(parsed.items.images), len(parsed.items.texts)), min(parsed.options.top_k, len(labels.labels))
    if items * shown * (SCORE_BYTES + 4 * MAX_LABEL_CHARS) <= max_bytes:
        return  # whatever the labels are; to measure a million of them takes 0.15 s
    mean_bytes = sum(len(label.encode()) for label in labels.labels) / len(labels.labels)
    size = items * shown * (SCORE_BYTES + mean_bytes)
    if size > max_bytes:
        raise TooLarge(
            f"{items} items with the best {shown} labels make a reply of about {size:.0f} bytes, at most {max_bytes}: "
            "lower top_k or send fewer items",
            "top_k",
        )


def _find_labels(engine: Engine, parsed: ParsedRequest[ClassifyOptions]) -> LabelSet:
    """The stored set that is named, or the labels that were sent, checked."""
    options, sets = parsed.options, engine.label_sets
    if options.label_set is not None:
        labels = sets.get(options.label_set)
    else:
        labels = sets.check(options.labels or [], options.templates)
    _check_reply_size(parsed, labels, engine.settings.max_reply_bytes)
    return labels


def _describe(ranked: Ranked, labels: LabelSet) -> list[list[dict[str, Any]]]:
    """The best labels of each row, as the reply shows them."""
    rows = zip(ranked.labels.tolist(), ranked.scores.tolist(), strict=True)
    return [
        [{"label": labels.labels[j], "score": score} for j, score in zip(best, scores, strict=True)]
        for best, scores in rows
    ]
