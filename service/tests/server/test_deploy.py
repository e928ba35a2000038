"""Deployment files: no container engine runs in the tests, so each file is held against the others,
the code and a real Prometheus.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from service.settings import Settings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def test_the_data_source_is_where_compose_puts_prometheus() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"].split()[0] == PROMETHEUS["global"]["scrape_interval"]


def test_grafana_finds_its_dashboards_where_compose_mounts_them() -> None:
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/reco.yaml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in COMPOSE["services"]["grafana"]["volumes"]


def test_compose_mounts_exist_and_volumes_are_declared() -> None:
    for service in COMPOSE["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], mount
        assert all(name in COMPOSE["services"] for name in service.get("depends_on", []))


def default_port() -> int:
    port: int = Settings.model_fields["port"].default
    return port


def test_prometheus_scrapes_the_service_where_it_listens() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["targets.yml"]}]
    mounts = COMPOSE["services"]["prometheus"]["volumes"]
    assert "./prometheus/targets.compose.yml:/etc/prometheus/targets.yml:ro" in mounts
    assert yaml.safe_load((DEPLOY / "prometheus/targets.compose.yml").read_text()) == [{"targets": ["reco:8000"]}]
    assert yaml.safe_load((DEPLOY / "prometheus/targets.yml").read_text()) == [
        {"targets": [f"127.0.0.1:{default_port()}"]}
    ]
    assert {f"./prometheus/{file}:/etc/prometheus/{file}:ro" for file in PROMETHEUS["rule_files"]} <= set(mounts)
    assert "EXPOSE 8000" in DOCKERFILE
    assert COMPOSE["services"]["reco"]["ports"][0].endswith(":8000:8000")


def test_compose_sets_only_what_the_service_reads_and_waits_for_its_drain() -> None:
    reco = COMPOSE["services"]["reco"]
    assert {name.removeprefix("RECO_").lower() for name in reco["environment"]} <= set(Settings.model_fields)
    assert float(reco["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_s"].default


def test_every_container_is_confined() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert {"mem_limit", "pids_limit", "tmpfs"} <= set(service)
    (target,) = yaml.safe_load((DEPLOY / "prometheus/targets.compose.yml").read_text())[0]["targets"]
    assert target.split(":")[0] in COMPOSE["services"]["reco"]["environment"]["RECO_ALLOWED_HOSTS"]


def test_the_workflow_makes_an_sbom_and_audits_the_lock_of_the_image() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["supply-chain"]["steps"]
    commands = "\n".join(step.get("run", "") for step in steps)
    assert "cyclonedx-py requirements requirements.lock" in commands
    assert "pip-audit --disable-pip --require-hashes --requirement requirements.lock" in commands


def test_only_loopback_is_opened_by_default() -> None:
    assert all(
        port.startswith(("127.0.0.1:", "${RECO_BIND:-127.0.0.1}:"))
        for service in COMPOSE["services"].values()
        for port in service["ports"]
    )


def instruction(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in DOCKERFILE if line.startswith(f"{name} ")]


def copied() -> list[str]:
    """Paths that the Dockerfile takes from the project."""
    return [source for line in instruction("COPY") if "--from" not in line for source in line.split()[:-1]]


def test_the_image_copies_what_exists_and_what_dockerignore_lets_through() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied()) == sorted(allowed)
    assert all((ROOT / path).exists() for path in copied())


def test_the_image_is_pinned_by_hash_unprivileged_and_proves_readiness() -> None:
    text = "\n".join(DOCKERFILE)
    assert "--require-hashes -r requirements.lock" in text
    assert "--no-build-isolation" in text  # what builds the wheel is in the lock as well
    assert (
        len({line.split()[0] for line in instruction("FROM")}) == 1
    )  # the virtual environment points at its base's python
    (user,) = instruction("USER")
    assert user not in ("0", "root")
    assert f"--uid {user}" in text
    assert "/readyz" in instruction("HEALTHCHECK")[0]
    assert instruction("VOLUME") == ["/var/lib/reco"]
    assert "RECO_STORE=/var/lib/reco/" in text


def test_the_cpu_image_leaves_out_cuda_and_nothing_else(tmp_path: Path) -> None:
    """Runs the Dockerfile's own two programs on the lock."""
    (text,) = (line for line in instruction("RUN") if "requirements.lock" in line)
    kept, torch = (
        subprocess.run(
            ["awk", program, "requirements.lock"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for program in re.findall(r"awk '([^']+)'", text)
    )
    locked = {
        line.split()[0]: line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line and line[0].isalpha()
    }
    found = {line.split()[0]: line for line in kept.splitlines() if "==" in line and line[0].isalpha()}
    gone = locked.keys() - found.keys()
    assert {name for name in gone if not name.startswith(("cuda-", "nvidia-"))} == {
        name for name in locked if name.partition("==")[0] in ("torch", "torchvision", "triton", "faiss-gpu")
    }
    # on every machine
    assert ";" not in next(line for name, line in found.items() if name.startswith("faiss-cpu=="))
    assert {line.removesuffix("+cpu") for line in torch.split()} <= gone
    assert torch.count("+cpu") == 2


def test_the_image_starts_a_command_that_exists() -> None:
    (entry,), command = (json.loads(instruction(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    assert entry == "reco"
    usage = subprocess.run(
        [sys.executable, "-m", "service.cli.main", command[0], "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [flag for flag in command if flag.startswith("--") and flag not in usage] == []


def test_the_image_can_build_its_wheel_from_what_it_copies(tmp_path: Path) -> None:
    """Runs the second RUN of the Dockerfile on the same files, and looks for what serving needs."""
    context, ignored = (
        tmp_path / "src",
        [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("**/")],
    )
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source,
                context / name,
                ignore=lambda _, names: [n for n in names if any(fnmatch(n, p[3:]) for p in ignored)],
            )
        else:
            context.mkdir(exist_ok=True)
            shutil.copy(source, context / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=context, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    needed = [
        path
        for folder in ("models/starter", "service/page")
        for path in (ROOT / folder).iterdir()
        if path.suffix in DATA_SUFFIXES
    ]
    assert needed
    assert {str(path.relative_to(ROOT)) for path in needed} <= inside
    assert not [name for name in inside if "/tests/" in name]


DATA_SUFFIXES = {".json", ".safetensors", ".html", ".js", ".css"}
