"""Settings of the service: one frozen value, merged from flags, RECO_* variables and a TOML file.

Precedence: flag, environment, file, default.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

Network: TypeAlias = IPv4Network | IPv6Network

PREFIX = "RECO_"
# Variables of ours that are no settings: the configuration file, of compose.yaml, of the tests.
OTHER_VARIABLES = frozenset(
    {"RECO_CONFIG", "RECO_BIND", "RECO_DATA", "RECO_FUZZ_S", "RECO_FUZZ_SEED", "RECO_KILLS", "RECO_TEST_START_S"}
)
SERVICE_LINK = re.compile(r"RECO_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


class UsageError(Exception):
    """The command line, the environment or the configuration file is wrong."""


def _split_list(value: object) -> object:
    """The items of `a,b` from a flag or the environment; a list from a file stays as it is.

    Raises ValueError where no item is left: whoever sets a list of keys expects to be guarded.
    """
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    kept = [item.strip() if isinstance(item, str) else item for item in items]
    if isinstance(value, str):
        kept = [item for item in kept if item]
    if not kept or "" in kept:
        raise ValueError("holds no value: name at least one, or leave the setting out")
    return kept


class Settings(BaseSettings):
    """Everything that may differ between deployments. Sizes in bytes or items, times in seconds.

    `Settings(...)` reads its arguments alone; `read_settings` merges the sources.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", validate_default=False, env_prefix=PREFIX, env_ignore_empty=True
    )

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 is every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    store: Path = Field(default=Path("var/store"), description="folder where memories live")
    memory: str | None = Field(default=None, description="the default memory; unset: the only one, or the starter's")
    model: str = Field(
        default="starter", description="'starter', an open_clip name, an open_clip config file, or local-dir:FOLDER"
    )
    pretrained: str | None = Field(
        default=None, description="a hub tag, a local weights file, or 'random' for speed tests"
    )
    tokenizer: Path | None = Field(
        default=None, description="a folder with the model's tokenizer, as save_pretrained writes it; unset: the hub's"
    )
    fusion: str | None = Field(
        default=None,
        description="a file that `reco train` wrote, or a rule (none, mean, core; with its alpha: mean:2); "
        "unset: the starter's, else the rule mean",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the model runs")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="number format of the model")
    fixed_shapes: Literal["auto", "on", "off"] = Field(
        default="auto", description="pad batches to a few recorded sizes (CUDA graphs); auto: on CUDA"
    )
    search_devices: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split_list)] = Field(
        default=(), description="GPUs that hold copies of the indexes, by number; unset: the CPU searches"
    )

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_list)] = Field(
        default=(),
        description="keys of the embedding routes; unset: open to everybody. A flag is visible in the "
        "machine's list of processes: prefer the environment or the file",
    )
    admin_key: SecretStr | None = Field(
        default=None,
        description="key of the routes that change memories. A flag is visible in the machine's list of "
        "processes: prefer the environment or the file",
    )

    keys_file: Path | None = Field(
        default=None,
        description="TOML file of keys with names, roles (read, write, admin) and limits; read again when it changes",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)] = Field(
        default=(),
        description="names under which the service is called, besides addresses, localhost and this machine's name; "
        "*.example.com is every name below it, * every name. Unset: these alone where no API key is asked for",
    )
    unix_socket: Path | None = Field(
        default=None,
        description="socket file to listen on too, for programs of the same user: who may open it needs no key",
    )

    max_body_bytes: int = Field(default=64 * 2**20, ge=1024, description="bytes of one request's body")
    max_json_values: int = Field(
        default=2_000_000, ge=1000, description="values of one JSON body, counted by its commas and brackets"
    )
    max_image_bytes: int = Field(default=20 * 2**20, ge=1024, description="bytes of one encoded image")
    max_pixels: int = Field(default=64_000_000, ge=1, description="pixels of one image, by its header")
    max_pixels_in_flight: int = Field(
        default=0, ge=0, description="pixels of all images being decoded at one time; 0: twice max_pixels"
    )
    max_items: int = Field(default=256, ge=1, description="images or texts of one request")
    max_text_chars: int = Field(default=100_000, ge=1, description="characters of one text")
    max_labels: int = Field(
        default=10_000, ge=1, description="texts of a label list sent with a request: labels times templates"
    )
    max_list_chars: int = Field(
        default=2_000_000,
        ge=1,
        description="characters of a label list sent with a request: over all labels times templates",
    )
    max_stored_labels: int = Field(default=1_000_000, ge=1, description="texts of one stored label set")
    max_label_sets: int = Field(default=1_000, ge=0, description="stored label sets")
    max_metadata_bytes: int = Field(
        default=16_384, ge=2, description="metadata of one pair of an edit, as JSON; a reply carries it"
    )
    max_reply_bytes: int = Field(
        default=64 * 2**20, ge=1024, description="bytes of the labels and scores of one reply, estimated before work"
    )
    memory_budget_bytes: int = Field(
        default=0, ge=0, description="resident bytes of all memories together; 0: 80 % of the machine's or container's"
    )
    compact_after: int = Field(
        default=10_000, ge=0, description="rows edited online until they are folded into a new version; 0: never"
    )
    max_queue: int = Field(
        default=1024, ge=1, validate_default=True, description="items admitted and not yet answered, per modality"
    )
    max_batch: int = Field(default=32, ge=1, description="items of one batch of the model")
    decode_workers: int = Field(
        default_factory=lambda: max(2, os.cpu_count() or 2), ge=1, description="processes that decode images"
    )
    decode_cpu_s: float = Field(
        default=10.0, ge=0.1, description="CPU seconds of decoding one image, after which its process is killed"
    )
    stall_s: float = Field(
        default=120.0, gt=0, description="seconds of one batch in the model, after which its thread is replaced"
    )
    timeout_s: float = Field(default=30.0, gt=0, description="seconds of a request once its body has arrived")
    receive_s: float = Field(default=30.0, gt=0, description="seconds for a body to arrive")
    send_s: float = Field(
        default=30.0, gt=0, description="seconds in which a caller reads some of its reply, 4 KB for each second"
    )
    max_inflight_bytes: int = Field(
        default=512 * 2**20,
        ge=1024,
        validate_default=True,
        description="bytes of the bodies of all requests that are not yet answered",
    )
    max_connections_per_address: int = Field(
        default=1024, ge=1, description="connections of one address; behind a trusted proxy, requests at a time"
    )
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_split_list)] = Field(
        default=(), description="addresses or networks (10.0.0.0/8) of proxies whose X-Forwarded-For is believed"
    )
    drain_s: float = Field(default=30.0, ge=0, description="seconds to answer admitted requests when stopping")
    log_format: Literal["text", "json"] = Field(default="text", description="format of the log on stderr")
    access_log: bool = Field(default=True, description="log one line per request; health checks are left out")
    recall_share: float = Field(
        default=0.01, ge=0, le=1, description="share of the time spent on measuring recall with live queries; 0: never"
    )

    @field_validator("admin_key")
    @classmethod
    def _refuse_blank_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().strip():
            raise ValueError("holds no value: name a key, or leave the setting out")
        return value

    @field_validator("max_pixels_in_flight")
    @classmethod
    def _fit_largest_image(cls, value: int, checked: ValidationInfo) -> int:
        """An image that never fits would wait for its deadline."""
        if 0 < value < checked.data.get("max_pixels", 0):
            raise ValueError(f"must be at least max_pixels, which is {checked.data['max_pixels']}, or 0")
        return value

    @field_validator("max_queue")
    @classmethod
    def _fit_largest_request(cls, value: int, checked: ValidationInfo) -> int:
        """A request that never fits into the queue would be refused with 429 for ever."""
        if value < checked.data.get("max_items", 0):
            raise ValueError(f"must be at least max_items, which is {checked.data['max_items']}")
        return value

    @field_validator("max_inflight_bytes")
    @classmethod
    def _fit_largest_body(cls, value: int, checked: ValidationInfo) -> int:
        """A body that never fits would be refused with 429 for ever."""
        if value < checked.data.get("max_body_bytes", 0):
            raise ValueError(f"must be at least max_body_bytes, which is {checked.data['max_body_bytes']}")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The arguments alone: which value came from where is known to `read_settings`."""
        return (init_settings,)


def read_settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Merge flags (None = not given), the RECO_* variables of this process and one TOML file.

    Raises UsageError, one line that names the first wrong key, its value, where it is from and what
    is allowed; for an unknown key it names the nearest known one.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    variables = _read_variables()
    in_file = _read_file(config) if config else {}
    origin = dict.fromkeys(in_file, f"in {config}")
    origin |= {name: f"from {PREFIX}{name.upper()}" for name in variables}
    origin |= {name: f"from --{name.replace('_', '-')}" for name in given}
    try:
        return Settings(**{**in_file, **variables, **given})
    except ValidationError as error:
        raise UsageError(_describe(error, origin)) from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and endless numbers
        raise UsageError(f"--config {path} is not TOML: {error}") from error
    for key in found:
        if key not in Settings.model_fields:
            raise UsageError(f"{key} (in {path}) is no setting: {nearest(key, Settings.model_fields)}")
    return found


def _read_variables() -> dict[str, Any]:
    """The settings in the environment. One that is empty counts as unset, as in compose files."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for variable, value in os.environ.items():
        ours = variable.startswith(PREFIX) and value and not _is_service_link(variable, value)
        if ours and variable not in known | OTHER_VARIABLES:
            raise UsageError(f"{variable} (in the environment) is no setting: {nearest(variable, known)}")
    found = EnvSettingsSource(Settings)()
    return {name: value for name, value in found.items() if not _is_service_link(PREFIX + name.upper(), value)}


def _is_service_link(variable: str, value: object) -> bool:
    """Whether Kubernetes or Docker set the variable, as both do where a service is called reco."""
    return bool(SERVICE_LINK.fullmatch(variable)) or (variable.endswith("_PORT") and "://" in str(value))


def nearest(key: str, known: Collection[str]) -> str:
    """What to say of an unknown key: the nearest known one, or where all are listed."""
    found = get_close_matches(key, sorted(known), n=1)
    return f"did you mean {found[0]}?" if found else "correct it or take it out; `reco serve --help` lists all"


def _describe(error: ValidationError, origin: Mapping[str, str]) -> str:
    """The first error in one line; a secret is not repeated."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    secret = "SecretStr" in repr(Settings.model_fields[key].annotation)
    shown = "***" if secret else repr(first["input"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{key} = {shown} ({origin.get(key, 'the default')}): {message[:1].lower()}{message[1:]}"
