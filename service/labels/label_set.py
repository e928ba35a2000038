"""A label set: candidate labels and the templates that make sentences of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.errors import BadRequest, InvalidValue, TooLarge

MAX_LABEL_CHARS = 1_000  # of a label, and of a template


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Candidate labels and their templates, checked by `of`.

    digest: sha256 of the content.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        content = json.dumps([self.labels, self.templates]).encode()
        # computed once: for a million labels it takes a second
        object.__setattr__(self, "digest", hashlib.sha256(content).hexdigest())

    @classmethod
    def of(cls, labels: Sequence[str], templates: Sequence[str], max_texts: int, max_characters: int) -> LabelSet:
        """Check and make a label set.

        Raises BadRequest for zero labels, InvalidValue for a blank or repeated label, a template
        without exactly one {} or a text that is not Unicode, TooLarge for more than max_texts
        labels × templates or a text of more than MAX_LABEL_CHARS characters.
        """
        if not labels:
            raise BadRequest("labels is empty: send at least one label", "labels")
        if len(labels) * len(templates) > max_texts:
            raise TooLarge(
                f"{len(labels)} labels x {len(templates)} templates, at most {max_texts} texts a set: send fewer",
                "labels",
            )
        seen: set[str] = set()
        for i, label in enumerate(labels):
            _check_text(label, f"labels[{i}]")
            if not label.strip():
                raise InvalidValue(f"labels[{i}] is blank: send a name", f"labels[{i}]")
            if label in seen:
                raise InvalidValue(f"labels[{i}] = {label[:80]!r} stands twice: each label once", f"labels[{i}]")
            seen.add(label)
        for i, template in enumerate(templates):
            _check_text(template, f"templates[{i}]")
            if template.count("{}") != 1:
                raise InvalidValue(
                    f"templates[{i}] = {template[:80]!r} needs exactly one {{}} for the label", f"templates[{i}]"
                )
        made = cls(tuple(labels), tuple(templates))
        if (characters := made.characters) > max_characters:
            raise TooLarge(
                f"labels x templates have {characters} characters, at most {max_characters}: send fewer or "
                "shorter ones",
                "labels",
            )
        return made

    @property
    def characters(self) -> int:
        """Of all texts, each label in each template; for a million labels it takes 25 ms."""
        own = len(self.templates) * sum(map(len, self.labels))
        return own + len(self.labels) * sum(len(template) - len("{}") for template in self.templates)

    @property
    def version(self) -> str:
        """The name that a caller may pin: equal content has an equal version."""
        return self.digest[:12]

    @property
    def body(self) -> dict[str, Any]:
        """The content as replies and files hold it."""
        return {"labels": self.labels, "templates": self.templates}


def _check_text(text: str, param: str) -> None:
    """Raise TooLarge, or InvalidValue for half a surrogate pair, which no reply can hold."""
    if len(text) > MAX_LABEL_CHARS:
        raise TooLarge(f"{param} has {len(text)} characters, at most {MAX_LABEL_CHARS}: shorten it", param)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidValue(f"{param} holds half a surrogate pair: send valid Unicode", param) from error
