"""The operator's settings: environment variables `SMSCHANNEL_*`, checked at start-up."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from smschannel.api.egress import tls_context
from smschannel.api.environment import EnvironmentSettings, is_loopback, plain
from smschannel.api.errors import EgressError
from smschannel.api.names import lease_of
from smschannel.api.resource import Namespace, Rule
from smschannel.api.text import clean, unexpected
from smschannel.core.record import WebhookTemplate
from smschannel.leader import DURATION, LONGEST, MARGIN


def _template(value: str) -> str:
    example = "write for example https://sms.example.com/v1/instances/{instance_id}/channels/sms/webhook"
    if value.count("{instance_id}") != 1:
        raise ValueError(f"must contain {{instance_id}} exactly once; {example}")
    if set("{}") & set(value.replace("{instance_id}", "").replace("{namespace}", "")):
        raise ValueError(f"must have no other braces than {{instance_id}} and {{namespace}}; {example}")
    if value.count("{namespace}") > 1:
        raise ValueError(f"must contain {{namespace}} at most once; {example}")
    netloc = _checked(value, example).netloc
    if "{instance_id}" in netloc or "{namespace}" in netloc:
        raise ValueError(f"must have {{instance_id}} and {{namespace}} after the host; {example}")
    if "{namespace}" in value and not re.search(_DELIMITED, value):
        raise ValueError(f"must have {{namespace}} between slashes or other delimiters; {_NAMESPACED}")
    return value


def _origin(value: str) -> str:
    example = "write for example https://api.twilio.com"
    parts = _checked(value, example)
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError(f"must be an origin without a path; {example}")
    return value.rstrip("/")


def _checked(value: str, example: str) -> SplitResult:
    """Parse an https URL. The error messages never contain the value, which may contain a password."""
    if wrong := unexpected(value):
        raise ValueError(f"contains {wrong}, which a URL cannot; {example}")
    if " " in value:
        raise ValueError(f"contains a space, which a URL cannot; {example}")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        raise ValueError(f"must be a URL with a host; {example}")
    if "@" in parts.netloc:
        raise ValueError(f"must not hold a user or password; {example}")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise ValueError(f"must be https (http is for loopback addresses only); {example}")
    return parts


def _ca_bundle(path: Path) -> Path:
    try:
        tls_context(path)
    except EgressError as error:
        raise ValueError(str(error)) from None
    return path


def _words(value: object) -> object:
    return tuple(dict.fromkeys(value.split())) if isinstance(value, str) else value


_DELIMITED = r"(?<![-a-z0-9{}])\{namespace\}(?![-a-z0-9{}])"
_NAMESPACED = "write for example https://sms.example.com/{namespace}/instances/{instance_id}/channels/sms/webhook"
_PREFIX = "SMSCHANNEL_"
_PUBLISHED = (
    "webhook_url_template",
    "former_webhook_url_templates",
    "channel_namespaces",
    "twilio_api_url",
    "twilio_messaging_url",
    "twilio_url",
    "deletion_grace_seconds",
    "restore_deadline_seconds",
    "keyring_dir",
)
_ORIGINS = ("twilio_url", "twilio_api_url", "twilio_messaging_url")
_LOCAL = (*_ORIGINS, "keyring_dir")
"""Settings that are never taken from what is published; `keyring_dir` is a path of the operator's pod."""

Template = Annotated[str, AfterValidator(_template)]
Shard = Annotated[
    str,
    Rule(
        "^([a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?)?$",
        "a shard's name is at most 42 lower-case letters, digits and dashes, such as a, and begins and ends with a"
        " letter or digit",
    ),
]
_YEAR = 366 * 86_400
Seconds = Annotated[float, Field(allow_inf_nan=False, le=_YEAR)]
Origin = Annotated[str, AfterValidator(_origin)]


class Settings(EnvironmentSettings):
    """Field descriptions are what `python -m smschannel --help` prints."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, env_ignore_empty=True)

    webhook_url_template: Template = Field(
        description="URL of an instance's webhook, with {instance_id} in it; e.g."
        " https://sms.example.com/v1/instances/{instance_id}/channels/sms/webhook"
    )
    former_webhook_url_templates: Annotated[tuple[Template, ...], NoDecode, BeforeValidator(_words)] = Field(
        default=(),
        description="Templates of earlier settings, separated by spaces: their URLs are the operator's, too.",
    )
    channel_namespaces: Annotated[tuple[Namespace, ...], NoDecode, BeforeValidator(_words)] = Field(
        default=("sms-channels",),
        min_length=1,
        description="The namespaces whose channels are managed, separated by spaces. With several, the webhook URL"
        " templates must contain {namespace}.",
    )
    shard: Shard = Field(
        default="",
        description="The name of this operator's shard, if several operators share the namespaces. All of them have the"
        " same SMSCHANNEL_CHANNEL_NAMESPACES.",
    )
    shard_namespaces: Annotated[tuple[Namespace, ...], NoDecode, BeforeValidator(_words)] = Field(
        default=(), description="Those of SMSCHANNEL_CHANNEL_NAMESPACES that this shard manages, and no other does."
    )
    operator_namespace: Namespace = Field(
        default="sms-operator", description="Where the keyring and the records are; no other program may read it."
    )
    twilio_api_url: Origin = Field(default="https://api.twilio.com", description="Twilio's API.")
    twilio_messaging_url: Origin = Field(default="https://messaging.twilio.com", description="Twilio's Messaging API.")
    twilio_url: Origin | None = Field(default=None, description="One origin in place of both of Twilio's.")
    keyring_dir: Path | None = Field(
        default=None,
        description="A directory with the private keys as files, such as a volume of a CSI driver or vault agent. The"
        " last by name seals, all open. Changes are followed; renewal is up to whoever provides the files. Default: the"
        " Secret smschannel-keyring.",
    )
    key_renewal_days: int = Field(
        default=30, ge=0, le=3660, description="How old the newest sealing key may get; 0: it is never renewed."
    )
    ca_bundle: Annotated[Path, AfterValidator(_ca_bundle)] | None = Field(
        default=None,
        description="A file of CA certificates (PEM) that are trusted for Twilio beside the system's; e.g. those of a"
        " proxy that decrypts TLS.",
    )
    twilio_timeout_seconds: Seconds = Field(default=15, gt=0, le=120, description="For one call to Twilio.")
    lease_duration_seconds: int = Field(
        default=DURATION,
        ge=5,
        le=LONGEST,
        description="How long the leader may be silent before another replica takes over. A write to Twilio begins only"
        " while the lease outlasts it.",
    )
    observe_only: bool = Field(
        default=False,
        description="Write nothing to Twilio and claim no number: channels that would change say what would be done.",
    )
    twilio_concurrency: int = Field(default=4, ge=1, le=100, description="Calls in flight per Twilio login.")
    workers: int = Field(default=64, ge=1, le=1000, description="Channels reconciled at once.")
    drift_interval_seconds: Seconds = Field(
        default=600, ge=1, description="How often a configured number is compared with Twilio (+-20 %)."
    )
    slow_interval_seconds: Seconds = Field(
        default=1800,
        ge=1,
        description="How often a channel is checked that cannot work as it is: refused credentials, missing numbers.",
    )
    resync_interval_seconds: Seconds = Field(
        default=600, ge=1, description="How often all channels are listed, to find what the watch missed."
    )
    retry_floor_seconds: Seconds = Field(default=1, ge=0.01, description="The first wait after an error; it doubles.")
    retry_ceiling_seconds: Seconds = Field(default=300, gt=0, description="The longest wait after an error.")
    deletion_grace_seconds: Seconds = Field(
        default=120, ge=0, description="How long a deletion waits for the number to be restored."
    )
    restore_deadline_seconds: Seconds = Field(
        default=604800,
        ge=0,
        description="How long the operator tries to restore a number whose channel is gone, before it writes it off.",
    )
    http_host: str = Field(default="127.0.0.1", description="Address for /metrics, /healthz and /readyz.")
    http_port: int = Field(default=8080, ge=0, le=65535, description="Port for them.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Log level.")
    log_format: Literal["json", "console"] = Field(default="json", description="One JSON object a line, or text.")

    @model_validator(mode="after")
    def _namespaces_have_webhooks_of_their_own(self) -> Self:
        if len(self.channel_namespaces) > 1 and "{namespace}" not in self.webhook_url_template:
            raise ValueError(
                "SMSCHANNEL_WEBHOOK_URL_TEMPLATE must contain {namespace}, since SMSCHANNEL_CHANNEL_NAMESPACES names"
                f" several: else a channel could take another namespace's webhook; {_NAMESPACED}"
            )
        return self

    @model_validator(mode="after")
    def _operator_has_a_namespace_of_its_own(self) -> Self:
        if self.operator_namespace in self.channel_namespaces:
            raise ValueError(
                "SMSCHANNEL_CHANNEL_NAMESPACES must not contain the operator's own namespace"
                f" (SMSCHANNEL_OPERATOR_NAMESPACE, {self.operator_namespace}): who may read Secrets beside channels"
                " could read the keyring and the records"
            )
        return self

    @model_validator(mode="after")
    def _shard_has_namespaces(self) -> Self:
        if self.shard and not self.shard_namespaces:
            raise ValueError(
                f"SMSCHANNEL_SHARD_NAMESPACES must be set, since SMSCHANNEL_SHARD is {self.shard}: write those of"
                " SMSCHANNEL_CHANNEL_NAMESPACES that this shard manages"
            )
        if self.shard_namespaces and not self.shard:
            raise ValueError(
                "SMSCHANNEL_SHARD must be set, since SMSCHANNEL_SHARD_NAMESPACES is: write a name that no other shard"
                " has, such as a; without shards remove SMSCHANNEL_SHARD_NAMESPACES"
            )
        if unknown := sorted(set(self.shard_namespaces) - set(self.channel_namespaces)):
            raise ValueError(
                f"SMSCHANNEL_CHANNEL_NAMESPACES lacks {', '.join(unknown)} of SMSCHANNEL_SHARD_NAMESPACES: it names the"
                " namespaces of all shards, alike for each of them"
            )
        return self

    @model_validator(mode="after")
    def _floor_below_ceiling(self) -> Self:
        if self.retry_floor_seconds > self.retry_ceiling_seconds:
            raise ValueError("SMSCHANNEL_RETRY_FLOOR_SECONDS must not be above SMSCHANNEL_RETRY_CEILING_SECONDS")
        return self

    @model_validator(mode="after")
    def _lease_outlasts_calls(self) -> Self:
        """A third of the duration is for renewals that are late: with less, an unhurried API server stops the work."""
        shortest = math.ceil((self.twilio_timeout_seconds + MARGIN) * 3 / 2)
        if self.lease_duration_seconds < shortest:
            raise ValueError(
                f"SMSCHANNEL_LEASE_DURATION_SECONDS must be at least {shortest}, since"
                f" SMSCHANNEL_TWILIO_TIMEOUT_SECONDS is {self.twilio_timeout_seconds:g}: a write to Twilio begins only"
                " while the lease outlasts it"
            )
        return self

    def published(self) -> dict[str, str]:
        """Return the settings that `kubectl sms plan` needs, by environment variable; Twilio's URLs to compare them."""
        given = {_variable(name): getattr(self, name) for name in _PUBLISHED}
        return {variable: plain(value) for variable, value in given.items() if value is not None}

    @classmethod
    def from_published(cls, content: Mapping[str, str], operator_namespace: str | None = None) -> Self:
        """Return settings from the environment, else from what the operator published, else the defaults.

        Twilio's URLs are never those that were published: others may have written them, and logins are sent there.
        """
        here = {name.upper() for name, value in os.environ.items() if value}
        given: dict[str, Any] = {
            name: content[_variable(name)]
            for name in _PUBLISHED
            if name not in _LOCAL and _variable(name) in content and _variable(name) not in here
        }
        if operator_namespace:
            given["operator_namespace"] = operator_namespace
        return cls(**given)

    def foreign_origin(self, content: Mapping[str, str]) -> tuple[str, str] | None:
        """Return the published variable that sends the operator to another Twilio than this environment, and its value.

        None if they agree, or if this environment names Twilio's URLs itself.
        """
        chosen = self.model_fields_set
        for part, own in (("twilio_api_url", self.api_origin), ("twilio_messaging_url", self.messaging_origin)):
            if "twilio_url" in chosen or part in chosen:
                continue
            for name in ("twilio_url", part):
                if value := clean(content.get(_variable(name), "")):
                    if value.rstrip("/") != own:
                        return _variable(name), value
                    break
        return None

    @property
    def own_namespaces(self) -> tuple[str, ...]:
        """The namespaces that this operator manages: those of its shard, or all."""
        return self.shard_namespaces or self.channel_namespaces

    @property
    def other_namespaces(self) -> frozenset[str]:
        """The namespaces that other shards manage."""
        return frozenset(self.channel_namespaces) - set(self.own_namespaces)

    @property
    def lease(self) -> str:
        """The name of the Lease that the replicas of this operator compete for."""
        return lease_of(self.shard)

    @property
    def template(self) -> WebhookTemplate:
        return WebhookTemplate(self.webhook_url_template, self.former_webhook_url_templates)

    @property
    def api_origin(self) -> str:
        return self.twilio_url or self.twilio_api_url

    @property
    def messaging_origin(self) -> str:
        return self.twilio_url or self.twilio_messaging_url


def _variable(name: str) -> str:
    return _PREFIX + name.upper()
