"""`kubectl sms plan` before it connects to a cluster: its arguments and manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from smschannel.cli.main import cli
from tests.manifests import INSTANCE, good

OTHER = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def _without_kubeconfig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))


def named(name: str) -> dict[str, Any]:
    manifest = good()
    manifest["metadata"]["name"] = name
    return manifest


def secret() -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "twilio"}}


NOT_YAML = "kind: SmsChannel\ntoken: s3cret: x"
CONNECTS = "The kubeconfig cannot be used"


@pytest.mark.parametrize(
    ("arguments", "documents", "expected"),
    [
        pytest.param([], None, "name the INSTANCE, or give a manifest: -f FILE", id="no arguments"),
        pytest.param(["-f", "-"], [], "holds no SmsChannel of channels.hydracore.io/v1", id="empty manifest"),
        pytest.param(["-f", "-"], [secret()], "holds no SmsChannel", id="another kind"),
        pytest.param(["-f", "-"], NOT_YAML, "<stdin> is not YAML: line 2", id="not YAML"),
        pytest.param(["-f", "-"], yaml.safe_dump(good()).encode("utf-16"), CONNECTS, id="UTF-16, as PowerShell writes"),
        pytest.param(["-f", "-"], yaml.safe_dump(good()).encode("utf-8-sig"), CONNECTS, id="UTF-8 with a mark"),
        pytest.param(["-f", "-"], "kind: 2026-99-99", "<stdin> is not YAML", id="a date that cannot be"),
        pytest.param(["-f", "-"], "kind: " + "9" * 5000, "<stdin> is not YAML", id="a number that cannot be"),
        pytest.param(["-f", "-"], "[" * 20_000, "<stdin> is nested too deeply", id="deep nesting"),
        pytest.param(["-f", "-"], b"kind: caf\xe9", "<stdin> is not UTF-8 text (nor UTF-16): byte 10", id="Latin 1"),
        pytest.param(["-f", "-", OTHER], [good()], f"that is named {OTHER}", id="another instance"),
        pytest.param(
            ["-f", "-"],
            [good(), named(OTHER)],
            f"holds 2 of them: name one of {INSTANCE}, {OTHER}",
            id="several channels",
        ),
        pytest.param(["-f", "-", OTHER], [good(), named(OTHER)], CONNECTS, id="one of several channels"),
        pytest.param(["-f", "-"], [secret(), good()], CONNECTS, id="channel among other kinds"),
        pytest.param(
            ["-f", "-", "-n", "default"],
            [good()],
            "for namespace sms-channels, and not for default",
            id="two namespaces",
        ),
        pytest.param(["-f", "-", "--delete"], [good()], "about a channel that is there", id="manifest with --delete"),
        pytest.param(["497f6eca"], None, "a lower-case UUID with dashes", id="invalid instance"),
        pytest.param(["--token", "x"], None, "No such option", id="unknown option"),
    ],
)
def test_mistake_is_reported_with_status_1(arguments: list[str], documents: Any, expected: str) -> None:
    """click's own status for mistakes is 2, which means here that there are changes."""
    text = documents if isinstance(documents, str | bytes) else yaml.safe_dump_all(documents or [])
    result = CliRunner().invoke(cli, ["plan", *arguments], input=text)
    assert result.exit_code == 1, result.output
    assert expected in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "s3cret" not in result.output


def test_help_documents_the_exit_status() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["plan", "-h"]).stdout.split())
    assert "Ends with 0 if there is nothing to do, 2 if there are changes, and 1 if" in shown
    assert "kubectl sms plan -f channel.yaml" in shown
    assert "--delete" in shown
