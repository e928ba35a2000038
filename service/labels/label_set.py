"""A list of labels and the sentences they are put into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.errors import BadRequest, InvalidValue, TooLarge


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Candidate classes and the sentences they are put into. Checked where it is born. digest: names the content."""

    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        content = json.dumps([self.labels, self.templates]).encode()
        object.__setattr__(
            self, "digest", hashlib.sha256(content).hexdigest()
        )  # once: of a million labels it takes a second

    @classmethod
    def of(cls, labels: Sequence[str], templates: Sequence[str], max_texts: int) -> LabelSet:
        """Raises BadRequest for zero labels, InvalidValue for duplicates or a template without one {}, TooLarge beyond max_texts."""
        if not labels:
            raise BadRequest("labels is empty: send at least one label", "labels")
        if len(labels) * len(templates) > max_texts:
            raise TooLarge(
                f"{len(labels)} labels x {len(templates)} templates, at most {max_texts} texts a set: send fewer",
                "labels",
            )
        seen: set[str] = set()
        for i, label in enumerate(labels):
            if not label.strip():
                raise InvalidValue(f"labels[{i}] is blank: send a name", f"labels[{i}]")
            if label in seen:
                raise InvalidValue(f"labels[{i}] = {label[:80]!r} stands twice: each label once", f"labels[{i}]")
            seen.add(label)
        for i, template in enumerate(templates):
            if template.count("{}") != 1:
                raise InvalidValue(
                    f"templates[{i}] = {template[:80]!r} needs exactly one {{}} for the label", f"templates[{i}]"
                )
        return cls(tuple(labels), tuple(templates))

    @property
    def version(self) -> str:
        """What a caller pins: the same labels and templates always have the same one."""
        return self.digest[:12]

    @property
    def body(self) -> dict[str, Any]:
        """As the wire and the disk show it."""
        return {"labels": self.labels, "templates": self.templates}
