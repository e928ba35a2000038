"""The admin token of a store: made at the first start without an admin key, kept with mode 600.

Whoever may read the file may administer the memories: the owner of the store. `reco` commands on
the same store find the token themselves.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

TOKEN_FILE = ".admin-token"  # noqa: S105  the name of the file
TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")

log = logging.getLogger("reco")


def read_token(store: Path) -> str | None:
    """The token of a store; None without one, or where it may not be read or trusted.

    A token that other users can read, or that is not a plain file of ours, is no secret.
    """
    try:
        handle = os.open(store / TOKEN_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        text = file.read(256).decode("ascii", "replace").strip() if ours else ""
    return text if TOKEN.fullmatch(text) else None


def keep_token(store: Path) -> str:
    """The token of a store, made where there is none that can be trusted.

    Of two services that start at once, both take the token of the first. Where the store cannot be
    written, the token is good for this process only, and a warning says so.
    """
    found = read_token(store)
    if found is not None:
        return found
    try:
        return _make_token(store)
    except OSError as error:
        log.warning("the admin token cannot be kept in the store (%s): it changes with each start", error.strerror)
        return secrets.token_urlsafe(32)


def _make_token(store: Path) -> str:
    store.mkdir(parents=True, exist_ok=True)
    path, token = store / TOKEN_FILE, secrets.token_urlsafe(32)
    handle, fresh = tempfile.mkstemp(prefix=f"{TOKEN_FILE}.", dir=store)  # with mode 600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(handle)
        try:
            os.link(fresh, path)  # fails where another process was faster
        except FileExistsError:
            faster = read_token(store)
            if faster is not None:
                return faster
            Path(fresh).replace(path)
            log.warning("the admin token in the store was readable by others, or damaged: a new one replaces it")
    finally:
        with suppress(FileNotFoundError):
            Path(fresh).unlink()
    return token
