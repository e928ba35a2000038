"""Keys: a name, a role, limits. A key itself is kept as its sha256 only and never shown."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from service.access.rates import Rates, Usage
from service.settings import UsageError

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = ("read", "write", "admin")  # each may do what those before it may


@dataclass(frozen=True, slots=True, eq=False)
class Key:
    """One caller that is known by name.

    sha256: of the key in UTF-8, None where something else than a key proves the caller.
    usage: what is left of its limits.
    """

    name: str
    role: Role
    sha256: bytes | None = field(default=None, repr=False)
    usage: Usage = field(default_factory=lambda: Usage(Rates()), repr=False)

    def may(self, role: Role) -> bool:
        """Whether this key opens routes of `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


def refuse_twins(keys: Iterable[Key]) -> None:
    """Raise UsageError where two keys have one secret: chance would decide which role it has."""
    seen: dict[bytes, str] = {}
    for key in keys:
        if key.sha256 is None:
            continue
        if key.sha256 in seen:
            raise UsageError(f"{seen[key.sha256]} and {key.name} are the same key: give each its own")
        seen[key.sha256] = key.name


def digest(key: str) -> bytes:
    """sha256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def find_key(given: str, keys: Iterable[Key]) -> Key | None:
    """The key that equals `given`, None without one.

    All keys are compared, in constant time and by digest, so that timing tells neither a key nor
    its place.
    """
    wanted, found = digest(given), None
    for key in keys:
        if key.sha256 is not None and hmac.compare_digest(wanted, key.sha256):
            found = key
    return found
