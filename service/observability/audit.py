"""The audit log: who changed what, and which keys were refused.

Logger `reco.audit`: one JSON object per line on stderr, whatever the format of the other logs. It
holds names of keys, never keys.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from service.observability.logging import current_request

__all__ = ["audit"]

SERVICE = "service"  # acts without a request: compactions that the service starts itself
NOBODY = "nobody"  # a request whose key is missing or unknown

log = logging.getLogger("reco.audit")


def audit(what: str, *, outcome: str, who: str | None = None, **details: str | float | None) -> None:
    """Write one line. who: the name of the key, by default that of the current request.

    what: "admin" for a request that changes something, "swap" or "compact" for the end of a job,
    "refused" for a key.  details: values that are None are left out.
    """
    request = current_request.get()
    if who is None:
        who = SERVICE if request is None else request.caller or NOBODY
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "logger": log.name,
        "who": who,
        "what": what,
        "outcome": outcome,
        "request_id": None if request is None else request.id,
        **details,
    }
    log.info(json.dumps({name: value for name, value in line.items() if value is not None}))
