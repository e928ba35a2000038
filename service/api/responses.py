"""Replies: the common frame of every JSON reply, vectors as JSON, base64 or .npy, and the response
headers.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from index_store import Snapshot
from service.engine import Engine
from service.errors import (
    CapacityExceeded,
    ItemRefused,
    NotServing,
    RateExceeded,
    Refusal,
    SlowSender,
    TooLarge,
    refusal,
)
from service.observability.logging import log_failure
from service.observability.metrics import Metrics
from service.pipeline.stages import EmbeddedItem, EmbedResult

NPY = "application/x-npy"


def error_response(error: Exception) -> Response:
    """The one error body, with Retry-After where a retry may help. A 5xx is logged."""
    refused = refuse(error)
    headers = {}
    if refused.status in (429, 503):
        headers["Retry-After"] = str(math.ceil(getattr(error, "retry_after_s", 1)))
    elif refused.status == 408:  # the rest of the body may still come
        headers["Connection"] = "close"
    return Response(dump_json(refused.body), refused.status, headers=headers, media_type="application/json")


def count_refusal(metrics: Metrics, error: Exception) -> None:
    """Count a request that was refused before any work was done; a full queue counts itself."""
    if isinstance(error, CapacityExceeded | NotServing | RateExceeded | SlowSender | TooLarge):
        metrics.rejected_total.labels(refusal(error).code).inc()


def refuse(error: Exception) -> Refusal:
    """The refusal that an error becomes, of a request or of one of its items. A 5xx is logged."""
    refused = refusal(error)
    if refused.status >= 500:
        log_failure(error.cause if isinstance(error, ItemRefused) else error, refused.status)
    return refused


def raise_first_refusal(
    rows: Sequence[EmbeddedItem | ItemRefused], on_error: str
) -> Sequence[EmbeddedItem | ItemRefused]:
    """Return the rows; raise the first refusal among them unless on_error is "null"."""
    if on_error == "fail":
        for row in rows:
            if isinstance(row, ItemRefused):
                raise row
    return rows


def reply_head(engine: Engine, snapshot: Snapshot | None) -> dict[str, Any]:
    """The first fields of every reply: the model, memory and fusion that made it."""
    memory = snapshot.ref if snapshot is not None else None
    return {
        "object": "list",
        "model": engine.reco.encoder.fingerprint.rpartition("@")[0],
        "memory": memory,
        "fusion": engine.reco.fusion_id,
    }


def json_reply(body: dict[str, Any], result: EmbedResult) -> Response:
    """A JSON reply; headers give the seconds of the stages and the version of the memory."""
    return Response(dump_json(body), media_type="application/json", headers=reply_headers(result, body["memory"]))


def reply_headers(result: EmbedResult, memory: str | None) -> dict[str, str]:
    """Server-Timing in milliseconds, and X-Memory-Version where a memory was asked."""
    timing = ", ".join(f"{stage};dur={1000 * seconds:.3f}" for stage, seconds in result.seconds.items())
    return {"Server-Timing": timing, **({"X-Memory-Version": memory} if memory else {})}


def encode_vector(row: np.ndarray, encoding: str) -> np.ndarray | str:
    """Return (D,) float32 for orjson, or the base64 of its little-endian bytes."""
    return row if encoding == "float" else base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")


def npy_bytes(vectors: np.ndarray) -> bytes:
    """Return (n, D) float32 as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    return buffer.getvalue()


def dump_json(body: object) -> bytes:
    """Return JSON bytes; numpy rows are written without becoming Python floats."""
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # metadata with half a surrogate pair, or an integer of more than 64 bits
        return json.dumps(body, default=lambda rows: rows.tolist(), separators=(",", ":")).encode("ascii")
