"""File names beside the versions of a memory that more than one module has to know."""

from pathlib import Path


def partial_folder(memory: Path, version: str) -> Path:
    """Where a version is built before it exists."""
    return memory / f".{version}.partial"


def rejects_path(memory: Path, version: str) -> Path:
    """Where a version's rejects are listed for people to read, beside the version."""
    return memory / f"rejects-{version}.jsonl"
