"""The keys file: TOML with one table per key, read again whenever it changes.

[keys.shop]
key = "…"              # or sha256 = "…", then the file holds no secret
role = "read"          # read, write or admin
requests_per_s = 50    # limits are optional
items_per_s = 400
bytes_per_s = 20000000
"""

from __future__ import annotations

import logging
import re
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from service.access.keys import Key, Role, digest, refuse_twins
from service.access.rates import Rates, Usage
from service.settings import UsageError, nearest

MAX_FILE_BYTES = 2**20  # of the keys file
CHECK_S = 1.0  # seconds between two looks at the file
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

log = logging.getLogger("reco")


class _Entry(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: SecretStr | None = Field(default=None, min_length=8)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    role: Role
    requests_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    items_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    bytes_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _need_one_secret(self) -> _Entry:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        return self

    @property
    def rates(self) -> Rates:
        return Rates(self.requests_per_s, self.items_per_s, self.bytes_per_s)

    @property
    def secret(self) -> bytes:
        """The sha256 of the key."""
        if self.key is not None:
            return digest(self.key.get_secret_value())
        return bytes.fromhex(self.sha256 or "")


class KeysFile:
    """The keys of a file as it is now. Raises UsageError where it cannot be used at the start.

    others: the keys that are not in the file, none of which it may repeat; the gate adds to them.
    State: the keys, the stat of the file that they are from, and when that was compared. A later
    version of the file that cannot be used is logged, and the keys stay as they were.
    """

    def __init__(self, path: Path, others: Sequence[Key] = ()) -> None:
        self._path, self._others = path, others
        # before the file is read: one that changes meanwhile is then read again
        self._seen, self._checked = _stat(path), time.monotonic()
        self._keys = self._read(())
        if self._seen is not None and self._seen[0] & 0o077:
            log.warning("the keys file %s can be read by other users: chmod 600 it, or name keys by sha256", path.name)

    def current(self) -> tuple[Key, ...]:
        """The keys; at most once a second the file is compared with what was read."""
        now = time.monotonic()
        if now - self._checked >= CHECK_S:
            self._checked, found = now, _stat(self._path)
            if found != self._seen:
                self._seen = found
                self._reload()
        return self._keys

    def _reload(self) -> None:
        try:
            self._keys = self._read(self._keys)
        except UsageError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("%d keys are read from %s", len(self._keys), self._path.name)

    def _read(self, before: tuple[Key, ...]) -> tuple[Key, ...]:
        """The keys of the file; a key whose limits are as before keeps what it has left of them."""
        usages = {(key.name, key.usage.rates): key.usage for key in before}
        keys = tuple(
            Key(name, entry.role, entry.secret, usages.get((name, entry.rates)) or Usage(entry.rates))
            for name, entry in _read_entries(self._path).items()
        )
        refuse_twins((*self._others, *keys))
        return keys


def _stat(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mode, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _read_entries(path: Path) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise UsageError(f"{path.name} has more than {MAX_FILE_BYTES} bytes: it is no keys file")
        found = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"the keys file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and endless numbers
        # a parser's message may quote the line, and with it a key
        raise UsageError(f"the keys file {path.name} is not TOML: look at its quotes and brackets") from error
    for other in found.keys() - {"keys"}:
        raise UsageError(f"{path.name}: {other} is no table of a keys file: write [keys.NAME]")
    tables = found.get("keys")
    if not isinstance(tables, dict) or not tables:
        raise UsageError(f"{path.name} names no key: write [keys.NAME], or leave keys_file out")
    return {name: _read_entry(path, name, table) for name, table in tables.items()}


def _read_entry(path: Path, name: str, table: object) -> _Entry:
    if not NAME.fullmatch(name):
        raise UsageError(f"{path.name}: {name[:80]!r} is no name of a key: letters, digits, dot, dash, underscore")
    if not isinstance(table, dict):
        raise UsageError(f"{path.name}: {name} is no table: write [keys.{name}]")
    for field in table:
        if field not in _Entry.model_fields:
            raise UsageError(f"{path.name}: keys.{name}.{field} is unknown: {nearest(field, _Entry.model_fields)}")
    try:
        return _Entry.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(["keys", name, *(str(part) for part in first["loc"])])
        raise UsageError(f"{path.name}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
