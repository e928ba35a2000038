"""Parsing of OpenAI's `input`: texts, images, or both, as a part for each tower and the order to
join them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from index_store import Side
from service.api.json_body import read_json
from service.api.requests import check_count, read_image, read_text
from service.api.schemas import OpenAIOptions
from service.errors import BadRequest, InvalidValue, ItemRefused
from service.observability.metrics import Modality
from service.pipeline.stages import EmbeddedItem, EmbedResult, Items, slowest_stages
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class MixedInput:
    """The items of `input`, by tower.

    parts: at most one per tower, none empty.  places[p][i]: the place of item i of part p in
    `input`.
    """

    parts: Sequence[Items]
    places: Sequence[Sequence[int]]
    options: OpenAIOptions

    @property
    def modality(self) -> Modality:
        """The modality of the request, for its metrics."""
        return "mixed" if len(self.parts) > 1 else self.parts[0].side

    def join(self, results: Sequence[EmbedResult]) -> EmbedResult:
        """Join the results in the order of `input`; a refusal names its place there."""
        rows: dict[int, EmbeddedItem | ItemRefused] = {}
        for places, result in zip(self.places, results, strict=True):
            rows.update((place, _rename_refusal(row, place)) for place, row in zip(places, result.rows, strict=True))
        return EmbedResult(
            [rows[place] for place in sorted(rows)], slowest_stages(results), sum(result.tokens for result in results)
        )


async def read_input(request: Request, settings: Settings) -> MixedInput:
    """Read `input`: texts, data URIs (with modality=image), or objects {text} and {image}."""
    body = await read_json(request, settings)
    if "input" not in body:
        raise BadRequest("send input: a string, a list of strings, or a list of {text} and {image} objects", "input")
    rest = {
        name: value for name, value in body.items() if name != "input" and value is not None
    }  # clients send null for "not given"
    options = OpenAIOptions.read(request.query_params.multi_items(), rest)
    items = body["input"] if isinstance(body["input"], list) else [body["input"]]
    _side_of(next(iter(items), ""), 0, options.modality)  # a list of token ids has a message of its own
    check_count(items, "input", settings)
    sides = [_side_of(item, i, options.modality) for i, item in enumerate(items)]
    parts, places = [], []
    for side in dict.fromkeys(sides):
        own_places = [i for i, each in enumerate(sides) if each == side]
        parts.append(_read_part(side, {i: items[i] for i in own_places}, settings))
        places.append(own_places)
    return MixedInput(parts, places, options)


def _side_of(item: object, index: int, modality: Side) -> Side:
    """Which tower an item of `input` goes through."""
    if isinstance(item, str):
        return modality
    if isinstance(item, int) or (isinstance(item, list) and all(isinstance(token, int) for token in item)):
        raise BadRequest(
            f"input[{index}] is made of token ids, and theirs is another vocabulary: send the text itself",
            f"input[{index}]",
        )
    if isinstance(item, dict) and len(item) == 1 and item.keys() <= {"text", "image"}:
        return "text" if "text" in item else "image"
    raise InvalidValue(
        f"input[{index}] is a {type(item).__name__}: send a string, {{text}} or {{image}}", f"input[{index}]"
    )


def _read_part(side: Side, items: Mapping[int, Any], settings: Settings) -> Items:
    """Read the items of one tower. items: by their place in `input`."""
    bare = {i: item[side] if isinstance(item, dict) else item for i, item in items.items()}
    if side == "text":
        return Items([], [read_text(item, f"input[{i}]", settings) for i, item in bare.items()])
    return Items([read_image(item, i, settings) for i, item in bare.items()], [])


def _rename_refusal(row: EmbeddedItem | ItemRefused, place: int) -> EmbeddedItem | ItemRefused:
    return ItemRefused(f"input[{place}]", row.cause) if isinstance(row, ItemRefused) else row
