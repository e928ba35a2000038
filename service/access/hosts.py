"""Which Host headers are answered, and which addresses belong to a network.

A page of another site may give its own name the address of this machine (DNS rebinding); the
browser then sends it here with that name in Host, and lets the page read the reply. An address is
no name that a site could own.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterable

from service.errors import WrongHost
from service.settings import Network

LOOPBACK_NAME = "localhost"


class AllowedHosts:
    """The names under which the service may be called.

    names: the operator's, without ports; "*" allows all, "*.example.com" every name below it.
    keyless: whether routes answer without a key. Where each needs one, a page of another site has
    none, and without names from the operator every name is allowed.
    """

    def __init__(self, names: Collection[str], listening: str, *, keyless: bool) -> None:
        own = {LOOPBACK_NAME, listening.lower(), socket.gethostname().lower()}
        given = {name.lower().rstrip(".") for name in names}
        self._any = "*" in given or (not given and not keyless)
        self._names = {name for name in own | given if not name.startswith("*")}
        self._suffixes = (f".{LOOPBACK_NAME}", *(name[1:] for name in given if name.startswith("*.")))

    def check(self, header: str) -> None:
        """Raise WrongHost for a Host header with a name that is not allowed."""
        if self._any:
            return
        name = _name(header)
        if name in self._names or name.endswith(self._suffixes) or _is_address(name):
            return
        raise WrongHost(
            f"Host {header[:80]!r} is none of the names of this service: call it by its address, "
            "or add the name to RECO_ALLOWED_HOSTS"
        )


def is_within(address: str, networks: Iterable[Network]) -> bool:
    """Whether an address is of one of the networks; what is no address is of none.

    A socket that listens on IPv6 and IPv4 tells an IPv4 peer as ::ffff:10.0.0.1, which is 10.0.0.1.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return any(found in network or (mapped is not None and mapped in network) for network in networks)


def _name(header: str) -> str:
    """The host of `host:port`, in lower case, an IPv6 address without its brackets."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
