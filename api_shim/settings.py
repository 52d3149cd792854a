"""The shim's settings: environment variables `SMSSHIM_*`, checked at start-up."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from api_shim.clients import Network

Namespace = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


def _networks(value: object) -> object:
    """Words of the environment; without the value in the message, as everywhere."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(ipaddress.ip_network(word) for word in value.split())
    except ValueError:
        raise ValueError("must be addresses or networks, separated by spaces; write for example 10.0.0.0/8") from None


class Settings(BaseSettings):
    """Field descriptions are what `python -m api_shim --help` prints."""

    model_config = SettingsConfigDict(env_prefix="SMSSHIM_", frozen=True, env_ignore_empty=True)

    channel_namespace: Namespace = Field(
        default="sms-channels", description="The one namespace whose channels are served; e.g. sms-channels."
    )
    operator_namespace: Namespace = Field(
        default="sms-operator",
        description="Where the operator's public sealing key and the Secret of API keys are; e.g. sms-operator.",
    )
    token_audience: str = Field(
        default="sms-channels-api", min_length=1, description="The audience that bearer tokens must be issued for."
    )
    http_host: str = Field(default="127.0.0.1", description="Address to listen at; any but loopback needs TLS.")
    http_port: int = Field(default=8081, ge=0, le=65535, description="Port to listen at; e.g. 8081.")
    tls_cert_file: Path | None = Field(
        default=None, description="Serve TLS with this certificate chain (PEM); read again when it changes."
    )
    tls_key_file: Path | None = Field(default=None, description="The certificate's private key (PEM).")
    plain_http: bool = Field(
        default=False, description="true: no TLS here, since what stands before this address speaks it."
    )
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_networks)] = Field(
        default=(),
        description="Addresses or networks, separated by spaces, whose X-Forwarded-For is believed; e.g. 10.0.0.0/8.",
    )
    failed_logins_per_minute: int = Field(
        default=60, ge=1, description="How many wrong keys and tokens a client may send; beyond that it gets 429."
    )
    max_requests: int = Field(default=2000, ge=1, description="Requests in hand at once; beyond that clients get 503.")
    max_waiting: int = Field(
        default=1000, ge=0, description="Of those, how many may wait; beyond that 'Prefer: wait' is not followed."
    )
    request_seconds: float = Field(
        default=15, gt=0, le=120, allow_inf_nan=False, description="The longest that an answer takes, waiting aside."
    )
    wait_limit_seconds: int = Field(
        default=60, ge=0, le=600, description="The longest that 'Prefer: wait=N' is followed; 0: never."
    )
    drain_seconds: float = Field(
        default=5,
        ge=0,
        le=300,
        allow_inf_nan=False,
        description="After SIGTERM: how long to go on serving while not ready, until no proxy sends new requests.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Log level.")
    log_format: Literal["json", "console"] = Field(default="json", description="One JSON object a line, or text.")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("SMSSHIM_TLS_CERT_FILE and SMSSHIM_TLS_KEY_FILE: give both, or neither")
        return self

    @model_validator(mode="after")
    def _no_keys_in_the_clear(self) -> Self:
        if self.tls_cert_file or self.plain_http or _is_loopback(self.http_host):
            return self
        raise ValueError(
            "SMSSHIM_HTTP_HOST is no loopback address, and API keys would cross the network in the clear. Write"
            " SMSSHIM_TLS_CERT_FILE and SMSSHIM_TLS_KEY_FILE to serve TLS, or SMSSHIM_PLAIN_HTTP=true if a proxy in"
            " front speaks TLS, or SMSSHIM_HTTP_HOST=127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
