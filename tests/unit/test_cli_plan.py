"""`kubectl sms plan` before it asks a cluster: what it makes of its arguments and of a manifest."""

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
def _nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))


def named(name: str) -> dict[str, Any]:
    manifest = good()
    manifest["metadata"]["name"] = name
    return manifest


def secret() -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "twilio"}}


NOT_YAML = "kind: SmsChannel\ntoken: s3cret: x"
ASKED_A_CLUSTER = "The kubeconfig cannot be used"


@pytest.mark.parametrize(
    ("arguments", "documents", "says"),
    [
        pytest.param([], None, "name the INSTANCE, or give a manifest: -f FILE", id="nothing is named"),
        pytest.param(["-f", "-"], [], "holds no SmsChannel of channels.hydracore.io/v1", id="an empty manifest"),
        pytest.param(["-f", "-"], [secret()], "holds no SmsChannel", id="a manifest of something else"),
        pytest.param(["-f", "-"], NOT_YAML, "<stdin> is not YAML: line 2", id="no manifest at all"),
        pytest.param(["-f", "-", OTHER], [good()], f"that is named {OTHER}", id="a manifest of another instance"),
        pytest.param(
            ["-f", "-"],
            [good(), named(OTHER)],
            f"holds 2 of them: name one of {INSTANCE}, {OTHER}",
            id="a manifest of several",
        ),
        pytest.param(["-f", "-", OTHER], [good(), named(OTHER)], ASKED_A_CLUSTER, id="one of several is named"),
        pytest.param(["-f", "-"], [secret(), good()], ASKED_A_CLUSTER, id="one among others"),
        pytest.param(
            ["-f", "-", "-n", "default"],
            [good()],
            "for namespace sms-channels, and not for default",
            id="two namespaces",
        ),
        pytest.param(["-f", "-", "--delete"], [good()], "about a channel that is there", id="deleting a manifest"),
        pytest.param(["497f6eca"], None, "a lower-case UUID with dashes", id="what is no instance"),
        pytest.param(["--token", "x"], None, "No such option", id="an option that is none"),
    ],
)
def test_a_mistake_is_told_and_is_never_taken_for_changes(arguments: list[str], documents: Any, says: str) -> None:
    """click's own status for mistakes is 2, which here means that there are changes."""
    text = documents if isinstance(documents, str) else yaml.safe_dump_all(documents or [])
    result = CliRunner().invoke(cli, ["plan", *arguments], input=text)
    assert result.exit_code == 1, result.output
    assert says in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "s3cret" not in result.output


def test_help_says_what_the_status_means() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["plan", "-h"]).stdout.split())
    assert "0 where there is nothing to do, 2 where there are changes, and 1" in shown
    assert "kubectl sms plan -f channel.yaml" in shown
    assert "--delete" in shown
