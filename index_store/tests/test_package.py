import subprocess
import sys
from pathlib import Path

import index_store


def test_the_package_imports_neither_torch_nor_a_server() -> None:
    code = """
import sys
import index_store
for module in ("build.build", "editor", "memory", "search.shard", "snapshot", "storage.manifest", "store"):
    __import__(f"index_store.{module}")
print(sorted({"torch", "fastapi", "open_clip", "PIL", "pydantic", "uvicorn", "asyncio"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout == "[]\n"


def test_the_public_names() -> None:
    names = ["Memory", "Neighbors", "Pairs", "SearchParams", "Side", "Snapshot", "Store", "StoreError", "build_version"]
    assert index_store.__all__ == names
    assert all(hasattr(index_store, name) for name in names)
