"""`kubectl sms` against a real API server: the published key, and the errors on the way to it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, OPERATOR, Stack, free_port
from smschannel.api.kube_client import APPLY_PATCH, MERGE_PATCH, KubeClient, Object
from smschannel.api.names import PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP, channels_path
from smschannel.api.sealing import Binding, Keyring
from smschannel.cli.main import cli
from smschannel.kube_store import KubeStore
from tests.manifests import ACCOUNT_SID, INSTANCE, PHONE_NUMBER, TOKEN

PUBLISHED = f"/api/v1/namespaces/{OPERATOR}/configmaps/{PUBLIC_KEY_CONFIGMAP}"


@pytest.fixture(scope="module")
def keyring(installed: Stack) -> Keyring:
    """The keyring that the operator creates at its first start, with the operator's own rights."""

    async def first_start() -> Keyring:
        async with await KubeClient.connect(str(installed.operator_kubeconfig())) as api:
            return await KubeStore(api, OPERATOR).open_keyring([CHANNELS])

    return asyncio.run(first_start())


@pytest.fixture(autouse=True)
def _as_an_unprivileged_user(installed: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as the shim's ServiceAccount: it has no right of its own to read ConfigMaps, only the shared one."""
    monkeypatch.setenv("KUBECONFIG", str(installed.home / "sms-api-shim.kubeconfig"))


def run(*arguments: str, stdin: str = TOKEN) -> Result:
    return CliRunner().invoke(cli, arguments, input=stdin)


def seal(*options: str) -> Result:
    return run("seal", INSTANCE, "--account-sid", ACCOUNT_SID, *options)


def error_of(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def opened(keyring: Keyring, value: str) -> str:
    return keyring.unseal(value, Binding(CHANNELS, INSTANCE, ACCOUNT_SID)).get_secret_value()


async def as_admin(stack: Stack, method: str, path: str, body: Object | None = None, **options: Any) -> Object:
    async with await KubeClient.connect(str(stack.cluster.kubeconfig)) as api:
        return await api.request(method, path, body, **options)


def kubeconfig(stack: Stack, path: Path, **changes: str) -> Path:
    known = {"url": stack.cluster.url, "ca_data": stack.cluster.ca_data, "token": "unknown", "namespace": CHANNELS}
    return write_kubeconfig(path, **{**known, **changes})


def test_missing_public_key_is_explained(installed: Stack) -> None:
    message = error_of(seal("--kubeconfig", str(installed.cluster.kubeconfig), "--operator-namespace", "default"))
    assert f"{installed.cluster.url} has no ConfigMap default/{PUBLIC_KEY_CONFIGMAP}" in message
    assert "has it started once?" in message
    assert "in another namespace, name it with --operator-namespace" in message


def test_any_authenticated_user_can_seal(keyring: Keyring) -> None:
    result = seal()
    assert result.exit_code == 0, result.stderr
    assert opened(keyring, result.stdout.removesuffix("\n")) == TOKEN


def test_namespace_that_no_operator_watches_is_a_warning(keyring: Keyring) -> None:
    """Also for users who may read the public key only."""
    assert "Warning" not in seal().stderr
    result = seal("-n", "team-z")
    assert result.exit_code == 0, "a manifest may be made for later"
    assert (
        f"Warning: the operator does not watch namespace team-z, so the channel would not work. It watches {CHANNELS}"
        in (result.stderr)
    )


def test_printed_public_key_seals_offline(keyring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run("public-key")
    assert printed.stdout == f"{keyring.current.public.encoded}\n"
    assert printed.stderr == ""
    file = tmp_path / "sealing.key"
    file.write_text(printed.stdout)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert opened(keyring, seal("--public-key", str(file), "-n", CHANNELS).stdout.strip()) == TOKEN


def test_printed_manifest_is_accepted(installed: Stack, keyring: Keyring) -> None:
    written = seal("--phone-number", PHONE_NUMBER).stdout
    path = channels_path(CHANNELS, INSTANCE)
    strict = {"dryRun": "All", "fieldValidation": "Strict", "fieldManager": "test"}
    manifest = yaml.safe_load(written)
    applied = asyncio.run(as_admin(installed, "PATCH", path, manifest, content_type=APPLY_PATCH, params=strict))
    assert applied["spec"]["phoneNumber"] == PHONE_NUMBER
    assert opened(keyring, applied["spec"]["credentials"]["sealed"]) == TOKEN


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
def test_kubectl_runs_the_plugin_and_applies_its_output(installed: Stack, keyring: Keyring) -> None:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs}
    command = ["kubectl", "sms", "seal", INSTANCE, "--account-sid", ACCOUNT_SID, "--phone-number", PHONE_NUMBER]
    written = subprocess.run(command, input=TOKEN, env=environment, capture_output=True, text=True, check=True).stdout
    assert opened(keyring, yaml.safe_load(written)["spec"]["credentials"]["sealed"]) == TOKEN
    environment["KUBECONFIG"] = str(installed.kubeconfig)  # the shim's account may write only as the shim does
    apply = ["kubectl", "create", "--dry-run=server", "-f", "-", "-o", "name"]
    created = subprocess.run(apply, input=written, env=environment, capture_output=True, text=True, check=True).stdout
    assert created == f"smschannel.channels.hydracore.io/{INSTANCE}\n"


def test_missing_right_names_the_role(installed: Stack, keyring: Keyring) -> None:
    message = error_of(seal("--operator-namespace", "default"))
    assert f"does not let you read ConfigMap default/{PUBLIC_KEY_CONFIGMAP}" in message
    assert "sms-sealing-key-reader" in message
    assert "Without a cluster: --public-key FILE" in message


def test_rejected_credentials_are_explained(installed: Stack, tmp_path: Path) -> None:
    stale = kubeconfig(installed, tmp_path / "stale")
    assert "does not accept your credentials: log in again" in error_of(seal("--kubeconfig", str(stale)))


def test_unreachable_cluster_is_named(installed: Stack, tmp_path: Path) -> None:
    url = f"https://127.0.0.1:{free_port()}"
    away = kubeconfig(installed, tmp_path / "away", url=url)
    message = error_of(seal("--kubeconfig", str(away)))
    assert f"The cluster at {url} cannot be reached" in message
    assert "is this the right --context?" in message


def test_damaged_certificate_in_kubeconfig_is_reported(installed: Stack, tmp_path: Path) -> None:
    broken = kubeconfig(installed, tmp_path / "broken", ca_data="AAAA")
    assert "The kubeconfig cannot be used" in error_of(seal("--kubeconfig", str(broken)))


def test_damaged_public_key_is_reported(installed: Stack, keyring: Keyring) -> None:
    content = {"data": {PUBLIC_KEY: "AAAA"}}
    asyncio.run(as_admin(installed, "PATCH", PUBLISHED, content, content_type=MERGE_PATCH))
    try:
        message = error_of(seal())
    finally:
        content = {"data": {PUBLIC_KEY: keyring.current.public.encoded}}
        asyncio.run(as_admin(installed, "PATCH", PUBLISHED, content, content_type=MERGE_PATCH))
    assert f"ConfigMap {OPERATOR}/{PUBLIC_KEY_CONFIGMAP} has no valid public key" in message
    assert "Restart the operator" in message
