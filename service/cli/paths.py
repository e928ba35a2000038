"""Checks of the files and folders that flags name, before the work whose results go there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR

from service.settings import UsageError

STDOUT = Path("-")


def check_input_file(path: Path | None, flag: str) -> None:
    """Raise UsageError where a flag names a file that cannot be read.  path: None = not given."""
    if path is None:
        return
    try:  # without opening it: a pipe can be read once
        fault = "it is a folder" if S_ISDIR(path.stat().st_mode) else None
    except (OSError, ValueError) as error:
        fault = _reason(error)
    if fault is None and not os.access(path, os.R_OK, effective_ids=True):
        fault = "permission denied"
    if fault is not None:
        raise UsageError(f"{flag} {path} cannot be read ({fault}): name a file that can")


def check_output_file(path: Path | None, flag: str) -> None:
    """Raise UsageError where a flag names a file that cannot be written.

    path: None = not given, "-" = stdout.
    """
    if path is None or path == STDOUT:
        return
    fault = _fault(path, path.parent)
    if fault is None and path.is_dir():
        fault = "it is a folder"
    if fault is not None:
        raise UsageError(f"{flag} {path} cannot be written ({fault}): name a file in a folder that can")


def check_output_folder(path: Path | None, flag: str) -> None:
    """Raise UsageError where a flag names a folder that can be neither written nor made.

    path: None = not given.
    """
    if path is None:
        return
    nearest = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if (fault := _fault(path, nearest)) is not None:
        raise UsageError(f"{flag} {path} cannot be written ({fault}): name a folder that can")


def _fault(path: Path, folder: Path) -> str | None:
    """Why `path` cannot be written, or made in `folder`; None where nothing is known against it."""
    try:
        folder.stat()
        with suppress(FileNotFoundError):
            path.lstat()  # refuses a name that is too long
        if not folder.is_dir():
            return f"{folder} is no folder"
    except (OSError, ValueError) as error:
        return f"{folder}: {_reason(error)}"
    return None if os.access(path if path.exists() else folder, os.W_OK, effective_ids=True) else "permission denied"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
