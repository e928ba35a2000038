"""Threads for work that can wait: what answers requests goes first."""

from __future__ import annotations

import os
import sys
import threading

from service.threads import Threads

NICE = 10  # Linux gives such a thread a tenth of a core that a normal one wants too, and all of one that is idle


def aside(count: int, name: str) -> Threads:
    """Threads of low priority; what faiss starts from them inherits it. Elsewhere than on Linux they are threads like any others."""
    return Threads(count, name, begin=_give_way)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere a priority belongs to the whole process
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, max(NICE, os.getpriority(os.PRIO_PROCESS, me)))
