"""Alert rules and dashboard: they name metrics and labels that exist, and each alert has a page and tests.

With $PROMTOOL, as `make monitoring` sets it, Prometheus' own tool checks and tests them, too.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

import api_shim.metrics
import smschannel.metrics
from deploy.monitoring import dashboard
from smschannel.api.reasons import Reason
from tests.documents import PAGES, ROOT, table

FILES = [ROOT / f"deploy/helm/files/alerts-{name}.yaml" for name in ("operator", "shim")]
TESTS = [ROOT / f"deploy/monitoring/{name}_test.yaml" for name in ("operator", "shim")]
ALERTS: dict[str, Any] = {
    rule["alert"]: rule
    for path in FILES
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
}
QUERIES = [*dashboard.queries(), *(each["expr"] for each in ALERTS.values())]
_OF_PROMETHEUS = {"le", "pod", "namespace", "job"}


def promtool(*arguments: str) -> None:
    program = os.environ.get("PROMTOOL")
    if not program:
        pytest.skip("there is no promtool: 'make monitoring' builds it and runs this test")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def series() -> dict[str, set[str]]:
    """Return the labels of each series that operator and shim have, by its name."""
    found = {}
    for each in [*vars(smschannel.metrics).values(), *vars(api_shim.metrics).values()]:
        if isinstance(each, MetricWrapperBase):
            [family] = each.describe()
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
            found.update({family.name + suffix: set(each._labelnames) for suffix in suffixes})
    return found


SERIES = series()


@pytest.mark.parametrize("query", QUERIES)
def test_query_names_metrics_and_labels_that_exist(query: str) -> None:
    names = re.findall(r"\bsms\w+", re.sub(r'"[^"]*"', "", query))
    assert names
    assert set(names) <= SERIES.keys()
    labels = set().union(*(SERIES[name] for name in names))
    by = {each.strip() for found in re.findall(r"by \(([^)]*)\)", query) for each in found.split(",")}
    chosen = {each for found in re.findall(r"\{([^}]*)\}", query) for each in re.findall(r'(\w+)[=!]~?"', found)}
    assert by | chosen <= labels | _OF_PROMETHEUS


def test_every_metric_is_on_the_dashboard() -> None:
    """Those that are missing are not worth a place: `smschannel_observe_only` shows as its reason.

    `smschannel_namespaces` and `smschannel_namespaces_led` are for an alert.
    """
    shown = {name for query in dashboard.queries() for name in re.findall(r"\bsms\w+", query)}
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in SERIES}
    assert families - {re.sub("_(bucket|count|sum)$", "", name) for name in shown} == {
        "smschannel_observe_only",
        "smschannel_namespaces",
        "smschannel_namespaces_led",
    }


def test_dashboard_is_made_from_its_source() -> None:
    assert dashboard.DASHBOARD.read_text() == dashboard.text(), "run: python -m deploy.monitoring.dashboard"


def test_rows_of_the_dashboard_are_full() -> None:
    """Grafana places panels by their own coordinates: an overlap would hide one."""
    widths = [panel.width for panel in dashboard.PANELS]
    row = 0
    for width in widths:
        row += width
        assert row <= 24
        row %= 24
    assert row == 0


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_page_a_row_and_both_kinds_of_tests(alert: str) -> None:
    page = PAGES[f"docs/runbooks/{alert}.md"]
    assert page.startswith(f"# {alert}\n")
    assert re.findall(r"^\*\*([^*]+)\*\*", page, re.MULTILINE) == ["What it means.", "What it does.", "What to do"]
    rule = ALERTS[alert]
    row = [f"[{alert}](runbooks/{alert}.md)", rule["labels"]["severity"], rule["annotations"]["summary"]]
    assert row in table("Alert", "Severity", "Means")
    tests = [each for path in TESTS for each in yaml.safe_load(path.read_text())["tests"]]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == alert]
    assert {bool(case["exp_alerts"]) for case in cases} == {False, True}


def test_no_page_is_about_an_alert_that_does_not_exist() -> None:
    assert {page for page in PAGES if page.startswith("docs/runbooks/")} == {
        f"docs/runbooks/{each}.md" for each in ALERTS
    }


def test_reasons_that_alert_are_those_that_need_a_person() -> None:
    [quiet] = re.findall(r'reason!~"([^"]+)"', ALERTS["SmsChannelNotReady"]["expr"])
    assert set(quiet.split("|")) == {
        Reason.Configured.name,
        Reason.Suspended.name,
        Reason.ObserveOnly.name,  # has an alert of its own
        Reason.Restoring.name,  # SmsChannelRestoresPending
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_promtool_accepts_the_rules(path: Path) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(path))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_promtool_passes_the_tests_of_the_rules(path: Path) -> None:
    promtool("test", "rules", str(path))


def test_promtool_parses_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": each} for number, each in enumerate(dashboard.queries())]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))
