"""deploy/monitoring/: Prometheus' own tool checks the configuration, the rules and what they are for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deployment import ROOT
from tests.prometheus import MONITORING, copy_configuration, fetch, promtool

DASHBOARD = MONITORING / "grafana" / "dashboards" / "modelservice.json"


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    fetch()


def test_the_configuration_and_its_rules_are_valid(tmp_path: Path) -> None:
    assert "SUCCESS: 11 rules found" in promtool("check", "config", copy_configuration(tmp_path))


def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    copy_configuration(tmp_path)
    shutil.copy(ROOT / "tests/ops/alerts.test.yml", tmp_path)
    (rules,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    tests = yaml.safe_load((tmp_path / "alerts.test.yml").read_text())["tests"]
    tested = {case["alertname"] for test in tests for case in test["alert_rule_test"]}
    assert tested == {rule["alert"] for rule in rules["rules"]}
    promtool("test", "rules", tmp_path / "alerts.test.yml")


def test_grafana_finds_what_is_provisioned() -> None:
    (source,) = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    compose: Any = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    listens = next(
        part for part in compose["services"]["prometheus"]["command"] if "web.listen-address" in part
    )
    assert source["url"] == "http://" + listens.partition("=")[2]
    (provider,) = yaml.safe_load(
        (MONITORING / "grafana/provisioning/dashboards/modelservice.yml").read_text()
    )["providers"]
    mounts = {mount["target"]: mount["source"] for mount in compose["services"]["grafana"]["volumes"]}
    assert ROOT / mounts[provider["options"]["path"]] == DASHBOARD.parent


def test_panels_have_places_of_their_own_and_a_known_data_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
    source, *variables = dashboard["templating"]["list"]
    assert source["name"] == "datasource"
    assert {variable["datasource"]["uid"] for variable in variables} == {"${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
