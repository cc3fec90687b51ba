"""The alert rules and the dashboard of docs/ ask for metrics that the server has."""

import json
import re

import pytest
import yaml

from tests.support.fake_client import FakeServer
from tests.support.paths import ROOT

DOCS = ROOT / "docs"


def expressions(file: str) -> list[str]:
    """The queries of a file."""
    text = (DOCS / file).read_text()
    if file.endswith(".yaml"):
        rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
        assert all(rule["annotations"]["summary"] and rule["labels"] for rule in rules)
        return [rule["expr"] for rule in rules]
    return [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]


def names(expression: str) -> set[str]:
    """The metrics that a query reads."""
    return set(re.findall(r"vllm:\w+|http_\w+|process_\w+", expression))


@pytest.mark.parametrize("file", ["alerts.yaml", "grafana.json"])
def test_every_metric_exists(file):
    server = FakeServer(prefix="vllm")
    server.complete()
    exported = set(re.findall(r"^([\w:]+)[{ ]", server.get("/metrics").text, re.MULTILINE))
    found = expressions(file)
    assert len(found) >= 8 and all(map(names, found))
    assert {name for expression in found for name in names(expression)} <= exported


def test_the_panels_of_the_dashboard_do_not_overlap():
    panels = json.loads((DOCS / "grafana.json").read_text())["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels) == len({panel["id"] for panel in panels})
