"""Every query of every dashboard and rule: against the declared series, and against a real
Prometheus scraping a real service.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from service.observability.metrics import DURATION_S, Metrics
from service.tests.prometheus import RULES, answers, binaries, prometheus, promtool, wait_until

ROOT = Path(__file__).parents[3]
GRAFANA = ROOT / "deploy/grafana"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}
RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
RULE_QUERIES = {
    f"{rule.get('record') or rule['alert']} {rule.get('labels')}": rule["expr"]
    for group in RULES["groups"]
    for rule in group["rules"]
}
OF_PROMETHEUS = {"job", "instance", "le", "slo", "window", "severity", "alertname", "alertstate"}


def filled(expression: str) -> str:
    """PromQL with Grafana's variables filled in."""
    return re.sub(r"\$(job|instance|endpoint|modality)\b", ".*", expression.replace("$__rate_interval", "30s"))


def panel_queries() -> dict[str, str]:
    """Dashboard, panel and target -> PromQL."""
    return {
        f"{name}: {panel['title']} {target['refId']}": filled(target["expr"])
        for name, board in BOARDS.items()
        for panel in board["panels"]
        for target in panel["targets"]
    }


def may_be_empty() -> set[str]:
    """Panels that say themselves when they have nothing to show."""
    return {
        f"{name}: {panel['title']}"
        for name, board in BOARDS.items()
        for panel in board["panels"]
        if panel["description"][:5] == "Empty"
    }


QUERIES = (
    panel_queries()
    | RULE_QUERIES
    | {f"{name}: marks": filled(b["annotations"]["list"][0]["expr"]) for name, b in BOARDS.items()}
)


def declared() -> dict[str, set[str]]:
    """Every series that the service may expose -> its labels."""
    found: dict[str, set[str]] = {}
    metrics = Metrics(version="0", torch="0", faiss="0")
    labels = {
        series._name: {*series._labelnames} for series in vars(metrics).values() if hasattr(series, "_labelnames")
    }
    for family in metrics.registry.collect():
        for suffix in {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}.get(
            family.type, [""]
        ):
            found[family.name + suffix] = labels.get(family.name, set())
    found["reco_memory_info"] |= {"version", "encoder", "fusion"}
    found["reco_build_info"] |= {"version", "torch", "faiss"}
    return found


DECLARED = declared()


@pytest.mark.parametrize(("title", "expression"), QUERIES.items())
def test_a_query_names_declared_series_and_labels_only(title: str, expression: str) -> None:
    named = {
        name for name in re.findall(r"\b(?:reco|process)_\w+", re.sub(r"slo:\w+:\w+", "", expression)) if name != "reco"
    }
    assert named <= set(DECLARED)
    assert set(re.findall(r"slo:\w+:\w+", expression)) <= RECORDED
    assert "$" not in expression
    for series, matchers in re.findall(r"\b((?:reco|process)_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= DECLARED[series] | {"job", "instance", "le"}, series
    known = OF_PROMETHEUS.union(*(DECLARED[name] for name in named))
    for listed in re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", expression):
        assert {label.strip() for label in listed.split(",")} <= known, listed


@pytest.mark.parametrize("name", BOARDS)
def test_a_legend_names_labels_that_its_query_keeps(name: str) -> None:
    for panel in BOARDS[name]["panels"]:
        for target in panel["targets"]:
            kept = {
                label.strip() for listed in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in listed.split(",")
            }
            if kept:
                assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


def test_the_promise_on_latency_stands_on_a_bound_of_the_histogram() -> None:
    (bound,) = {
        float(found) for expression in RULE_QUERIES.values() for found in re.findall(r'le="([\d.]+)"', expression)
    }
    assert bound in DURATION_S


def test_the_committed_dashboards_are_what_the_script_writes() -> None:
    done = subprocess.run(
        [sys.executable, GRAFANA / "make_dashboards.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_six_dashboards_keep_their_addresses() -> None:
    expected = {"overview", "latency", "batching", "memory", "quality", "errors"}
    assert {name: board["uid"] for name, board in BOARDS.items()} == {name: f"reco-{name}" for name in expected}
    assert sum(panel["type"] == "heatmap" for panel in BOARDS["latency"]["panels"]) >= 1
    assert all(link["url"].removeprefix("/d/reco-") in expected for board in BOARDS.values() for link in board["links"])


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_a_unit_one_id_each_and_do_not_overlap(name: str) -> None:
    panels = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in panels)
    for a, b in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (a, b)
        assert a["x"] + a["w"] <= 24


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_asks_the_provisioned_source_and_offers_job_and_instance(name: str) -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    board = BOARDS[name]
    used = set(re.findall(r'"uid": "(\w+)"', json.dumps([board["panels"], board["annotations"], board["templating"]])))
    assert used == {source["uid"]}
    offered = [each["name"] for each in board["templating"]["list"]]
    assert offered[:2] == ["job", "instance"]
    asked = set(re.findall(r"\$(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert asked <= set(offered)


@binaries
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml")


@binaries
def test_every_alert_fires_when_it_should_and_not_before() -> None:
    promtool("test", "rules", "rules_test.yml")


def test_every_alert_has_a_test_an_urgency_and_a_page_that_says_what_to_do() -> None:
    tested = (ROOT / "deploy/prometheus/rules_test.yml").read_text()
    for rule in (rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule):
        assert rule["alert"] in tested
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor in anchors((ROOT / path).read_text()), rule["alert"]


def anchors(markdown: str) -> set[str]:
    """The addresses that headings get: lower case, spaces to dashes, without punctuation."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_operations_page_lead_somewhere() -> None:
    page = ROOT / "docs/how-to/operations.md"
    text = page.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        assert not path or (page.parent / path).exists(), link
        assert not anchor or anchor in anchors((page.parent / path).read_text() if path else text), link


def varied(client: httpx.Client, photo: bytes) -> None:
    """A little of everything: four routes of work, what is refused by type, by deadline and by a
    full queue of eight.
    """
    for _ in range(2):
        client.post("/embed/image", files={"file": ("a.jpg", photo, "image/jpeg")}).raise_for_status()
    client.post("/embed/text", json={"texts": ["a ripe banana"], "enhance": False}).raise_for_status()
    client.post("/embed/text", json={"texts": ["a ripe banana"]}).raise_for_status()
    client.post(
        "/classify", files={"file": photo}, data={"labels": json.dumps(["a cat", "an apple"])}
    ).raise_for_status()
    assert client.post("/embed/image", content=b"no image", headers={"Content-Type": "image/jpeg"}).status_code in (
        415,
        422,
    )
    assert (
        client.post("/embed/text", json={"texts": ["late"] * 8}, headers={"X-Request-Timeout-Ms": "0.01"}).status_code
        == 504
    )
    with ThreadPoolExecutor(4) as callers:
        codes = list(
            callers.map(
                lambda _: client.post("/embed/text", json={"texts": ["one of eight"] * 8}).status_code, range(4)
            )
        )
    assert {200, 429} == set(codes)


def swapped(client: httpx.Client, version: str) -> str:
    """Activate a version and wait; how it ended."""
    job = client.post("/memories/grocery/activate", json={"version": version}).raise_for_status().json()
    path = f"/jobs/{job['id']}"
    assert wait_until(lambda: client.get(path).json()["state"] != "running", 60)
    return str(client.get(path).json()["state"])


@binaries
def test_every_panel_has_an_answer_after_some_traffic(
    tmp_path: Path, serve: Callable[..., Any], photos: dict[str, bytes]
) -> None:
    running = serve(tmp_path / "store", "--max-queue", "8", "--max-items", "8")
    with running.client() as client, prometheus(tmp_path, running.url.removeprefix("http://")) as url:
        varied(client, photos["chelsea"])
        assert wait_until(lambda: bool(answers(url, "reco_memory_info")), 30), "Prometheus has not scraped the service"
        assert swapped(client, "fruit-and-vegetables") == "done"
        shutil.copytree(
            running.store / "grocery/all", running.store / "grocery/damaged"
        )  # its manifest names another version
        assert swapped(client, "damaged") == "failed"
        # a rate needs two scrapes of a series, the second one changed
        varied(client, photos["coffee"])
        asked, exempt = panel_queries(), may_be_empty()
        silent: dict[str, str] = {}

        def none_silent() -> bool:
            nonlocal silent
            silent = {
                title: asked[title]
                for title in (silent or asked)
                if title[:-2] not in exempt and not answers(url, asked[title])
            }
            return not silent

        assert wait_until(none_silent, 30), silent
        assert len(exempt) <= 5
        assert answers(url, 'ALERTS{alertname="RecoSwapFailed",alertstate="firing"}')
        assert not answers(
            url,
            'ALERTS{alertname=~"RecoDown|RecoAbsent|RecoNotReady|RecoMemoryStale|RecoRecallLow",alertstate="firing"}',
        )
        assert {sample["value"][1] for sample in answers(url, "reco_recall_sampled")} == {
            "1"
        }  # the starter's index is flat: exact
