"""The TOML file of `reco train`, read strictly: an unknown key or a wrong type is an error that
names it.
"""

import difflib
import json
import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from models.encoder.encoder import EncoderSpec
from models.errors import ConfigError
from models.fusion.fusion import PRESETS

Term: TypeAlias = Literal["both", "image", "text"]
TERMS: tuple[Term, ...] = ("both", "image", "text")
STRICT = ConfigDict(strict=True, extra="forbid")


def _check_preset(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"must be one of {', '.join(PRESETS)}")
    return name


@dataclass(frozen=True, slots=True, config=STRICT)
class EpisodeConfig:
    """One [[episodes]] table: pairs to learn from, and the memory they ask.

    sources: tars and folders as for `reco memory build`; ${NAME} stands for an environment
    variable.
    caption: a template over the metadata.  memory: NAME or NAME@VERSION in the store.
    max_image_similarity, max_text_similarity: neighbours nearer than this are passed over; leave
    the text one out where many pairs share one caption, as with class names.
    """

    sources: tuple[str, ...]
    memory: str
    caption: str | None = None
    max_image_similarity: float | None = 0.98
    max_text_similarity: float | None = None


@dataclass(frozen=True, slots=True, config=STRICT)
class TrainConfig:
    """What to learn and from what. Paths are relative to the working directory.

    k: neighbours looked up; each step uses a random number of them up to k.  terms: which of the
    three terms of the loss are on.
    pool_learning_rate: for the few numbers of the training-free rule, learning_rate for all the
    rest.
    clip: the longest gradient.  learn_scale: whether the loss learns its own temperature, from
    CLIP's on.
    every: steps between two looks at the held-out accuracy and two checkpoints.  patience: looks
    without a better one before the run stops with the best it saw; 0 = never.
    precision: "bf16" does the arithmetic of the layers in half the bits, the weights stay fp32.
    compile: the layers through torch.compile, which needs a C++ compiler; where they help is told
    in docs/concepts/results.md.  tensorboard: the curve for TensorBoard too, beside curve.jsonl.
    drop: share of the neighbours hidden in each step.  held_out: share of the photos kept for the
    accuracy before and after.
    """

    output: str
    episodes: Annotated[tuple[EpisodeConfig, ...], Field(min_length=1)]
    store: str = "var/store"
    model: str = "starter"
    pretrained: str | None = None
    tokenizer: Path | None = None
    device: str = "auto"
    preset: Annotated[str, AfterValidator(_check_preset)] = "default"
    alpha: float = 1.0
    k: int = 10
    steps: Annotated[int, Field(ge=1)] = 500
    batch: Annotated[int, Field(ge=2)] = 256  # a loss needs something to tell apart
    learning_rate: float = 1e-5
    pool_learning_rate: float = 0.03
    weight_decay: float = 0.01
    seed: int = 0
    terms: Annotated[tuple[Term, ...], Field(min_length=1)] = TERMS
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.1
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    learn_scale: bool = False
    every: Annotated[int, Field(ge=1)] = 50
    patience: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    tensorboard: bool = False

    @classmethod
    def read(cls, path: Path) -> "TrainConfig":
        """The configuration in a TOML file, or ConfigError in one line."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path.name} cannot be read as TOML ({error}): correct it") from error
        try:
            # as JSON, since an array of TOML is a list, which a strict tuple takes from JSON alone
            return TypeAdapter(cls).validate_json(json.dumps(table, default=str))
        except ValidationError as error:
            raise ConfigError(_describe(error)) from error

    @property
    def encoder(self) -> EncoderSpec:
        """The encoder whose vectors are refined."""
        return EncoderSpec(self.model, self.pretrained, device=self.device, tokenizer=self.tokenizer)


def expanded(source: str) -> Path:
    """The path of a source, ${NAME} replaced from the environment."""
    path = os.path.expandvars(source)
    if "$" in path:
        raise ConfigError(f"source {source!r} names an environment variable that is not set: set it, or write the path")
    return Path(path)


def _describe(error: ValidationError) -> str:
    """The first mistake in one line: key, value and what is allowed; an unknown key goes first."""
    first = min(error.errors(), key=lambda mistake: mistake["type"] != "unexpected_keyword_argument")
    names = [str(part) for part in first["loc"] if not isinstance(part, int)]
    in_episodes = names[:1] == ["episodes"]
    key = names[-1] if not in_episodes or len(names) > 1 else "episodes"
    where = "[[episodes]] " if in_episodes and len(names) > 1 else ""
    if first["type"] == "unexpected_keyword_argument":
        known = [item.name for item in fields(EpisodeConfig if where else TrainConfig)]
        near = difflib.get_close_matches(key, known, n=1)
        return (
            f"unknown key {where}{key!r}: {f'did you mean {near[0]!r}' if near else 'the keys are ' + ', '.join(known)}"
        )
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}{key} is missing: set it"
    if key == "episodes":
        return "episodes must be [[episodes]] tables: write one for each memory"
    return f"{where}{key} is {_shorten(first['input'])}: {first['msg'].removeprefix('Value error, ')}"


def _shorten(value: Any) -> str:
    return repr(value)[:80]
