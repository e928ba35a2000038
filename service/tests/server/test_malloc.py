"""Page faults of a command whose tensors come and go, as those of a batch do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.tests.warm import ROOT

COMMAND = """
import resource
import typer
from service.cli.options import with_settings
from service.settings import Settings

app = typer.Typer()

@app.command()
@with_settings()
def measure(settings: Settings):
    import torch

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(50 * 2**20, dtype=torch.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

app()
"""


def test_the_tensors_of_a_command_lie_in_huge_pages() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.is_file() or "[never]" in enabled.read_text():
        pytest.skip("this kernel has no transparent huge pages")
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) < 10_000  # 200 MiB are 51 200 pages of 4 KiB
