"""The gate: every key that opens this service, from every source, and what each opens."""

from __future__ import annotations

import ipaddress
import logging

from service.access.hosts import AllowedHosts
from service.access.keys import Key, Role, digest, find_key, refuse_twins
from service.access.keys_file import KeysFile
from service.access.token import keep_token
from service.errors import MissingKey, WrongKey
from service.settings import Settings

ANYONE = Key("anyone", "read")
UNIX_SOCKET = Key("unix socket", "admin")

log = logging.getLogger("reco")


class Gate:
    """Checks callers. Raises UsageError where the keys file cannot be used, or two keys are one.

    token: the admin token of the store, None where the operator has set an admin key.
    keyless: embedding, classifying and reading label sets need no key.
    """

    def __init__(self, settings: Settings) -> None:
        api = [key.get_secret_value() for key in settings.api_keys]
        self._fixed = [Key(f"RECO_API_KEYS[{i}]", "read", digest(key)) for i, key in enumerate(api)]
        if settings.admin_key is not None:
            self._fixed.append(Key("RECO_ADMIN_KEY", "admin", digest(settings.admin_key.get_secret_value())))
        refuse_twins(self._fixed)
        self._file = None if settings.keys_file is None else KeysFile(settings.keys_file, self._fixed)
        self.keyless = not settings.api_keys and self._file is None
        self.token: str | None = None
        if not any(key.role == "admin" for key in self._keys()):
            self.token = keep_token(settings.store)
            self._fixed.append(Key("token", "admin", digest(self.token)))
            refuse_twins(self._keys())
        self.hosts = AllowedHosts(settings.allowed_hosts, settings.host, keyless=self.keyless)
        if self.keyless and not _is_loopback(settings.host):
            log.warning(
                "listening on %s without API keys: whoever reaches the port may embed and read captions and labels; "
                "set RECO_API_KEYS or RECO_KEYS_FILE",
                settings.host,
            )

    def admit(self, authorization: str, role: Role, *, over_unix_socket: bool) -> Key:
        """The caller, where it may use routes of `role`.

        authorization: the header, "" without one.  over_unix_socket: the socket's mode proves the
        caller.  Raises MissingKey without a valid key, WrongKey where its role is not enough.
        """
        if over_unix_socket:
            return UNIX_SOCKET
        given = _bearer(authorization)
        found = None if given is None else find_key(given, self._keys())
        if found is None and role == "read" and self.keyless:
            return ANYONE
        if found is None and role == "read":
            raise MissingKey("no valid key: send 'Authorization: Bearer KEY'")
        if found is None:
            remedy = (
                "" if self.token is None else "; without an admin key of yours it is the token printed at the start"
            )
            raise MissingKey(f"this route needs a key with the role {role}: send 'Authorization: Bearer KEY'{remedy}")
        if not found.may(role):
            raise WrongKey(
                f"this key has the role {found.role}, this route needs {role}: use another key", key_name=found.name
            )
        return found

    def _keys(self) -> tuple[Key, ...]:
        return (*self._fixed, *(() if self._file is None else self._file.current()))


def _bearer(authorization: str) -> str | None:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
