"""The budget of resident bytes, checked before a version is loaded, so that the kernel kills
nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from index_store.errors import StoreError
from index_store.storage.manifest import Manifest

BUDGET_SHARE = 0.8  # of the memory of machine or container; the rest is for model and requests
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class BudgetExceeded(StoreError):
    """Loading the version would take more resident memory than the operator, or the machine,
    allows.
    """


def allowed_bytes(chosen: int) -> int:
    """The operator's number, or BUDGET_SHARE of the memory of the machine or container."""
    return chosen or int(BUDGET_SHARE * min(_machine_bytes(), _container_bytes()))


def check_budget(manifest: Manifest, held: int, budget: int) -> None:
    """Raise BudgetExceeded where a version does not fit beside the `held` bytes.

    Mapped files are not counted: the kernel pages them out.
    """
    needed = manifest.bytes["resident"]
    if held + needed > budget:
        raise BudgetExceeded(
            f"{manifest.ref} needs {needed:,} bytes resident beside the {held:,} held, the budget is {budget:,}: "
            "raise memory_budget_bytes, or build it with a mapped index (--index auto or IVF…,SQfp16)"
        )


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_bytes() -> int:
    """The limit of the control group, or the memory of the machine without one."""
    try:
        return int(CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # ValueError: "max"
        return _machine_bytes()
