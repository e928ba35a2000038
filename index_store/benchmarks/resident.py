"""Resident memory after opening and searching a version: the child process of `memory`."""

import json
import sys
from pathlib import Path

import numpy as np

from index_store.store import Store
from index_store.types import SIDES

KINDS = ("VmRSS", "RssAnon", "RssFile")


def resident_mb() -> dict[str, float]:
    """Resident megabytes of this process: all, anonymous, and pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(KINDS)}
    return {kind: round(found[kind], 1) for kind in KINDS}


def main(root: str, name: str, version: str, encoder: str) -> None:
    """Print resident megabytes as JSON: before opening, after it, and after the queries."""
    before = resident_mb()
    snapshot = Store(Path(root)).open(name, version, encoder=encoder)
    opened = resident_mb()
    for side in SIDES:
        for query in np.load(Path(root) / f"queries-{side}.npy"):
            snapshot.retrieve(query[None], side, 10)
    after = resident_mb()
    print(
        json.dumps(
            {"before": before, "opened": opened, "after": after, "taken_mb": round(after["VmRSS"] - before["VmRSS"], 1)}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
