"""How much memory the memories may take: counted before one is loaded, so that the kernel never has to choose what dies."""

from __future__ import annotations

import os
from pathlib import Path

from index_store.errors import StoreError
from index_store.storage.manifest import Manifest

SHARE = 0.8  # of what the process may use; the rest is for the model and the requests
CGROUP = Path("/sys/fs/cgroup/memory.max")


class BudgetExceeded(StoreError):
    """Loading the version would take more resident memory than the operator, or the machine, allows."""


def allowed_bytes(chosen: int) -> int:
    """The operator's own number, or SHARE of the machine's or the container's memory."""
    return chosen or int(SHARE * min(_machine(), _container()))


def afford(manifest: Manifest, held: int, budget: int) -> None:
    """Raise BudgetExceeded where a version does not fit beside the `held` bytes. Mapped files are not counted: they are paged out."""
    needed = manifest.bytes["resident"]
    if held + needed > budget:
        raise BudgetExceeded(
            f"{manifest.ref} needs {needed:,} bytes resident beside the {held:,} held, the budget is {budget:,}: "
            "raise memory_budget_bytes, or build it with a mapped index (--index auto or IVF…,SQfp16)"
        )


def _machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> int:
    """The limit of the control group, as large as the machine's where there is none."""
    try:
        return int(CGROUP.read_text())
    except (OSError, ValueError):  # ValueError: "max"
        return _machine()
