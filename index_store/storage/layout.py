"""File names beside the versions of a memory that several modules use."""

from pathlib import Path


def partial_folder(memory: Path, version: str) -> Path:
    """The folder in which a version is built; a rename turns it into the version."""
    return memory / f".{version}.partial"


def rejects_path(memory: Path, version: str) -> Path:
    """The JSON Lines file beside a version that lists the items its build left out."""
    return memory / f"rejects-{version}.jsonl"
