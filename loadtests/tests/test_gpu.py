"""The check on a GPU: its dry run on the CPU, and parts that fail or hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.gpu.check import PARTS, PartSpec, run, summarize
from loadtests.support.report import ROOT

HANGS = """
import subprocess, sys, time
from loadtests.gpu.part import Part, run_part

def measure(part: Part) -> None:
    part.attempt("first", lambda: 1 / 0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    part.attempt("child", lambda: child.pid)
    part.aim("figure", 0.5, ">=", 0.9)
    part.say("a line")
    time.sleep(600)

raise SystemExit(run_part(measure))
"""


def test_a_part_that_hangs_is_killed_with_its_children_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    options = ["--device", "cpu", "--quick", "--work", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        hung = run(PartSpec("hung", "hangs", 5), options, tmp_path, log, limit_s=5)
        absent = run(PartSpec("absent", "no_such_module", 5), options, tmp_path, log, limit_s=5)
    assert json.loads((tmp_path / "hung.json").read_text()) == hung
    assert hung["failures"] == ["first: ZeroDivisionError: division by zero", "killed after 5 s"]
    state = Path(f"/proc/{hung['child']}/stat")  # nobody may have reaped it yet
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert absent["failures"] == ["exit status 1: see the log"]
    assert json.loads((tmp_path / "absent.json").read_text()) == absent
    assert "No module named no_such_module" in (tmp_path / "log").read_text()
    page = summarize([hung, absent])
    assert "  ! killed after 5 s\n  a line\n" in page
    assert page.splitlines()[-1].split() == ["figure", "0.5", ">=", "0.9", "MISSED"]


@pytest.mark.timeout(500)
def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "loadtests/gpu.sh"), "--device", "cpu", "--quick"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=490)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {part.name: json.loads((tmp_path / f"{part.name}.json").read_text()) for part in PARTS}
    assert {name: part["failures"] for name, part in found.items()} == {part.name: [] for part in PARTS}
    for precision, floor in (("fp32", 0.99999), ("bf16", 0.999), ("fp16", 0.999)):
        cosines = found["correctness"][precision].values()
        assert floor <= min(cosines) <= max(cosines) < 1.00001
    assert len(found["correctness"]["tests"]["skipped"]) + found["correctness"]["tests"]["passed"] >= 30
    assert found["pipeline"]["2000 pairs"]["batches"]["8"]["stages_ms"]["retrieve"] > 0
    assert found["service"]["swap"]["replies"] > 0
    page = done.stdout.rpartition("\n\n")[0]
    assert all(f"\n{part.name}: {found[part.name]['seconds']:g} s" in page for part in PARTS)
    assert "==== summary" in (tmp_path / "log").read_text()
