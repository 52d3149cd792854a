"""The documents match the code. Commands that need a cluster run in tests/cluster/test_documents.py."""

from __future__ import annotations

import importlib.util
import operator
import re
import shlex
from functools import reduce
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
import yaml
from click.testing import CliRunner
from prometheus_client.metrics import MetricWrapperBase

import api_shim.metrics
import api_shim.settings
import smschannel.metrics
import smschannel.settings
from deploy import reference
from deploy.kind.__main__ import ENV as ENV_OF_KIND
from smschannel.api.reasons import NOT_CONFIGURED, REST_STATUSES, Effective, Reason, Recheck
from smschannel.cli.main import cli
from tests.bench import simulate
from tests.documents import CURRENT, INSTANCE, PAGES, ROOT, anchors, blocks, commands, prose, section, table

SETTINGS: dict[str, Any] = {
    **{f"SMSCHANNEL_{name.upper()}": each for name, each in smschannel.settings.Settings.model_fields.items()},
    **{f"SMSSHIM_{name.upper()}": each for name, each in api_shim.settings.Settings.model_fields.items()},
}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
COMMANDS = commands()
RUN_ON_A_CLUSTER = ("curl ", "(umask 077; ", "kubectl ", "set -a; . .local/env; set +a")
"""How commands begin that tests/cluster runs."""

_CHART = ("values.yaml", "Chart.yaml")
ACCOUNT_SID = f"AC{'0' * 32}"


def test_every_markdown_file_is_a_page() -> None:
    files = {path.relative_to(ROOT) for path in ROOT.rglob("*.md")}
    visible = {str(path) for path in files if not any(part.startswith(".") for part in path.parts)}
    assert visible == PAGES.keys()


# Commands


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{each.page}: {each.text[:60]}" for each in COMMANDS])
def test_documented_command_works(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks what can be checked without a cluster; new kinds of commands must be added here."""
    words = shlex.split(command.text)
    match words:
        case ["make", target, *variables]:
            assert target in TARGETS
            assert all(f"$({each.split('=')[0]})" in MAKEFILE for each in variables if "=" in each)
        case ["kubectl", "sms", *arguments]:
            monkeypatch.chdir(tmp_path)
            Path("channel.yaml").touch()
            Path("sealing.key").touch()
            Path("keyring.age").touch()
            parse(arguments)
        case ["openssl", "rand", "-base64", "96", "|", "kubectl", "sms", *arguments]:
            parse(arguments)
        case ["helm", "install", _, chart, *arguments]:
            values = yaml.safe_load((ROOT / chart / "values.yaml").read_text())
            for name in re.findall(r"--set ([\w.]+)=", shlex.join(arguments)):
                assert reduce(operator.getitem, name.split("."), values) is not None
        case ["kind", "load", "docker-image", image]:
            values, about = (yaml.safe_load((ROOT / "deploy/helm" / name).read_text()) for name in _CHART)
            assert image == f"{values['image']['repository']}:{about['appVersion']}", "the chart expects this name"
            assert f"IMAGE ?= {values['image']['repository']}:" in MAKEFILE
        case ["helm", "uninstall", *_] | ["kubectl", "delete", ("crd" | "namespace"), *_]:
            pass  # tests/chart and the real pods run them
        case ["kubectl", ("apply" | "delete"), *_]:
            files = re.findall(r"-[fk] (\S+)", command.text)
            assert files
            assert [file for file in files if file != "channel.yaml" and not (ROOT / file).exists()] == []
        case ["pip", "install", "--require-hashes", "-r", file]:
            assert (ROOT / file).is_file()
        case ["pip", "install", "--no-deps", "."] | ["pipx", "install", "."] | ["uv", "tool", "install", "."]:
            assert (ROOT / "pyproject.toml").is_file()
        case ["python", "-m", "tests.bench.simulate", *options]:
            assert CliRunner().invoke(simulate.main, options).exit_code == 0
        case ["python", "-m", module]:
            assert importlib.util.find_spec(f"{module}.__main__")
        case ["export", assignment]:
            name, value = assignment.split("=", 1)
            assert name in SETTINGS
            monkeypatch.setenv(name, value)
            smschannel.settings.Settings()
        case ["set", "-a;", ".", file, "set", "+a"] if file.startswith(".local/kind"):
            assert file == f"{ENV_OF_KIND.relative_to(ROOT)};"
        case _:
            assert command.text.startswith(RUN_ON_A_CLUSTER), "nothing checks this command"


def parse(arguments: list[str]) -> None:
    """Raises `click.UsageError` for a command or option that does not exist, or a value that is refused."""
    real = {"INSTANCE": INSTANCE, "AC...": ACCOUNT_SID, "NAMESPACE": "team-b", "ID": "0123abcd"}
    rest = [real.get(each, each) for each in arguments]
    if ">" in rest:
        rest = rest[: rest.index(">")]
    group: click.Command = cli
    context = click.Context(cli, **cli.context_settings)
    while isinstance(group, click.Group):
        name, found, rest = group.resolve_command(context, rest)
        assert found, name
        group = found
    with group.make_context(group.name, rest, parent=context):
        pass


def test_kubectl_sms_in_prose_names_commands_that_exist() -> None:
    for page, text in CURRENT.items():
        for written in re.findall(r"`kubectl[ -]sms ([^`|]+)", text):
            words = written.split()
            group: click.Command = cli
            while isinstance(group, click.Group) and words and words[0] in group.commands:
                group = group.commands[words.pop(0)]
            assert group is not cli, f"{page}: kubectl sms {written}"
            options = {option for parameter in group.params for option in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= options, f"{page}: kubectl sms {written}"


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{each.page}: {each.text[:60]}" for each in COMMANDS])
def test_no_command_has_a_secret_among_its_arguments(command: Any) -> None:
    """Other users of the machine can read arguments; `printf` is part of the shell, so its arguments stay there."""
    if command.text.startswith("(umask 077; printf "):
        return
    secret = re.compile(
        r"\$\{?API_KEY|\$\{?API_TOKEN|AUTH_TOKEN|auth_token\"|--from-literal|--token|-u |Bearer |smsch_"
    )
    assert not secret.search(command.text)
    assert " -d " not in command.text
    for option in re.findall(r"--data(?:-raw|-binary)? (\S+)", command.text):
        assert option.startswith("@")


def test_make_commands_in_prose_exist() -> None:
    for page, text in CURRENT.items():
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= TARGETS, page
        for name in re.findall(r"`make [a-z-]+ ([A-Z_]+)=", text):
            assert f"$({name})" in MAKEFILE or f"$(if $({name})" in MAKEFILE, f"{page}: {name}"


def test_make_help_lists_every_target() -> None:
    assert set(re.findall(r"^([a-z-]+):.* ## ", MAKEFILE, re.MULTILINE)) == TARGETS
    [phony] = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS


# Links, paths and names


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        parts = urlsplit(link)
        if parts.scheme:  # what is there is not looked up
            assert parts.scheme == "https", link
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), link
            continue
        target = (ROOT / page).parent / parts.path if parts.path else ROOT / page
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in anchors(target.read_text()), link


@pytest.mark.parametrize("page", CURRENT)
def test_paths_exist(page: str) -> None:
    for path in re.findall(r"`((?:operator|api_shim|crds|deploy|docs|tests)/[\w./-]*)`", CURRENT[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", CURRENT)
def test_settings_in_prose_exist_and_have_their_defaults(page: str) -> None:
    text = CURRENT[page]
    assert set(re.findall(r"\b(SMS(?:CHANNEL|SHIM)_[A-Z_]+)\b", text)) <= SETTINGS.keys()
    quoted = re.findall(r"`(SMS(?:CHANNEL|SHIM)_\w+)`[\s,(]+default: (\d+)", text)
    assert len(quoted) == text.count("default: "), "a default follows the name of its setting"
    for name, default in quoted:
        assert int(default) == SETTINGS[name].default, name


FORMER = {
    "InstanceInUse": "0017",
    "instance_in_use": "",
    "kubectl-sms-key": "",
    "sms release": "",
    "--give-back": "",
    "--let-go": "",
    "give back": "",
    "given back": "",
    "for ever": "",
    "smschannel_debts": "",
    "smsshim_requests_in_hand": "",
    "smsshim_failed_logins_total": "",
    "SMSSHIM_FAILED_LOGINS_PER_MINUTE": "",
}


@pytest.mark.parametrize("former", FORMER)
def test_former_names_are_history(former: str) -> None:
    """The value names a decision record that explains why the name is gone."""
    pages = [page for page, text in CURRENT.items() if re.search(rf"{re.escape(former)}\b", text)]
    assert [page for page in pages if not (FORMER[former] and FORMER[former] in page)] == []


# Tables


def test_metrics_are_in_the_tables_with_their_labels() -> None:
    documented = {
        name: meaning
        for names, meaning, _ in table("Metric", "What it counts", "Look when")
        for name in re.findall(r"`(\w+)`", names)
    }
    labels = {}
    for each in [*vars(smschannel.metrics).values(), *vars(api_shim.metrics).values()]:
        if isinstance(each, MetricWrapperBase):
            [family] = each.describe()
            labels[family.name + "_total" * (family.type == "counter")] = each._labelnames
    assert documented.keys() == labels.keys()
    for name, names in labels.items():
        assert all(f"`{label}`" in documented[name] for label in names), name


AGAIN = {
    Recheck.DRIFT: "at each drift check",
    Recheck.SLOW: "at each slow check",
    Recheck.BACKOFF: "soon, with growing pauses",
}


def test_each_reason_has_a_section_in_the_order_of_the_code() -> None:
    headings = re.findall(r"^## (.+)$", PAGES["docs/reasons.md"], re.MULTILINE)
    assert headings == [reason.name for reason in Reason]
    assert f"`{NOT_CONFIGURED}`" in PAGES["docs/reasons.md"].split("\n## ")[0]


@pytest.mark.parametrize("reason", Reason)
def test_section_of_a_reason_says_state_meaning_and_remedy(reason: Reason) -> None:
    state, *meaning, remedy = section(reason.name).strip().split("\n\n")
    progress = f", {reason.progress} True" if reason.progress else ""
    again = AGAIN[reason.recheck]
    assert state == f"*Ready {reason.ready}{progress}. REST status `{reason.rest_status}`. Looked at again {again}.*"
    assert meaning
    assert remedy == f"**What to do:** {reason.remedy}"


def test_reasons_in_prose_exist() -> None:
    """Words that look like a reason must be one."""
    family = re.compile(
        r"\b(?:Secret(?:Not|Key)|Token(?:Unr|Rej)|Webhook[A-Z]|Number[A-Z]|Record[A-Z]|Restore[A-Z])[A-Za-z]+\b"
    )
    reasons = {*Reason.__members__, "WebhookEffective"}
    for page, text in CURRENT.items():
        assert set(family.findall(prose(text))) <= reasons, page


def test_rest_statuses_in_the_rest_page_exist() -> None:
    text = PAGES["docs/rest-api.md"]
    assert set(re.findall(r'"status": "(\w+)"', text)) <= set(REST_STATUSES)


def test_reasons_of_webhook_effective_are_in_the_table() -> None:
    documented = [each for _, reasons, _ in table("Status", "Reason", "Meaning") for each in reasons.split(", ")]
    assert sorted(documented) == sorted(each.value for each in Effective)


def test_reference_pages_are_up_to_date() -> None:
    """`make docs` writes them."""
    written = {path.relative_to(ROOT): path.read_text() for path in reference.PAGES.iterdir()}
    assert written == {path.relative_to(ROOT): text for path, text in reference.pages().items()}


def test_rights_are_in_the_table() -> None:
    documents = [
        each
        for name in ("operator-rbac", "shim-rbac")
        for each in yaml.safe_load_all((ROOT / f"deploy/manifests/{name}.yaml").read_text())
    ]
    roles = {
        (each["kind"], each["metadata"]["name"], each["metadata"].get("namespace")): each["rules"]
        for each in documents
        if "rules" in each
    }
    rows = []
    for binding in documents:
        if "roleRef" not in binding:
            continue
        [subject] = binding["subjects"]
        namespace = binding["metadata"].get("namespace")
        kind, name = binding["roleRef"]["kind"], binding["roleRef"]["name"]
        for rule in roles[kind, name, namespace if kind == "Role" else None]:
            resources = ", ".join(
                f"{each} {' '.join(rule.get('resourceNames', ()))}".strip() for each in rule["resources"]
            )
            rows.append([subject["name"], namespace or "everywhere", resources, ", ".join(rule["verbs"])])
    assert sorted(table("Who", "Where", "Resources", "Verbs")) == sorted(rows)


def test_layout_names_every_package() -> None:
    documented = {path.strip("`") for path, _ in table("Path", "What is there")}
    tops = ("operator", "api_shim", "deploy", "tests")
    packages = {f"{path.parent.relative_to(ROOT)}/" for top in tops for path in (ROOT / top).rglob("__init__.py")}
    assert documented - packages == {"operator/", "crds/", "docs/"}
    assert packages - documented == {"tests/"}


def test_each_decision_is_in_the_index_with_status_and_date() -> None:
    rows = []
    for page, text in PAGES.items():
        if found := re.fullmatch(r"docs/decisions/(\d{4}-[a-z0-9-]+\.md)", page):
            title, _, status, date = text.splitlines()[:4]
            assert status.startswith(("Status: accepted", "Status: superseded by "))
            assert re.fullmatch(r"Date: \d{4}-\d\d-\d\d", date)
            assert title.startswith(f"# {int(found[1][:4])}. ")
            link = f"[{title[2:]}]({found[1]})"
            rows.append([link, status.removeprefix("Status: "), date.removeprefix("Date: ")])
    assert table("Record", "Status", "Date") == rows


def test_readme_fits_on_three_screens() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_one_example_instance() -> None:
    ids = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
    assert {found for text in PAGES.values() for found in ids.findall(text)} == {INSTANCE}
    assert sum("kind: SmsChannel" in each for each in blocks("yaml")) == 1
