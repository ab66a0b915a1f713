"""Alerts and the dashboard ask for what is really exposed, in queries that Prometheus can parse."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator

import promql_parser
import pytest

from lmcache_ext.offload.metrics import definitions
from tests.deploy.manifests import DEPLOY, load, problems
from tests.lm_servers import serving
from tests.servers import free_port

FOLDER = DEPLOY / "components" / "monitoring"
GRAFANA = {"$__rate_interval": "5m", "$service": ".*"}


def rules() -> list[dict]:
    (found,) = load((FOLDER / "alerts.yaml").read_text())
    return [rule for group in found["spec"]["groups"] for rule in group["rules"]]


def panels() -> list[dict]:
    return json.loads((FOLDER / "dashboard.json").read_text())["panels"]


def queries() -> list[str]:
    """Every query, with a value for each variable of Grafana's."""
    found = [rule["expr"] for rule in rules()]
    for query in (target["expr"] for panel in panels() for target in panel["targets"]):
        for name, value in GRAFANA.items():
            query = query.replace(name, value)
        found.append(query)
    return found


def selectors(node: object) -> Iterator[str]:
    """Names of the metrics in a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for part in ("expr", "lhs", "rhs", "args", "vector_selector", "param"):
        inner = getattr(node, part, None)
        for one in inner if isinstance(inner, list) else [inner]:
            if one is not None and not isinstance(one, str):
                yield from selectors(one)


def asked_for() -> set[str]:
    """The metrics that any query reads, less what the rules record."""
    names = {name for query in queries() for name in selectors(promql_parser.parse(query))}
    return names - {rule["record"] for rule in rules() if "record" in rule}


@pytest.mark.parametrize("query", queries())
def test_query_parses(query):
    assert set(selectors(promql_parser.parse(query)))


def test_everything_we_expose_about_a_tier_or_a_failure_is_shown():
    exposed = {
        f"{name}_total" if "Counter" in type(definition).__name__ else name
        for name, definition in definitions().items()
    }
    assert exposed - asked_for() <= {"lmcache:num_lookup_requests_total", "lmcache_ext:config_digest"}
    assert {name for name in asked_for() if name.startswith(("lmcache:", "lmcache_ext:"))} <= exposed


def test_cache_server_exposes_what_is_asked_of_it():
    port = free_port()
    with serving("--http-port", str(port)) as server:
        with server.dial() as client:
            client.put("a@1@0@0@half", b"x")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    exposed = set(re.findall(r"^(\w+)", text, re.MULTILINE))
    assert {name for name in asked_for() if name.startswith("lmcache_server_")} <= exposed


def test_manifests_are_the_operators():
    for file in ("pod-monitors.yaml", "alerts.yaml"):
        assert [line for one in load((FOLDER / file).read_text()) for line in problems(one)] == []


def test_every_alert_says_what_it_means():
    for rule in rules():
        if "alert" in rule:
            assert rule["annotations"].keys() == {"summary", "description"}
            assert rule["labels"]["severity"] in ("info", "warning", "critical")


def test_panels_do_not_overlap():
    cells = [
        (box["x"] + column, box["y"] + row)
        for box in (panel["gridPos"] for panel in panels())
        for column in range(box["w"])
        for row in range(box["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
