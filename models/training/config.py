"""Configuration of `reco train`, read strictly from TOML: an unknown key or a wrong type is an
error that names it.
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
    """One [[episodes]] table: training pairs and the memory that they query.

    sources: as for `reco memory build`; ${NAME} is an environment variable.
    caption: a template over the metadata.  memory: NAME or NAME@VERSION in the store.
    max_image_similarity, max_text_similarity: neighbours with a greater cosine are skipped; leave
    the text limit out where many pairs share one caption, as with class names.
    """

    sources: tuple[str, ...]
    memory: str
    caption: str | None = None
    max_image_similarity: float | None = 0.98
    max_text_similarity: float | None = None


@dataclass(frozen=True, slots=True, config=STRICT)
class TrainConfig:
    """Configuration of one training run. Paths are relative to the working directory.

    k: neighbours looked up; each step uses a random number of them, at most k.  terms: enabled
    terms of the loss.
    learning_rate, pool_learning_rate: of the layers, and of the few parameters of the training-free
    rule.
    clip: maximum gradient norm.  learn_scale: whether the loss learns its temperature, starting at
    CLIP's.
    every: steps between two evaluations of the held-out accuracy, and between two checkpoints.
    patience: evaluations without improvement before the run stops with the best weights; 0 = never.
    precision: "bf16" runs the layers in bfloat16, the weights stay float32.
    compile: torch.compile for the layers, which needs a C++ compiler; docs/concepts/results.md says
    where it helps.  tensorboard: write the curve for TensorBoard too.
    drop: share of the neighbours masked in each step.  held_out: share of the photos held out for
    the accuracy before and after.
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
        """Read a TOML file; ConfigError in one line where it is invalid."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # also no UTF-8, and endless numbers
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


def expand_source(source: str) -> Path:
    """The path of a source with ${NAME} replaced from the environment. ConfigError where NAME is
    not set.
    """
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
