"""Where the API server is and as whom to call it: a kubeconfig, read as kubectl reads it, or the pod's ServiceAccount.

What kubectl does with a kubeconfig is done here too, or refused with an error, so that requests never have other rights
than kubectl's. The loader of the `kubernetes` package is used for OIDC only: it ignores impersonation, goes on without
credentials when a login program fails, does not trim token files, and lets the last current-context win.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import yaml

from smschannel.api.egress import checked_proxy, proxy_for, tls_context
from smschannel.api.errors import EgressError, KubeconfigError
from smschannel.api.identity import BasicLogin, ExecLogin, Identity, OidcLogin, TokenFile, TokenLogin
from smschannel.api.text import TextError, clean, decode, described, is_invisible, unexpected

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_DEFAULT = "~/.kube/config"
_LISTS = ("clusters", "contexts", "users")
_EXEC_CONFIG = "client.authentication.k8s.io/exec"


@dataclass(frozen=True)
class Access:
    """How to call one API server; `proxy` is a URL. A `tls` of None means plain http."""

    host: str
    identity: Identity = field(default_factory=Identity)
    tls: ssl.SSLContext | None = None
    proxy: str | None = None


@dataclass(frozen=True)
class _Entry:
    """A cluster, context or user of a kubeconfig, and the folder that its relative paths start from."""

    name: str
    fields: Mapping[str, Any]
    folder: Path

    def text(self, key: str) -> str:
        """Return a field; "" if it is missing. Raises `KubeconfigError` if it is no string."""
        value = self.fields.get(key)
        if not isinstance(value, str | None):
            raise KubeconfigError(f"{key} of {self.name} is not a string")
        return value or ""

    def texts(self, key: str) -> list[str]:
        value = self.fields.get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise KubeconfigError(f"{key} of {self.name} is not a list of strings")
        return value

    def maps(self, key: str) -> list[dict[str, Any]]:
        """Return a field that is a list of maps."""
        value = self.fields.get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise KubeconfigError(f"{key} of {self.name} is not a list of maps")
        return value

    def content(self, key: str) -> bytes | None:
        """Return what `KEY-data` has in base64, or else the file `KEY` names; None without either."""
        if data := self.text(f"{key}-data"):
            try:
                return base64.b64decode("".join(data.split()), validate=True)
            except binascii.Error:
                raise KubeconfigError(f"{key}-data of {self.name} is not base64") from None
        if not (path := self.path(key)):
            return None
        try:
            return path.read_bytes()
        except OSError as error:
            raise KubeconfigError(f"{key} of {self.name} cannot be read: {path}: {error.strerror}") from None

    def path(self, key: str) -> Path | None:
        return self.folder / self.text(key) if self.text(key) else None


class Kubeconfig:
    """The merged kubeconfig files. As in kubectl, the first file that sets a value wins."""

    def __init__(self, kubeconfig: str | None = None) -> None:
        """Read `kubeconfig`; None means the files of $KUBECONFIG, or else ~/.kube/config. Raises `KubeconfigError`."""
        self.named = kubeconfig or os.environ.get("KUBECONFIG") or _DEFAULT
        files = [self.named] if kubeconfig else [each for each in self.named.split(os.pathsep) if each]
        self.current = ""
        self._entries: dict[str, dict[str, _Entry]] = {each: {} for each in _LISTS}
        self.is_empty = True
        for path in (Path(os.path.expanduser(each)) for each in files):  # noqa: PTH111  (a pod may have no home)
            if _exists(path, optional=self.named == _DEFAULT):
                self._add(path)

    def _add(self, path: Path) -> None:
        broken = KubeconfigError(f"{path} is not a valid kubeconfig")
        try:
            document = yaml.safe_load(decode(path.read_bytes()))
        except OSError as error:
            raise KubeconfigError(f"{path} cannot be read: {error.strerror}") from None
        except (TextError, yaml.YAMLError, ValueError, RecursionError):
            raise broken from None
        if document is None:
            return
        try:
            self.current = self.current or document.get("current-context") or ""
            for kind in _LISTS:
                for each in document.get(kind) or ():
                    name, fields = each["name"], each[kind.removesuffix("s")] or {}
                    if not isinstance(name, str) or not isinstance(fields, dict):
                        raise broken
                    self._entries[kind].setdefault(name, _Entry(name, fields, path.absolute().parent))
                    self.is_empty = False
        except (AttributeError, KeyError, TypeError):
            raise broken from None

    def namespace(self, context: str | None) -> str | None:
        """Return the context's namespace, None if it names none. Raises `KubeconfigError` for an unknown context."""
        if not context and self.current not in self._entries["contexts"]:
            return None
        return self._context(context).text("namespace") or None

    def _context(self, name: str | None) -> _Entry:
        contexts = self._entries["contexts"]
        if not (name or self.current):
            raise KubeconfigError(f"{self.named} has no current context")
        if found := contexts.get(name or self.current):
            return found
        known = ", ".join(contexts) or "none"
        raise KubeconfigError(f"{self.named} has no context {name or self.current}. Its contexts: {known}")

    async def access(self, context: str | None) -> Access:
        """Return how to call the context's cluster, as its user; runs the user's login program, if there is one.

        Raises `KubeconfigError` for what cannot be honoured.
        """
        if self.is_empty:
            raise KubeconfigError(f"there is no kubeconfig, or it is empty: {self.named}")
        chosen = self._context(context)
        cluster, user = self._part("clusters", chosen, "cluster"), self._part("users", chosen, "user")
        server = clean(cluster.text("server")).rstrip("/")
        try:
            parts = urlsplit(server if "://" in server else f"http://{server}")
            valid = bool(parts.hostname) and parts.scheme in {"http", "https"} and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid or unexpected(server):
            raise KubeconfigError(f"the server of cluster {cluster.name} is not a URL")
        if "@" in parts.netloc:
            raise KubeconfigError(f"the server of cluster {cluster.name} must not hold a user or password")
        proxy = (
            checked_proxy(cluster.text("proxy-url"), f"proxy-url of cluster {cluster.name}")
            if cluster.text("proxy-url")
            else proxy_for(parts.geturl())
        )
        identity = await self._identity(cluster, user, proxy)
        tls = _tls(cluster, user, identity, proxy) if parts.scheme == "https" else None
        return Access(parts.geturl(), identity, tls, proxy)

    def _part(self, kind: str, context: _Entry, key: str) -> _Entry:
        name = context.text(key)
        if not name and key == "user":
            return _Entry("none", {}, context.folder)
        if found := self._entries[kind].get(name):
            return found
        raise KubeconfigError(f"context {context.name} names the {key} {name or '(none)'}, which does not exist")

    async def _identity(self, cluster: _Entry, user: _Entry, proxy: str | None) -> Identity:
        impersonation = _impersonation(user)
        if provider := user.fields.get("auth-provider"):
            name = provider.get("name") if isinstance(provider, dict) else None
            if name != "oidc":
                raise KubeconfigError(
                    f"user {user.name} logs in with the auth-provider {name}, which kubectl no longer has:"
                    " use its exec plugin instead"
                )
            if proxy:
                raise KubeconfigError(f"user {user.name}: the auth-provider oidc cannot be used with a proxy")
            return await Identity.create(OidcLogin(user.name, user.fields), impersonation)
        if user.fields.get("exec") and user.text("token") == user.text("tokenFile") == user.text("username") == "":
            return await Identity.create(_exec(cluster, user), impersonation)
        if path := user.path("tokenFile"):
            return await Identity.create(TokenFile(path, f"tokenFile of user {user.name}"), impersonation)
        if token := clean(user.text("token")):
            _check_header(token, f"token of user {user.name}")
            return await Identity.create(TokenLogin(token), impersonation)
        if name := user.text("username"):
            return await Identity.create(BasicLogin(name, user.text("password")), impersonation)
        return await Identity.create(None, impersonation)


def _exists(path: Path, *, optional: bool) -> bool:
    """Return whether there is such a file. An `optional` one whose folder may not be read counts as missing."""
    try:
        return path.is_file()
    except (OSError, ValueError) as error:
        if optional:  # as in a container with root's home and another user
            return False
        said = (error.strerror if isinstance(error, OSError) else None) or "its name is not valid"
        raise KubeconfigError(f"{path} cannot be read: {said}") from None


def _impersonation(user: _Entry) -> list[tuple[str, str]]:
    """Return the headers for `as`, `as-uid`, `as-groups` and `as-user-extra`, as client-go sends them."""
    extra = user.fields.get("as-user-extra") or {}
    if not isinstance(extra, dict):
        raise KubeconfigError(f"as-user-extra of {user.name} is not a map")
    extras = _Entry(user.name, extra, user.folder)
    headers = [("Impersonate-Uid", user.text("as-uid"))] if user.text("as-uid") else []
    headers += [("Impersonate-Group", group) for group in user.texts("as-groups")]
    headers += [
        (f"Impersonate-Extra-{quote(str(key).lower(), safe='!#$&+^`|~')}", value)
        for key in extra
        for value in extras.texts(key)
    ]
    if headers and not user.text("as"):
        raise KubeconfigError(f"user {user.name} has as-uid, as-groups or as-user-extra, but no as")
    if user.text("as"):
        headers.insert(0, ("Impersonate-User", user.text("as")))
    for name, value in headers:
        _check_header(value, f"{name} of user {user.name}")
    return headers


def _check_header(value: str, what: str) -> None:
    for each in value:
        if is_invisible(each):
            raise KubeconfigError(f"{what} contains {described(each)}")


def _exec(cluster: _Entry, user: _Entry) -> ExecLogin:
    fields = user.fields["exec"]
    if not isinstance(fields, dict):
        raise KubeconfigError(f"exec of user {user.name} is not a map")
    program = _Entry(f"exec of user {user.name}", fields, user.folder)
    command = program.text("command")
    if not command or not program.text("apiVersion"):
        raise KubeconfigError(f"{program.name} needs command and apiVersion")
    if os.sep in command:
        command = str(user.folder / command)
    environment = {}
    for each in program.maps("env"):
        pair = _Entry(f"env of {program.name}", each, user.folder)
        environment[pair.text("name")] = pair.text("value")
    return ExecLogin(
        user=user.name,
        command=command,
        arguments=program.texts("args"),
        environment=environment,
        api_version=program.text("apiVersion"),
        interactive=program.text("interactiveMode") or "IfAvailable",
        hint=program.text("installHint"),
        cluster=_described_cluster(cluster) if fields.get("provideClusterInfo") is True else None,
    )


def _described_cluster(cluster: _Entry) -> dict[str, Any]:
    """Return the cluster as a login program gets it with provideClusterInfo."""
    ca = cluster.content("certificate-authority")
    known: dict[str, Any] = {
        "server": cluster.text("server"),
        "tls-server-name": cluster.text("tls-server-name"),
        "insecure-skip-tls-verify": cluster.fields.get("insecure-skip-tls-verify"),
        "certificate-authority-data": base64.b64encode(ca).decode() if ca else None,
        "proxy-url": cluster.text("proxy-url"),
    }
    for each in cluster.maps("extensions"):
        if each.get("name") == _EXEC_CONFIG:
            known["config"] = each.get("extension")
    return {key: value for key, value in known.items() if value}


def _tls(cluster: _Entry, user: _Entry, identity: Identity, proxy: str | None) -> ssl.SSLContext:
    insecure = cluster.fields.get("insecure-skip-tls-verify") is True
    ca = cluster.content("certificate-authority")
    if insecure and ca:
        raise KubeconfigError(
            f"cluster {cluster.name} has a certificate-authority and insecure-skip-tls-verify: remove one of them"
        )
    name = cluster.text("tls-server-name")
    if name and proxy and proxy.startswith("https:"):
        raise KubeconfigError(f"cluster {cluster.name} has a tls-server-name and an https proxy: use one of them")
    context = tls_context(ca_data=ca, server_name=name or None)
    certificate, key = user.content("client-certificate"), user.content("client-key")
    if identity.certificate:
        certificate, key = identity.certificate
    if certificate:
        load_client_certificate(context, certificate, key, f"user {user.name}")
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def load_client_certificate(context: ssl.SSLContext, certificate: bytes, key: bytes | None, whose: str) -> None:
    """Load a certificate and its key into `context`, over files that exist for that moment only."""

    def passphrase() -> str:
        raise KubeconfigError(f"the client key of {whose} is protected with a passphrase")

    with _files(certificate, key or certificate) as (certificate_file, key_file):
        try:
            context.load_cert_chain(certificate_file, key_file, passphrase)
        except (ssl.SSLError, ValueError):
            what = "does not belong to its key, or one of them is not PEM" if key else "has no client key"
            raise KubeconfigError(f"the client certificate of {whose} {what}") from None


@contextlib.contextmanager
def _files(*contents: bytes) -> Iterator[Sequence[str]]:
    with tempfile.TemporaryDirectory() as folder:  # its mode is 0700
        paths = [Path(folder) / str(number) for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        yield [str(path) for path in paths]


async def pod_access() -> Access | None:
    """Return the access of the pod's ServiceAccount; None outside a pod. Raises `KubeconfigError`."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        return None
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    identity = await Identity.create(TokenFile(_SERVICE_ACCOUNT / "token", "the ServiceAccount's token"), [])
    return Access(server, identity, tls_context(_SERVICE_ACCOUNT / "ca.crt"), proxy_for(server))


async def load_access(kubeconfig: str | None = None, context: str | None = None) -> Access:
    """Return the access that kubectl would use: a kubeconfig, or in a pod without one its ServiceAccount.

    Raises `KubeconfigError`.
    """
    try:
        config = Kubeconfig(kubeconfig)
        if config.is_empty and not kubeconfig and not context and (access := await pod_access()):
            return access
        return await config.access(context)
    except EgressError as error:
        raise KubeconfigError(str(error)) from None
