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


def test_each_alert_has_a_test_in_which_it_fires_and_ends():
    """promtool runs them, which is not on PyPI: see the first line of the file."""
    groups = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    rules = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    tests = yaml.safe_load((ROOT / "tests" / "data" / "alerts_test.yaml").read_text())["tests"]
    fires: dict[str, list[bool]] = {}
    for test in tests:
        for case in test["alert_rule_test"]:
            fires.setdefault(case["alertname"], []).append(bool(case["exp_alerts"]))
            for alert in case["exp_alerts"]:
                assert rules[case["alertname"]]["labels"].items() <= alert["exp_labels"].items()
    assert fires.keys() == rules.keys()
    assert all(found[0] is found[-1] is False and any(found) for found in fires.values())


def test_the_panels_of_the_dashboard_do_not_overlap():
    panels = json.loads((DOCS / "grafana.json").read_text())["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels) == len({panel["id"] for panel in panels})
