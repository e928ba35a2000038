"""A folder that this process cannot write, also where the tests run as root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = 0x20080522  # of the capability interface, _LINUX_CAPABILITY_VERSION_3
OVERRIDE = 1 << 1  # CAP_DAC_OVERRIDE: root passes over permissions


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take away the right to write in and beneath a folder, for this thread and those it starts."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = {path: path.stat().st_mode for path in folders}
    for path in folders:
        path.chmod(0o555)
    sets = (_Sets * 2)()
    _call("capget", sets)
    sets[0].effective &= ~OVERRIDE
    _call("capset", sets)
    try:
        assert not os.access(folder, os.W_OK, effective_ids=True)
        yield
    finally:
        sets[0].effective |= OVERRIDE & sets[0].permitted
        _call("capset", sets)
        for path, mode in modes.items():
            path.chmod(mode)


def _call(name: str, sets: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(ctypes.byref(_Header(VERSION, 0)), sets):
        raise OSError(ctypes.get_errno(), name)
