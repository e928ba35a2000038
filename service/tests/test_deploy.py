"""Deployment files: no container engine runs in the tests, so each file is held against the others, the code and a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/latency.json").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()

binaries = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="needs Debian's prometheus package (prometheus, promtool)"
)


def expressions() -> dict[str, str]:
    """Panel title and target -> PromQL with Grafana's variables filled in; the annotation too."""
    found = {f"{panel['id']} {panel['title']} {t['refId']}": t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", [])}
    found |= {note["name"]: note["expr"] for note in DASHBOARD["annotations"]["list"]}
    return {
        title: expr.replace("$__rate_interval", "30s").replace("$endpoint", ".*").replace("$modality", ".*")
        for title, expr in found.items()
    }


def declared() -> set[str]:
    """Every series that Metrics may expose."""
    names: set[str] = set()
    for family in Metrics(version="0", torch="0", faiss="0").registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize(("title", "expression"), expressions().items())
def test_a_query_names_declared_series_only(title: str, expression: str) -> None:
    named = set(re.findall(r"\breco_\w+", expression))
    assert named
    assert named <= declared()
    assert "$" not in expression


def test_the_dashboard_speaks_of_percentiles_by_route_and_by_stage() -> None:
    asked = " ".join(expressions().values())
    for series, by in (("reco_request_duration_seconds", "endpoint"), ("reco_stage_duration_seconds", "stage, modality")):
        for quantile in ("0.5", "0.95", "0.99"):
            assert f"histogram_quantile({quantile}, sum by (le, {by}) (rate({series}_bucket" in asked


def test_panels_have_one_id_each_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for a, b in combinations([panel["gridPos"] for panel in panels], 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, (a, b)
        assert a["x"] + a["w"] <= 24


def test_every_panel_asks_the_provisioned_data_source() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    used = set(re.findall(r'"uid": "(\w+)"', json.dumps([DASHBOARD["panels"], DASHBOARD["annotations"], DASHBOARD["templating"]])))
    assert used == {source["uid"]}
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


def test_prometheus_scrapes_the_service_where_it_listens() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["reco:8000"]}]
    assert "EXPOSE 8000" in DOCKERFILE
    assert COMPOSE["services"]["reco"]["ports"][0].endswith(":8000:8000")


def test_compose_sets_only_what_the_service_reads_and_waits_for_its_drain() -> None:
    reco = COMPOSE["services"]["reco"]
    assert {name.removeprefix("RECO_").lower() for name in reco["environment"]} <= set(Settings.model_fields)
    assert float(reco["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_s"].default


def test_only_loopback_is_opened_by_default() -> None:
    assert all(
        port.startswith(("127.0.0.1:", "${RECO_BIND:-127.0.0.1}:")) for service in COMPOSE["services"].values() for port in service["ports"]
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
    assert len({line.split()[0] for line in instruction("FROM")}) == 1  # the virtual environment points at its base's python
    (user,) = instruction("USER")
    assert user not in ("0", "root")
    assert f"--uid {user}" in text
    assert "/readyz" in instruction("HEALTHCHECK")[0]
    assert instruction("VOLUME") == ["/var/lib/reco"]
    assert "RECO_STORE=/var/lib/reco/" in text


def test_the_image_starts_a_command_that_exists() -> None:
    (entry,), command = (json.loads(instruction(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    assert entry == "reco"
    usage = subprocess.run(
        [sys.executable, "-m", "service.cli", command[0], "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [flag for flag in command if flag.startswith("--") and flag not in usage] == []


def test_the_image_can_build_its_wheel_from_what_it_copies(tmp_path: Path) -> None:
    """Runs the second RUN of the Dockerfile on the same files, and looks for what serving needs."""
    context, ignored = tmp_path / "src", [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("**/")]
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=lambda _, names: [n for n in names if any(fnmatch(n, p[3:]) for p in ignored)])
        else:
            context.mkdir(exist_ok=True)
            shutil.copy(source, context / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(command, cwd=context, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    needed = [path for folder in ("models/starter", "service/page") for path in (ROOT / folder).iterdir() if path.suffix in DATA_SUFFIXES]
    assert needed
    assert {str(path.relative_to(ROOT)) for path in needed} <= inside
    assert not [name for name in inside if "/tests/" in name]


DATA_SUFFIXES = {".json", ".safetensors", ".html", ".js", ".css"}


@binaries
def test_promtool_accepts_the_configuration() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(DEPLOY / "prometheus/prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@binaries
def test_every_query_parses(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(expressions().values())]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def prometheus(tmp_path: Path, target: str) -> Iterator[str]:
    """The shipped configuration, scraping `target` every second; yields Prometheus' URL."""
    config = json.loads(json.dumps(PROMETHEUS))
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={address}"]
    process = subprocess.Popen(["prometheus", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str, expression: str) -> list[Any]:
    """The instant vector of a query; empty while Prometheus starts."""
    try:
        reply = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10, trust_env=False)
    except httpx.TransportError:
        return []
    if reply.status_code == 503:
        return []
    body = reply.json()
    assert body["status"] == "success", body
    return [sample for sample in body["data"]["result"] if sample["value"][1] != "NaN"]


def wait_until(met: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not met():
        if time.monotonic() > end:
            return False
        time.sleep(0.3)
    return True


def traffic(client: httpx.Client, photo: bytes, version: str) -> None:
    """A little of everything that the dashboard shows: three routes, two refusals, a queue that is full, a swap."""
    for _ in range(3):
        client.post("/embed/image", files={"file": ("a.jpg", photo, "image/jpeg")}).raise_for_status()
    client.post("/embed/text", json={"texts": ["a ripe banana"], "enhance": False}).raise_for_status()
    client.post("/embed/text", json={"texts": ["a ripe banana"]}).raise_for_status()
    client.post("/classify", files={"file": photo}, data={"labels": json.dumps(["a cat", "an apple"])}).raise_for_status()
    assert client.post("/embed/image", content=b"no image", headers={"Content-Type": "image/jpeg"}).status_code in (415, 422)
    with ThreadPoolExecutor(4) as callers:  # the queue holds eight items
        codes = list(callers.map(lambda _: client.post("/embed/text", json={"texts": ["one of eight"] * 8}).status_code, range(4)))
    assert {200, 429} == set(codes)
    job = client.post("/memories/grocery/activate", json={"version": version}).raise_for_status().json()
    assert wait_until(lambda: client.get(f"/jobs/{job['id']}").json()["state"] == "done", 30)


@binaries
def test_every_panel_has_an_answer_after_some_traffic(tmp_path: Path, serve: Callable[..., Any], photos: dict[str, bytes]) -> None:
    running = serve(tmp_path / "store", "--max-queue", "8", "--max-items", "8")
    with running.client() as client, prometheus(tmp_path, running.url.removeprefix("http://")) as url:
        traffic(client, photos["chelsea"], "fruit-and-vegetables")
        assert wait_until(lambda: bool(answers(url, "reco_memory_info")), 30), "Prometheus has not scraped the service"
        time.sleep(2)  # a rate needs two scrapes of a series, the second one changed
        traffic(client, photos["coffee"], "all")
        asked = expressions()
        silent: dict[str, str] = {}

        def none_silent() -> bool:
            nonlocal silent
            silent = {title: expression for title, expression in asked.items() if not answers(url, expression)}
            return not silent

        assert wait_until(none_silent, 15), silent
