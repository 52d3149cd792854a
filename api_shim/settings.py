"""The shim's settings: environment variables `SMSSHIM_*`, validated at start."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from api_shim.clients import Network
from smschannel.api.environment import EnvironmentSettings, is_loopback
from smschannel.api.resource import Namespace


def _networks(value: object) -> object:
    """Split an environment variable into networks. The error message does not repeat the value."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(ipaddress.ip_network(word) for word in value.split())
    except ValueError:
        raise ValueError("must be addresses or networks, separated by spaces; write for example 10.0.0.0/8") from None


class Settings(EnvironmentSettings):
    """`python -m api_shim --help` prints the field descriptions."""

    model_config = SettingsConfigDict(env_prefix="SMSSHIM_", frozen=True, env_ignore_empty=True)

    channel_namespace: Namespace = Field(
        default="sms-channels", description="The namespace whose channels are served; e.g. sms-channels."
    )
    operator_namespace: Namespace = Field(
        default="sms-operator",
        description="The namespace of the operator's public sealing key and of the API keys; e.g. sms-operator.",
    )
    token_audience: str = Field(
        default="sms-channels-api", min_length=1, description="The audience that bearer tokens must have."
    )
    http_host: str = Field(default="127.0.0.1", description="Address to listen on; any address but loopback needs TLS.")
    http_port: int = Field(default=8081, ge=0, le=65535, description="Port to listen on; e.g. 8081.")
    tls_cert_file: Path | None = Field(
        default=None, description="Serve TLS with this certificate chain (PEM); loaded again when it changes."
    )
    tls_key_file: Path | None = Field(default=None, description="The certificate's private key (PEM).")
    plain_http: bool = Field(
        default=False, description="true: allow HTTP without TLS on any address, for use behind a proxy with TLS."
    )
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_networks)] = Field(
        default=(),
        description="Addresses or networks, separated by spaces, whose X-Forwarded-For is trusted; e.g. 10.0.0.0/8.",
    )
    authentication_failures_per_minute: int = Field(
        default=60, ge=1, description="Invalid API keys and tokens that a client may send; above that it gets 429."
    )
    max_connections: int = Field(default=4000, ge=1, description="Open connections; above that new ones are closed.")
    max_connections_per_client: int = Field(
        default=500, ge=1, description="Of those, connections from one address that is not a trusted proxy's."
    )
    max_requests: int = Field(default=2000, ge=1, description="Requests in flight; above that clients get 503.")
    max_requests_per_caller: int = Field(
        default=500, ge=1, description="Of those, requests of one API key or user; above that it gets 429."
    )
    max_waiting: int = Field(
        default=1000, ge=0, description="Of those, requests that may wait; above that 'Prefer: wait' is ignored."
    )
    max_waiting_per_caller: int = Field(
        default=250, ge=0, description="Of those, waiting requests of one API key or user."
    )
    request_seconds: float = Field(
        default=15, gt=0, le=120, allow_inf_nan=False, description="The time limit of a request, without waiting."
    )
    wait_limit_seconds: int = Field(
        default=60, ge=0, le=600, description="The maximum of 'Prefer: wait=N'; 0 disables waiting."
    )
    drain_seconds: float = Field(
        default=5,
        ge=0,
        le=300,
        allow_inf_nan=False,
        description="After SIGTERM: how long to keep serving while not ready, until proxies send no new requests.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Log level.")
    log_format: Literal["json", "console"] = Field(default="json", description="One JSON object per line, or text.")

    @model_validator(mode="after")
    def _operator_has_a_namespace_of_its_own(self) -> Self:
        if self.channel_namespace == self.operator_namespace:
            raise ValueError("SMSSHIM_CHANNEL_NAMESPACE and SMSSHIM_OPERATOR_NAMESPACE must be two namespaces")
        return self

    @model_validator(mode="after")
    def _require_both_tls_files(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("SMSSHIM_TLS_CERT_FILE and SMSSHIM_TLS_KEY_FILE: set both, or neither")
        return self

    @model_validator(mode="after")
    def _require_tls(self) -> Self:
        if self.tls_cert_file or self.plain_http or is_loopback(self.http_host):
            return self
        raise ValueError(
            "SMSSHIM_HTTP_HOST is not a loopback address, and API keys would cross the network unencrypted. Set"
            " SMSSHIM_TLS_CERT_FILE and SMSSHIM_TLS_KEY_FILE to serve TLS, or SMSSHIM_PLAIN_HTTP=true behind a proxy"
            " that serves TLS, or SMSSHIM_HTTP_HOST=127.0.0.1"
        )
