"""docs/promises.md says what the code does: settings and their defaults, reasons of WebhookEffective, metrics."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from smschannel import metrics
from smschannel.settings import Settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/promises.md").read_text()


def test_settings_are_named_rightly_and_with_their_defaults() -> None:
    fields = {f"SMSCHANNEL_{name.upper()}": field for name, field in Settings.model_fields.items()}
    named = re.findall(r"`(SMSCHANNEL_\w+)`", TEXT)
    assert len(named) > 5
    assert set(named) <= fields.keys()
    quoted = re.findall(r"`(SMSCHANNEL_\w+)`[ ,(]+default: (\d+)", TEXT)
    assert len(quoted) == TEXT.count("default: ")
    assert {name: int(value) for name, value in quoted} == {name: int(fields[name].default) for name, _ in quoted}


def test_each_reason_of_webhook_effective_is_one_that_is_given() -> None:
    table = TEXT[TEXT.index("| Status | Reason |") : TEXT.index("The services of an account")]
    reasons = {each for row in table.splitlines()[2:] if row for each in row.split("|")[2].replace(" ", "").split(",")}
    core = "".join((ROOT / f"operator/smschannel/{name}.py").read_text() for name in ("plan", "conditions"))
    given = r'"((?:Overridden|Url|Method|NotSet|Foreign|NotChecked|Effective|Messaging)\w*)"'
    assert reasons == set(re.findall(given, core))


def test_every_metric_is_in_the_table_with_its_labels() -> None:
    rows = [row.split("|") for row in TEXT[TEXT.index("| Metric |") :].splitlines()[2:] if row]
    told = {name: meaning for _, names, meaning, *_ in rows for name in re.findall(r"`(\w+)`", names)}
    labels = {}
    for each in vars(metrics).values():
        if isinstance(each, MetricWrapperBase):
            [family] = each.describe()
            labels[family.name + "_total" * (family.type == "counter")] = each._labelnames
    assert told.keys() == labels.keys()
    for name, names in labels.items():
        assert all(f"`{label}`" in told[name] for label in names), name
