"""Settings: what the operator chose. Read once, frozen, passed in; order flag > environment > file > default."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from service.errors import UsageError

PREFIX = "RECO_"


def _split(value: object) -> object:
    """`a,b` from a flag or the environment, a list from a file."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Settings(BaseModel):
    """Everything that may differ between two deployments. Sizes in bytes or items, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    store: Path = Path("var/store")
    memory: str | None = None  # the default memory; None = the only one, or the starter's
    model: str = "starter"
    pretrained: str | None = None
    fusion: str | None = None  # a file, or a rule: none, mean, core, with its alpha as in mean:2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fixed_shapes: Literal["auto", "on", "off"] = "auto"  # batches padded to a few recorded sizes; auto: on CUDA
    search_devices: Annotated[
        tuple[int, ...], BeforeValidator(_split)
    ] = ()  # GPUs that hold clones of the indexes; none = the CPU

    api_keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_split)] = ()
    admin_key: SecretStr | None = None

    max_body_bytes: int = Field(64 * 2**20, ge=1024)
    max_image_bytes: int = Field(20 * 2**20, ge=1024)
    max_pixels: int = Field(64_000_000, ge=1)
    max_items: int = Field(256, ge=1)  # images or texts of one request
    max_text_chars: int = Field(100_000, ge=1)
    max_labels: int = Field(10_000, ge=1)  # texts of one list sent with a request: labels x templates
    max_stored_labels: int = Field(1_000_000, ge=1)  # texts of one stored label set
    max_label_sets: int = Field(1_000, ge=0)
    memory_budget_bytes: int = Field(
        0, ge=0
    )  # resident bytes of all memories together; 0 = 80 % of the machine's or container's
    compact_after: int = Field(
        10_000, ge=0
    )  # rows added or removed online, after which they are folded into a new version; 0 = never
    max_queue: int = Field(1024, ge=1)  # items admitted and not yet answered, per modality
    max_batch: int = Field(32, ge=1)
    max_wait_s: float = Field(0.0, ge=0, le=1)  # how long a batch may wait to fill; 0 = never
    decode_workers: int = Field(default_factory=lambda: max(2, os.cpu_count() or 2), ge=1)
    stall_s: float = Field(120.0, gt=0)  # of one batch in the model; its thread is then given up and replaced
    timeout_s: float = Field(30.0, gt=0)  # of a request once its body is here
    receive_s: float = Field(30.0, gt=0)  # for the body to arrive
    drain_s: float = Field(30.0, ge=0)
    recall_share: float = Field(
        0.01, ge=0, le=1
    )  # of the clock, spent on measuring recall with live queries; 0 = never

    @field_validator("max_queue")
    @classmethod
    def _largest_request_fits(cls, value: int, checked: ValidationInfo) -> int:
        """A request that never fits the queue would be told to retry for ever."""
        if value < checked.data.get("max_items", 0):
            raise ValueError(f"must be at least max_items, which is {checked.data['max_items']}")
        return value


def read(flags: Mapping[str, Any], config: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Merge flags (None = not given), RECO_* variables and one TOML file into Settings.

    Raises UsageError in one line that names the first wrong key, its value and what is allowed.
    """
    known = Settings.model_fields
    from_file = _toml(config) if config else {}
    from_environ = {name: environ[PREFIX + name.upper()] for name in known if PREFIX + name.upper() in environ}
    given = {name: value for name, value in flags.items() if value is not None and name in known}
    try:
        return Settings.model_validate({**from_file, **from_environ, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        where = "a flag" if key in given else f"{PREFIX}{key.upper()}" if key in from_environ else str(config)
        raise UsageError(f"{key} = {_shown(key, first['input'])} (from {where}): {first['msg'].lower()}") from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not TOML: {error}") from error


def _shown(key: str, value: object) -> str:
    return "***" if "key" in key else repr(value)
