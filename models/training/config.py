"""The TOML file of `reco train`, read strictly: an unknown key or a wrong type is an error that
names it.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from models.encoder.encoder import EncoderSpec
from models.errors import ConfigError
from models.fusion.fusion import PRESETS

TERMS = ("both", "image", "text")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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
    episodes: tuple[EpisodeConfig, ...]
    store: str = "var/store"
    model: str = "starter"
    pretrained: str | None = None
    device: str = "auto"
    preset: str = "default"
    alpha: float = 1.0
    k: int = 10
    steps: int = 500
    batch: int = 256
    learning_rate: float = 1e-5
    pool_learning_rate: float = 0.03
    weight_decay: float = 0.01
    seed: int = 0
    terms: tuple[str, ...] = TERMS
    drop: float = 0.1
    held_out: float = 0.1
    clip: float = 1.0
    learn_scale: bool = False
    every: int = 50
    patience: int = 0
    precision: str = "fp32"
    compile: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _require(self.preset in PRESETS, "preset", self.preset, f"one of {', '.join(PRESETS)}")
        _require(
            bool(self.terms) and set(self.terms) <= set(TERMS), "terms", list(self.terms), f"some of {', '.join(TERMS)}"
        )
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        _require(self.batch >= 2, "batch", self.batch, "at least 2: a loss needs something to tell apart")
        _require(self.clip > 0, "clip", self.clip, "above 0")
        _require(self.every >= 1, "every", self.every, "at least 1")
        _require(self.patience >= 0, "patience", self.patience, "0 for never, or a number of looks")
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        _require(0 <= self.drop < 1, "drop", self.drop, "a share from 0 to below 1")
        _require(0 < self.held_out < 1, "held_out", self.held_out, "a share between 0 and 1")
        _require(bool(self.episodes), "episodes", [], "at least one [[episodes]] table")

    @classmethod
    def read(cls, path: Path) -> "TrainConfig":
        """The configuration in a TOML file, or ConfigError in one line."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path.name} cannot be read as TOML ({error}): correct it") from error
        episodes = table.get("episodes", [])
        if not isinstance(episodes, list) or not all(isinstance(episode, dict) for episode in episodes):
            raise ConfigError("episodes must be [[episodes]] tables: write one for each memory")
        read = tuple(EpisodeConfig(**_checked(EpisodeConfig, episode, "[[episodes]] ")) for episode in episodes)
        return cls(**_checked(cls, {**table, "episodes": read}, ""))

    @property
    def encoder(self) -> EncoderSpec:
        """The encoder whose vectors are refined."""
        return EncoderSpec(self.model, self.pretrained, device=self.device)


def expanded(source: str) -> Path:
    """The path of a source, ${NAME} replaced from the environment."""
    path = os.path.expandvars(source)
    if "$" in path:
        raise ConfigError(f"source {source!r} names an environment variable that is not set: set it, or write the path")
    return Path(path)


def _require(fine: bool, key: str, value: object, wanted: str) -> None:
    if not fine:
        raise ConfigError(f"{key} is {value!r}: it must be {wanted}")


def _checked(kind: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table as keyword arguments of a dataclass: arrays become tuples, integers may stand for
    floats.
    """
    types, known = get_type_hints(kind), {item.name: item for item in fields(kind)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"unknown key {where}{key!r}: {f'did you mean {near[0]!r}' if near else 'the keys are ' + ', '.join(known)}"
            )
    for name, item in known.items():
        if name not in table and item.default is MISSING:
            raise ConfigError(f"{where}{name} is missing: set it")
    return {key: _typed(where + key, value, types[key]) for key, value in table.items()}


def _typed(key: str, value: Any, wanted: Any) -> Any:
    choices = [
        choice
        for choice in (get_args(wanted) if isinstance(wanted, UnionType) else (wanted,))
        if choice is not NoneType
    ]
    if get_origin(choices[0]) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} is {value!r}: it must be an array")
        return tuple(_typed(key, item, get_args(choices[0])[0]) for item in value)
    if choices[0] is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, choices[0]):
        raise ConfigError(f"{key} is {value!r}: it must be {choices[0].__name__}")
    return value
