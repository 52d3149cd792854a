"""The shim's settings: environment variables `SMSSHIM_*`, checked at start-up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict

Namespace = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


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
    http_host: str = Field(default="127.0.0.1", description="Address to listen at; put TLS in front of any other.")
    http_port: int = Field(default=8081, ge=0, le=65535, description="Port to listen at; e.g. 8081.")
    wait_limit_seconds: int = Field(
        default=60, ge=0, le=600, description="The longest that 'Prefer: wait=N' is followed; 0: never."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Log level.")
    log_format: Literal["json", "console"] = Field(default="json", description="One JSON object a line, or text.")
