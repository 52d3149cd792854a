"""As whom Kubernetes is called: the credentials of a kubeconfig's user, kept current, and whom they impersonate."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smschannel.api.errors import KubeconfigError
from smschannel.api.text import TextError, clean, decode, described, is_invisible

_REREAD_SECONDS = 60
_RENEW_EARLY_SECONDS = 60
_LONGEST = 1000  # characters of what a login program said


class Credentials(NamedTuple):
    """The value of the Authorization header, and a client certificate with its key (PEM), if there are any.

    `expires` is on the clock of `time.time`; None means that they do not expire.
    """

    authorization: str | None = None
    certificate: tuple[bytes, bytes] | None = None
    expires: float | None = None


class Login(Protocol):
    """A source of credentials. `get` raises `KubeconfigError`; `renewable` says whether it may return others later."""

    renewable: bool

    async def get(self) -> Credentials: ...


class Identity:
    """The headers that say who calls. Credentials are renewed when they expire or are refused."""

    def __init__(self, login: Login | None = None, impersonation: Sequence[tuple[str, str]] = ()) -> None:
        self._login = login
        self._impersonation = impersonation
        self._credentials = Credentials()
        self._lock = asyncio.Lock()

    @classmethod
    async def create(cls, login: Login | None, impersonation: Sequence[tuple[str, str]]) -> Identity:
        """Return an identity that has logged in. Raises `KubeconfigError` if that is not possible."""
        identity = cls(login, impersonation)
        if login:
            identity._credentials = await login.get()
        return identity

    @property
    def certificate(self) -> tuple[bytes, bytes] | None:
        """Return the client certificate and key (PEM) of a login program."""
        return self._credentials.certificate

    async def headers(self) -> list[tuple[str, str]]:
        """Return the headers for one request. Raises `KubeconfigError` if credentials cannot be renewed."""
        expires = self._credentials.expires
        if self._login and expires is not None and expires <= time.time():
            await self._renew(self._credentials)
        headers = list(self._impersonation)
        if self._credentials.authorization:
            headers.append(("Authorization", self._credentials.authorization))
        return headers

    async def renewed(self) -> bool:
        """Log in again because the credentials were refused; return whether there are others now."""
        if not self._login or not self._login.renewable:
            return False
        refused = self._credentials
        await self._renew(refused)
        return self._credentials.authorization != refused.authorization

    async def _renew(self, refused: Credentials) -> None:
        assert self._login
        async with self._lock:
            if self._credentials is refused:  # else another request has renewed them meanwhile
                self._credentials = await self._login.get()


class TokenLogin:
    """A token that is written in the kubeconfig."""

    renewable = False

    def __init__(self, token: str) -> None:
        self._token = token

    async def get(self) -> Credentials:
        return Credentials(f"Bearer {self._token}")


class BasicLogin:
    """A user and password."""

    renewable = False

    def __init__(self, user: str, password: str) -> None:
        self._pair = f"{user}:{password}"

    async def get(self) -> Credentials:
        return Credentials("Basic " + base64.b64encode(self._pair.encode()).decode())


class TokenFile:
    """A file that is read again every minute, since its token is replaced before it expires."""

    renewable = True

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what
        self._last: str | None = None

    async def get(self) -> Credentials:
        try:
            token = _checked(decode(self._path.read_bytes()), self._what)
        except (OSError, TextError, KubeconfigError) as error:
            if self._last is None:
                said = error.strerror if isinstance(error, OSError) else str(error)
                raise KubeconfigError(f"{self._what} cannot be used: {self._path}: {said}") from None
            token = self._last  # as client-go: the file may be there again the next time
        self._last = token
        return Credentials(f"Bearer {token}", expires=time.time() + _REREAD_SECONDS)


class ExecLogin:
    """A login program, as `users[].exec` of a kubeconfig names it."""

    renewable = True

    def __init__(
        self,
        *,
        user: str,
        command: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        api_version: str,
        interactive: str,
        hint: str,
        cluster: Mapping[str, Any] | None,
    ) -> None:
        self._user = user
        self._command = command
        self._arguments = arguments
        self._environment = environment
        self._api_version = api_version
        self._interactive = interactive
        self._hint = hint
        self._cluster = cluster

    async def get(self) -> Credentials:
        """Run the program. Raises `KubeconfigError` with what it wrote to standard error, never with its output."""
        terminal = sys.stdin is not None and sys.stdin.isatty() and self._interactive != "Never"
        if self._interactive == "Always" and not terminal:
            raise self._error("needs a terminal (interactiveMode: Always), and standard input is none")
        spec = {"interactive": terminal, **({"cluster": self._cluster} if self._cluster else {})}
        request = {"apiVersion": self._api_version, "kind": "ExecCredential", "spec": spec}
        environment = {**os.environ, **self._environment, "KUBERNETES_EXEC_INFO": json.dumps(request)}
        try:
            process = await asyncio.create_subprocess_exec(
                self._command,
                *self._arguments,
                env=environment,
                stdin=None if terminal else asyncio.subprocess.DEVNULL,  # standard input may hold a token for us
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except FileNotFoundError:
            raise self._error("is not installed", self._hint) from None
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "its arguments are not valid"
            raise self._error(f"cannot be run: {why}") from None
        assert process.stdout
        assert process.stderr
        try:
            output, said = await asyncio.gather(process.stdout.read(), _relayed(process.stderr))
            status = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            raise
        if status:
            raise self._error(f"ended with {status}", said or "It said nothing.")
        return self._credentials(output)

    def _credentials(self, output: bytes) -> Credentials:
        try:
            document = json.loads(decode(output))
            status = document["status"]
            version = document["apiVersion"]
            fields = [status.get(key) for key in ("token", "clientCertificateData", "clientKeyData")]
            expiry = status.get("expirationTimestamp")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._error("printed no ExecCredential with a status") from None
        if version != self._api_version:
            raise self._error(f"answers in another version than {self._api_version}, which the kubeconfig names")
        token, certificate, key = (each if isinstance(each, str) else "" for each in fields)
        if not token and not (certificate and key):
            raise self._error("printed neither a token nor a client certificate with its key")
        return Credentials(
            f"Bearer {_checked(token, f'The token of {self._command}')}" if token else None,
            (certificate.encode(), key.encode()) if certificate and key else None,
            _expiry(expiry),
        )

    def _error(self, what: str, said: str = "") -> KubeconfigError:
        program = f"the login program of user {self._user}, {self._command}"
        return KubeconfigError(f"{program}, {what}" + (f". {said}" if said else ""))


class OidcLogin:
    """The auth-provider `oidc`; the `kubernetes` package renews its tokens, and does not write them back."""

    renewable = True

    def __init__(self, user: str, fields: Mapping[str, Any]) -> None:
        self._user = user
        self._fields = fields
        self._loader: Any = None

    async def get(self) -> Credentials:
        from kubernetes.aio.client.configuration import Configuration
        from kubernetes.aio.config.kube_config import KubeConfigLoader

        configuration = Configuration()
        try:
            if self._loader is None:
                self._loader = KubeConfigLoader(
                    {
                        "current-context": "c",
                        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1"}}],
                        "users": [{"name": "u", "user": dict(self._fields)}],
                    }
                )
            await self._loader.load_and_set(configuration)
            return Credentials(configuration.api_key["BearerToken"], expires=time.time() + _REREAD_SECONDS)
        except Exception:  # of many kinds; their texts may hold tokens
            raise KubeconfigError(
                f"user {self._user} cannot log in with OIDC: the token has expired and could not be renewed, or its"
                " settings are incomplete. Log in again with your OIDC tool"
            ) from None


def _checked(token: str, what: str) -> str:
    token = clean(token)
    if not token:
        raise KubeconfigError(f"{what} is empty")
    for each in token:
        if is_invisible(each) or each == " ":
            raise KubeconfigError(f"{what} contains {described(each)}")
    return token


def _expiry(text: object) -> float | None:
    if not isinstance(text, str):
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - _RENEW_EARLY_SECONDS


async def _relayed(stream: asyncio.StreamReader) -> str:
    """Return what a login program says; on a terminal it is also shown at once, since it may ask to open a page."""
    said = b""
    while part := await stream.read(4096):
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(part.decode(errors="replace"))
            sys.stderr.flush()
        said = (said + part)[: 4 * _LONGEST]
    text = " ".join(said.decode(errors="replace").split())[:_LONGEST]
    return "It said: " + "".join(each if each.isprintable() else "?" for each in text) if text else ""
