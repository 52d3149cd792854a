"""A kubeconfig means what it means to kubectl: the same server, the same credentials, never more rights."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pwd
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
import yaml
from aiohttp import web
from click.testing import CliRunner

from smschannel.api import identity as identity_module
from smschannel.api import kubeconfig as kubeconfig_module
from smschannel.api.errors import KubeconfigError, KubernetesRefused, KubernetesUnavailable
from smschannel.api.kube_client import KubeClient
from smschannel.cli.main import cli
from tests.unit.network import Authority, proxying, serving

TOKEN = "5e5c0ffee5e5c0ffee"
V1 = "client.authentication.k8s.io/v1"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper() in {"HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "KUBECONFIG"}:
            monkeypatch.delenv(name)
        if name.startswith("KUBERNETES_SERVICE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


class Seen:
    """An API server that notes the headers of every request, and refuses tokens as it is told."""

    def __init__(self) -> None:
        self.headers: list[Any] = []
        self.refused: set[str] = set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers)
        if request.headers.get("Authorization", "").removeprefix("Bearer ") in self.refused:
            return web.json_response({"kind": "Status", "message": "Unauthorized"}, status=401)
        return web.json_response({"items": []})


@pytest.fixture
def seen() -> Seen:
    return Seen()


def write(path: Path, server: str, user: dict[str, Any] | None = None, **cluster: Any) -> str:
    """Write a kubeconfig; `cluster` has further fields of its cluster, and `context` those of its context."""
    context = {"cluster": "c", "user": "u", **cluster.pop("context", {})}
    document = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": context}],
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    path.write_text(yaml.safe_dump(document))
    return str(path)


async def called(kubeconfig: str, seen: Seen, times: int = 1) -> Any:
    """Send requests with this kubeconfig and return the headers of the last."""
    async with await KubeClient.connect(kubeconfig) as api:
        for _ in range(times):
            await api.request("POST", "/api", {"a": 1})
    return seen.headers[-1]


async def refused(path: Path, user: dict[str, Any], **cluster: Any) -> str:
    """Return why this kubeconfig is refused; check that no token is in the message."""
    with pytest.raises(KubeconfigError) as error:
        await KubeClient.connect(write(path, cluster.pop("server", "https://127.0.0.1:9"), user, **cluster))
    assert TOKEN not in str(error.value)
    return str(error.value)


# Impersonation


async def test_impersonation_is_honoured(seen: Seen, tmp_path: Path) -> None:
    """Otherwise the plugin would act with more rights than kubectl."""
    user = {
        "token": TOKEN,
        "as": "jane",
        "as-uid": "u-1",
        "as-groups": ["viewers", "auditors"],
        "as-user-extra": {"Scopes": ["view", "list"], "acme.com/project": ["p"]},
    }
    async with serving(seen.answer) as port:
        headers = await called(write(tmp_path / "config", f"http://127.0.0.1:{port}", user), seen)
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert headers.getall("Impersonate-User") == ["jane"]
    assert headers.getall("Impersonate-Uid") == ["u-1"]
    assert headers.getall("Impersonate-Group") == ["viewers", "auditors"]
    assert headers.getall("Impersonate-Extra-scopes") == ["view", "list"]
    assert headers.getall("Impersonate-Extra-acme.com%2Fproject") == ["p"]


async def test_watches_impersonate_too(seen: Seen, tmp_path: Path) -> None:
    async with serving(seen.answer) as port:
        config = write(tmp_path / "config", f"http://127.0.0.1:{port}", {"token": TOKEN, "as": "jane"})
        async with await KubeClient.connect(config) as api:
            with pytest.raises(KubernetesUnavailable, match="something else than events"):
                await anext(api.watch("/api", {}))
            session = api.new_session()  # kopf's
            async with session, session.get(f"http://127.0.0.1:{port}/api"):
                pass
    assert [each["Impersonate-User"] for each in seen.headers] == ["jane", "jane"]


@pytest.mark.parametrize("key", ["as-uid", "as-groups", "as-user-extra"])
async def test_impersonation_without_a_user_is_refused(tmp_path: Path, key: str) -> None:
    value: Any = {"as-uid": "1", "as-groups": ["a"], "as-user-extra": {"a": ["b"]}}[key]
    assert "but no as" in await refused(tmp_path / "config", {"token": TOKEN, key: value})


@pytest.mark.parametrize(
    "user", [{"as": "jane\r\nX-Remote-User: root"}, {"as": ["jane"]}, {"as": "j", "as-groups": "a"}, {"as": 7}]
)
async def test_malformed_impersonation_is_refused(tmp_path: Path, user: dict[str, Any]) -> None:
    assert await refused(tmp_path / "config", {"token": TOKEN, **user})


async def test_credentials_are_sent_to_the_api_server_only(seen: Seen, tmp_path: Path) -> None:
    """kopf's requests follow redirects."""
    async with serving(seen.answer) as other:

        async def redirect(_: web.Request) -> web.StreamResponse:
            return web.Response(status=307, headers={"Location": f"http://127.0.0.1:{other}/"})

        async with serving(redirect) as port:
            api = await KubeClient.connect(write(tmp_path / "config", f"http://127.0.0.1:{port}", {"token": TOKEN}))
            async with api.new_session() as session:
                with pytest.raises(aiohttp.ClientConnectionError, match="a redirect to another server is not followed"):
                    await session.get(f"http://127.0.0.1:{port}/api")
    assert seen.headers == []


# Credentials


async def test_token_file_is_trimmed_and_read_again(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "_REREAD_SECONDS", 0)
    (tmp_path / "token").write_bytes(f"\ufeff{TOKEN}\r\n".encode())
    async with serving(seen.answer) as port:
        config = write(tmp_path / "config", f"http://127.0.0.1:{port}", {"tokenFile": "token", "token": "old"})
        async with await KubeClient.connect(config) as api:
            await api.request("GET", "/api")
            (tmp_path / "token").write_text("rotated\n")
            await api.request("GET", "/api")
            (tmp_path / "token").unlink()
            await api.request("GET", "/api")
    tokens = [each["Authorization"] for each in seen.headers]
    assert tokens == [f"Bearer {TOKEN}", "Bearer rotated", "Bearer rotated"]


async def test_refused_token_file_is_read_again_at_once(seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("expired\n")
    seen.refused = {"expired"}
    async with serving(seen.answer) as port:
        config = write(tmp_path / "config", f"http://127.0.0.1:{port}", {"tokenFile": "token"})
        async with await KubeClient.connect(config) as api:
            with pytest.raises(KubernetesRefused):
                await api.request("GET", "/api")
            (tmp_path / "token").write_text("rotated\n")
            await api.request("POST", "/api", {"a": 1})
    assert seen.headers[-1]["Authorization"] == "Bearer rotated"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b" \n", "is empty"),
        (TOKEN.encode() + b"\nsecond", "U+000A (line feed)"),
        (b"\xff\xff", "is not UTF-8"),
    ],
)
async def test_unusable_token_file_is_explained(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    assert message in await refused(tmp_path / "config", {"tokenFile": "token"})


async def test_pod_uses_its_service_account(seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token may end with a line end, too."""
    ca = Authority(tmp_path)
    (tmp_path / "ca.crt").write_text(ca.pem)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setattr(kubeconfig_module, "_SERVICE_ACCOUNT", tmp_path)
    async with serving(seen.answer, ca.issue("127.0.0.1")) as port:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
        async with await KubeClient.connect() as api:
            await api.request("GET", "/api")
        with pytest.raises(KubeconfigError, match="there is no kubeconfig"):
            await KubeClient.connect(context="staging")
        (tmp_path / "home/.kube").mkdir(parents=True)
        write(tmp_path / "home/.kube/config", f"http://127.0.0.1:{port}", {"token": "mine"})
        assert (await KubeClient.connect()).configuration.host == f"http://127.0.0.1:{port}", "kubectl's order"
    assert seen.headers[-1]["Authorization"] == f"Bearer {TOKEN}"


async def test_pod_without_a_home_uses_its_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clusters run pods as users that the image does not know."""

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (tmp_path / "ca.crt").write_text(Authority(tmp_path).pem)
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(kubeconfig_module, "_SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert (await KubeClient.connect()).configuration.host == "https://[fd00::1]:443"


async def test_home_of_another_user_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have root's home and run as another user; a file that somebody named must be readable."""

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    assert kubeconfig_module.Kubeconfig().is_empty
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(KubeconfigError, match="config cannot be read: Permission denied"):
        kubeconfig_module.Kubeconfig()


async def test_password_is_sent_as_basic_authentication(seen: Seen, tmp_path: Path) -> None:
    async with serving(seen.answer) as port:
        user = {"username": "jane", "password": TOKEN}
        headers = await called(write(tmp_path / "config", f"http://127.0.0.1:{port}", user), seen)
    assert headers["Authorization"] == "Basic " + base64.b64encode(f"jane:{TOKEN}".encode()).decode()


async def test_token_of_the_kubeconfig_is_trimmed(seen: Seen, tmp_path: Path) -> None:
    async with serving(seen.answer) as port:
        user = {"token": f"{TOKEN}\n"}
        headers = await called(write(tmp_path / "config", f"http://127.0.0.1:{port}", user), seen)
    assert headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("provider", ["gcp", "azure", None])
async def test_removed_auth_provider_is_refused(tmp_path: Path, provider: str | None) -> None:
    message = await refused(tmp_path / "config", {"auth-provider": {"name": provider}, "token": TOKEN})
    assert f"auth-provider {provider}, which kubectl no longer has" in message


async def test_expired_oidc_login_is_explained(tmp_path: Path) -> None:
    claims = base64.b64encode(json.dumps({"exp": 1}).encode()).decode().rstrip("=")
    config = {"id-token": f"{TOKEN}.{claims}.x", "client-id": "a"}
    message = await refused(tmp_path / "config", {"auth-provider": {"name": "oidc", "config": config}})
    assert "cannot log in with OIDC" in message


async def test_oidc_token_is_sent(seen: Seen, tmp_path: Path) -> None:
    claims = base64.b64encode(json.dumps({"exp": 2**33}).encode()).decode().rstrip("=")
    user = {"auth-provider": {"name": "oidc", "config": {"id-token": f"a.{claims}.b", "client-id": "a"}}, "as": "jane"}
    async with serving(seen.answer) as port:
        headers = await called(write(tmp_path / "config", f"http://127.0.0.1:{port}", user), seen)
    assert headers["Authorization"] == f"Bearer a.{claims}.b"
    assert headers["Impersonate-User"] == "jane"


# Login programs


def program(folder: Path, body: str, **fields: Any) -> dict[str, Any]:
    """Return a user whose login program is this Python code."""
    path = folder / "login"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}\n")
    path.chmod(0o700)
    return {"exec": {"apiVersion": V1, "command": "./login", "interactiveMode": "IfAvailable", **fields}}


def printing(**status: Any) -> str:
    return f"print(json.dumps({{'apiVersion': '{V1}', 'kind': 'ExecCredential', 'status': {status!r}}}))"


async def test_login_program_gets_what_kubectl_gives(seen: Seen, tmp_path: Path) -> None:
    body = (
        "info = json.loads(os.environ['KUBERNETES_EXEC_INFO'])\n"
        "assert info['spec']['cluster']['config'] == {'audience': 'x'}, info\n"
        "assert info['spec']['cluster']['server'].startswith('http'), info\n"
        "assert sys.stdin.read() == '', 'standard input is the token that seal reads'\n"
        "token = '-'.join([sys.argv[1], os.environ['REGION'], str(info['spec']['interactive'])])\n"
        f"print(json.dumps({{'apiVersion': '{V1}', 'kind': 'ExecCredential', 'status': {{'token': token}}}}))"
    )
    user = program(tmp_path, body, args=["a"], env=[{"name": "REGION", "value": "eu"}], provideClusterInfo=True)
    extension = {"name": "client.authentication.k8s.io/exec", "extension": {"audience": "x"}}
    async with serving(seen.answer) as port:
        config = write(tmp_path / "config", f"http://127.0.0.1:{port}", user, extensions=[extension])
        headers = await called(config, seen)
    assert headers["Authorization"] == "Bearer a-eu-False"


@pytest.mark.parametrize(
    ("body", "fields", "message"),
    [
        (
            "print('5e5c0ffee5e5c0ffee'); sys.exit('Token has expired: run acme login')",
            {},
            "ended with 1. It said: Token has expired: run acme login",
        ),
        ("sys.exit(255)", {}, "ended with 255. It said nothing."),
        ("", {"command": "./nowhere", "installHint": "pip install acme"}, "is not installed. pip install acme"),
        ("", {"command": "acme-login-that-nobody-has"}, "acme-login-that-nobody-has, is not installed"),
        ("print('5e5c0ffee5e5c0ffee')", {}, "printed no ExecCredential with a status"),
        (printing(), {}, "printed neither a token nor a client certificate with its key"),
        (printing(clientCertificateData="x"), {}, "printed neither a token nor a client certificate with its key"),
        (printing(token="a\nb"), {}, "contains U+000A (line feed)"),
        (printing(token=TOKEN), {"apiVersion": "client.authentication.k8s.io/v1beta1"}, "answers in another version"),
        (printing(token=TOKEN), {"interactiveMode": "Always"}, "needs a terminal"),
        (printing(token=TOKEN), {"command": ""}, "needs command and apiVersion"),
        (printing(token=TOKEN), {"args": "one"}, "is not a list of strings"),
    ],
)
async def test_failing_login_program_stops_with_what_it_said(
    tmp_path: Path, body: str, fields: dict[str, Any], message: str
) -> None:
    """Not system:anonymous, and a lecture about rights."""
    assert message in await refused(tmp_path / "config", program(tmp_path, body, **fields))


async def test_unexecutable_login_program_is_explained(tmp_path: Path) -> None:
    user = program(tmp_path, "")
    (tmp_path / "login").chmod(0o600)
    assert "cannot be run: Permission denied" in await refused(tmp_path / "config", user)


async def test_login_program_runs_again_when_its_token_expires_or_is_refused(seen: Seen, tmp_path: Path) -> None:
    body = (
        f"runs = {str(tmp_path / 'runs')!r}\n"
        "n = len(os.listdir(runs)); open(f'{runs}/{n}', 'w').close()\n"
        "year = 2020 if n == 1 else 2999\n"
        "status = {'token': f't{n}', 'expirationTimestamp': f'{year}-01-01T00:00:00Z'}\n"
        f"print(json.dumps({{'apiVersion': '{V1}', 'kind': 'ExecCredential', 'status': status}}))"
    )
    (tmp_path / "runs").mkdir()
    seen.refused = {"t0"}
    async with serving(seen.answer) as port:
        await called(write(tmp_path / "config", f"http://127.0.0.1:{port}", program(tmp_path, body)), seen, 3)
    assert [each["Authorization"] for each in seen.headers] == ["Bearer t0", "Bearer t2", "Bearer t2", "Bearer t2"]


async def test_login_that_cannot_be_renewed_is_trouble_of_the_connection(seen: Seen, tmp_path: Path) -> None:
    """A running operator goes on trying."""
    body = (
        f"os.path.exists('{tmp_path}/ran') and sys.exit('session is over')\nopen('{tmp_path}/ran', 'w').close()\n"
        + printing(token=TOKEN)
    )
    seen.refused = {TOKEN}
    async with serving(seen.answer) as port:
        with pytest.raises(KubernetesUnavailable, match=r"ended with 1\. It said: session is over") as error:
            await called(write(tmp_path / "config", f"http://127.0.0.1:{port}", program(tmp_path, body)), seen)
    assert TOKEN not in str(error.value)


async def test_token_has_priority_over_a_login_program(seen: Seen, tmp_path: Path) -> None:
    user = {**program(tmp_path, "sys.exit(1)"), "token": TOKEN}
    async with serving(seen.answer) as port:
        headers = await called(write(tmp_path / "config", f"http://127.0.0.1:{port}", user), seen)
    assert headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("field", ["env", "extensions"])
async def test_malformed_lists_are_named(tmp_path: Path, field: str) -> None:
    user = program(tmp_path, printing(token=TOKEN), provideClusterInfo=True, **({"env": 7} if field == "env" else {}))
    cluster = {"extensions": ["a"]} if field == "extensions" else {}
    assert f"{field} of " in await refused(tmp_path / "config", user, **cluster)


# Which server


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": {"user": "nobody"}}, "names the user nobody, which does not exist"),
        ({"context": {"cluster": "nowhere"}}, "names the cluster nowhere, which does not exist"),
        ({"server": "ftp://host"}, "is not a URL"),
        ({"server": ""}, "is not a URL"),
        ({"server": 7}, "server of c is not a string"),
        ({"server": "https://jane:5e5c0ffee5e5c0ffee@127.0.0.1"}, "must not hold a user or password"),
        ({"server": "https://127.0.0.1:99999"}, "is not a URL"),
        ({"server": "https://api\u200b.example"}, "is not a URL"),
        ({"proxy-url": "socks5://user:5e5c0ffee5e5c0ffee@p:1"}, "names a socks5 proxy: only http and https proxies"),
        ({"proxy-url": "http://user:5e5c0ffee5e5c0ffee@:1"}, "proxy-url of cluster c is not the URL of a proxy"),
        ({"certificate-authority": "nowhere.pem"}, "cannot be read:"),
        ({"certificate-authority-data": "!"}, "certificate-authority-data of c is not base64"),
        ({"certificate-authority-data": "AAAA"}, "has no valid CA certificate in PEM form"),
        ({"certificate-authority-data": "AAAA", "insecure-skip-tls-verify": True}, "remove one of them"),
        ({"tls-server-name": "a", "proxy-url": "https://p"}, "a tls-server-name and an https proxy"),
    ],
)
async def test_unusable_cluster_is_explained(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in await refused(tmp_path / "config", {"token": TOKEN}, **change)


async def test_first_file_wins_and_paths_start_from_their_file(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(f"{name}\n")
    async with serving(seen.answer) as port:
        for name in ("one", "two"):
            write(tmp_path / name / "config", f"http://127.0.0.1:{port}", {"tokenFile": "token"})
        files = [str(tmp_path / name / "config") for name in ("none", "one", "two")]
        monkeypatch.setenv("KUBECONFIG", os.pathsep.join(files))
        async with await KubeClient.connect() as api:
            await api.request("GET", "/api")
    assert seen.headers[-1]["Authorization"] == "Bearer one"


async def test_proxy_url_and_tls_server_name_are_used(seen: Seen, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    async with (
        serving(seen.answer, ca.issue("internal.example")) as port,
        proxying(port, f"jane:{TOKEN}") as proxy,
    ):
        config = write(
            tmp_path / "config",
            "https://api.example:6443/k8s/clusters/c-1",
            {"token": TOKEN},
            **dict[str, Any](
                {
                    "proxy-url": f"http://jane:{TOKEN}@127.0.0.1:{proxy.port}",
                    "tls-server-name": "internal.example",
                    "certificate-authority": ca.file.name,
                }
            ),
        )
        await called(config, seen)
        assert proxy.asked == ["CONNECT api.example:6443"]
        proxy.credentials = "other"
        with pytest.raises(KubernetesUnavailable, match="asks for a user and password") as error:
            await called(config, seen)
    assert TOKEN not in str(error.value)


async def test_tls_server_name_without_a_proxy(seen: Seen, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    options: dict[str, Any] = {"tls-server-name": "internal.example", "certificate-authority": str(ca.file)}
    async with serving(seen.answer, ca.issue("internal.example")) as port:
        await called(write(tmp_path / "config", f"https://127.0.0.1:{port}", {"token": TOKEN}, **options), seen)
        del options["tls-server-name"]
        with pytest.raises(KubernetesUnavailable, match="is for another host name"):
            await called(write(tmp_path / "config", f"https://127.0.0.1:{port}", {"token": TOKEN}, **options), seen)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
async def test_https_proxy_and_no_proxy_are_used(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    ca = Authority(tmp_path)
    data = base64.b64encode(ca.pem.encode()).decode()
    async with serving(seen.answer, ca.issue("api.example")) as port, proxying(port) as proxy:
        monkeypatch.setenv(variable, f"127.0.0.1:{proxy.port}")
        options: dict[str, Any] = {"certificate-authority-data": data}
        config = write(tmp_path / "config", f"https://api.example:{port}", {"token": TOKEN}, **options)
        await called(config, seen)
        assert proxy.asked == [f"CONNECT api.example:{port}"]
        monkeypatch.setenv("NO_PROXY", "example")
        with pytest.raises(KubernetesUnavailable, match=r"the host name api\.example cannot be resolved"):
            await called(config, seen)
    assert len(proxy.asked) == 1


async def test_client_certificates_are_used(seen: Seen, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    certificate, key = ca.issue()
    data = {
        "client-certificate-data": base64.b64encode(certificate.read_bytes()).decode(),
        "client-key-data": base64.b64encode(key.read_bytes()).decode(),
    }
    printed = printing(clientCertificateData=certificate.read_text(), clientKeyData=key.read_text())
    users = [{"client-certificate": certificate.name, "client-key": key.name}, data, program(tmp_path, printed)]
    async with serving(seen.answer, ca.issue("127.0.0.1"), clients=ca) as port:
        for user in users:
            options: dict[str, Any] = {"certificate-authority": str(ca.file)}
            await called(write(tmp_path / "config", f"https://127.0.0.1:{port}", user, **options), seen)
    assert len(seen.headers) == len(users)


async def test_unusable_client_certificate_is_explained(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    (certificate, _), (_, other) = ca.issue(), ca.issue()
    user = {"client-certificate": str(certificate)}
    assert "of user u has no client key" in await refused(tmp_path / "config", user)
    message = await refused(tmp_path / "config", {**user, "client-key": str(other)})
    assert "does not belong to its key" in message


# Certificates in words


def _ended(ca: Authority) -> tuple[Path, Path]:
    return ca.issue("127.0.0.1", days=-0.1)


@pytest.mark.parametrize(
    ("issue", "message"),
    [
        (_ended, "its TLS certificate, or that of its CA, has expired"),
        (lambda ca: ca.issue("127.0.0.1", days=3, begins=2), "is not valid yet: is this machine's clock right?"),
        (lambda ca: ca.issue("other.example"), "its TLS certificate is for another host name"),
        (lambda ca: Authority(ca.file.parent, "other").issue("127.0.0.1"), "is signed by an unknown CA"),
        (lambda _: None, "the server does not speak TLS on this port"),
    ],
)
async def test_refused_certificate_is_explained(seen: Seen, tmp_path: Path, issue: Any, message: str) -> None:
    ca = Authority(tmp_path)
    async with serving(seen.answer, issue(ca)) as port:
        options: dict[str, Any] = {"certificate-authority": str(ca.file)}
        config = write(tmp_path / "config", f"https://127.0.0.1:{port}", {"token": TOKEN}, **options)
        with pytest.raises(KubernetesUnavailable) as error:
            await called(config, seen)
        assert f"the API server does not answer: {message}" in str(error.value) or message in str(error.value)
        assert "Error" not in str(error.value), "no class of Python"
        if issue is _ended:
            del options["certificate-authority"]
            options["insecure-skip-tls-verify"] = True
            await called(write(tmp_path / "config", f"https://127.0.0.1:{port}", {"token": TOKEN}, **options), seen)


async def test_ca_without_key_identifiers_is_accepted(seen: Seen, tmp_path: Path) -> None:
    """As client-go does; Python 3.13 sets VERIFY_X509_STRICT by default."""
    ca = Authority(tmp_path, identifiers=False)
    config = write(tmp_path / "c", "https://127.0.0.1:9", {}, **dict[str, Any]({"certificate-authority": str(ca.file)}))
    access = await kubeconfig_module.load_access(config)
    assert access.tls
    assert not access.tls.verify_flags & ssl.VERIFY_X509_STRICT
    async with serving(seen.answer, ca.issue("127.0.0.1")) as port:
        options: dict[str, Any] = {"certificate-authority": str(ca.file)}
        await called(write(tmp_path / "config", f"https://127.0.0.1:{port}", {}, **options), seen)
        strict = ssl.create_default_context(cafile=str(ca.file))
        strict.verify_flags |= ssl.VERIFY_X509_STRICT
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection("127.0.0.1", port, ssl=strict)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
async def test_text_around_certificates_is_ignored(seen: Seen, tmp_path: Path, encoding: str) -> None:
    ca, other = Authority(tmp_path), Authority(tmp_path, "other")
    ca.file.write_bytes(f"# \u00dcber-CA\r\n{other.pem}\r\n# ours\r\n{ca.pem}".encode(encoding))
    async with serving(seen.answer, ca.issue("127.0.0.1")) as port:
        options: dict[str, Any] = {"certificate-authority": str(ca.file)}
        await called(write(tmp_path / "config", f"https://127.0.0.1:{port}", {}, **options), seen)


@pytest.mark.parametrize("content", [b"[" * 20_000, bytes(range(256)), b"contexts: [null]", b"contexts: [{name: 7}]"])
async def test_invalid_kubeconfig_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config").write_bytes(content)
    with pytest.raises(KubeconfigError, match="config is not a valid kubeconfig"):
        await KubeClient.connect(str(tmp_path / "config"))


async def test_system_cas_are_used_without_one_in_the_kubeconfig(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
    async with serving(seen.answer, ca.issue("127.0.0.1")) as port:
        config = write(tmp_path / "config", f"https://127.0.0.1:{port}", {})
        await called(config, seen)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere"))
        with pytest.raises(KubeconfigError, match="nowhere cannot be read: No such file"):
            await called(config, seen)


@pytest.fixture(autouse=True)
def _no_trace(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert TOKEN not in caplog.text


# The plugin


async def run_plugin(*arguments: str) -> str:
    """Run a command that cannot succeed, and return its error; check that no token is in it."""
    result = await asyncio.to_thread(CliRunner().invoke, cli, arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert TOKEN not in result.stderr
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


async def test_plugin_impersonates_as_kubectl_does(tmp_path: Path) -> None:
    """It made an API key for all instances with the rights of the administrator behind `as`."""
    calls: list[tuple[str, str | None]] = []

    async def forbidden(request: web.Request) -> web.StreamResponse:
        calls.append((request.method, request.headers.get("Impersonate-User")))
        message = 'secrets is forbidden: User "viewer" cannot get resource "secrets"'
        return web.json_response({"kind": "Status", "message": message}, status=403)

    async with serving(forbidden) as port:
        config = write(tmp_path / "config", f"http://127.0.0.1:{port}", {"token": TOKEN, "as": "viewer"})
        said = await run_plugin("key", "create", "--instances", "*", "--kubeconfig", config)
    assert 'User "viewer" cannot get' in said
    assert calls == [("GET", "viewer")]


async def test_plugin_stops_with_what_the_login_program_said(seen: Seen, tmp_path: Path) -> None:
    async with serving(seen.answer) as port:
        user = program(tmp_path, "sys.exit('Session expired: acme login')")
        config = write(tmp_path / "config", f"http://127.0.0.1:{port}", user)
        said = await run_plugin("public-key", "--kubeconfig", config)
    assert "It said: Session expired: acme login" in said
    assert seen.headers == [], "nothing was asked as system:anonymous"


async def test_plugin_explains_a_refused_certificate(seen: Seen, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    async with serving(seen.answer, Authority(tmp_path, "other").issue("127.0.0.1")) as port:
        data = base64.b64encode(ca.pem.encode()).decode()
        options: dict[str, Any] = {"certificate-authority-data": data}
        config = write(tmp_path / "config", f"https://127.0.0.1:{port}", {"token": TOKEN}, **options)
        said = await run_plugin("public-key", "--kubeconfig", config)
    assert "cannot connect to the API server: its TLS certificate is signed by an unknown CA" in said
    assert "is this the right --context?" not in said
    assert "Client" not in said


async def test_plugin_explains_a_token_file_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n{TOKEN}\n")
    config = write(tmp_path / "config", "http://127.0.0.1:9", {"tokenFile": "token"})
    said = await run_plugin("public-key", "--kubeconfig", config)
    assert "tokenFile of user u cannot be used" in said
    assert "contains U+000A (line feed)" in said


async def test_pasted_arguments_of_key_are_cleaned(tmp_path: Path) -> None:
    created: list[Any] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            details = {"name": "smschannel-api-keys"}
            return web.json_response({"kind": "Status", "message": "not found", "details": details}, status=404)
        created.append(await request.json())
        return web.json_response({})

    async with serving(answer) as port:
        config = write(tmp_path / "config", f"http://127.0.0.1:{port}", {"token": TOKEN})
        pasted = [
            "--instances",
            "\ufeff*\u200b",
            "--verbs",
            "get,\u00a0post\u200b",
            "--id",
            "\u202aci\u202c",
            "--expires",
            "9d\n",
        ]
        arguments = ["key", "create", *pasted, "--kubeconfig", config]
        result = await asyncio.to_thread(CliRunner().invoke, cli, arguments)
    assert "Key ci allows get, post for *, until " in result.stderr
    assert list(created[0]["data"]) == ["ci"]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_operator_and_plugin_connect_alike(seen: Seen, tmp_path: Path, loop: Any) -> None:
    """The operator and the shim run on uvloop, the plugin on asyncio."""

    async def connect() -> None:
        ca = Authority(tmp_path)
        async with serving(seen.answer, ca.issue("internal.example")) as port, proxying(port) as proxy:
            options: dict[str, Any] = {
                "proxy-url": f"http://127.0.0.1:{proxy.port}",
                "tls-server-name": "internal.example",
                "certificate-authority": str(ca.file),
            }
            user = program(tmp_path, printing(token=TOKEN))
            await called(write(tmp_path / "config", "https://api.example", user, **options), seen)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(connect())
    assert seen.headers[-1]["Authorization"] == f"Bearer {TOKEN}"
