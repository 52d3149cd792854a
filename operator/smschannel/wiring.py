"""Puts the parts together from the settings: the operator and `kubectl sms` do it alike."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from smschannel.channel_cache import ChannelCache
from smschannel.core.plan import Rules
from smschannel.kube_store import KubeStore
from smschannel.observe import Observer
from smschannel.orphans import Orphans
from smschannel.reconcile import Intervals, Reconciler
from smschannel.report import Reporter
from smschannel.rotation import Rotation
from smschannel.settings import Settings
from smschannel.twilio.account_cache import AccountCache
from smschannel.twilio.client import TwilioClient
from smschannel.twilio.limits import Limiter


def twilio_client(
    settings: Settings, lease_outlasts: Callable[[float], bool], *, confirms_refusals: bool = False
) -> TwilioClient:
    """Build the Twilio client with its limiter; use it as a context manager.

    `lease_outlasts`: whether this process leads for so many seconds more; it writes to Twilio only then.
    `confirms_refusals`: a refusal of credentials that worked before is not believed until it is repeated later. A
    command line has no later, and shows what Twilio answers now.
    """
    return TwilioClient(
        Limiter(
            concurrency=settings.twilio_concurrency,
            refusal_memory=settings.slow_interval_seconds / 4,
            confirm_after=settings.retry_ceiling_seconds / 5 if confirms_refusals else 0,
        ),
        api_origin=settings.api_origin,
        messaging_origin=settings.messaging_origin,
        timeout=settings.twilio_timeout_seconds,
        lease_outlasts=lease_outlasts,
        ca_bundle=settings.ca_bundle,
    )


def reconciler(
    settings: Settings,
    kube: KubeStore,
    twilio: TwilioClient,
    channels: ChannelCache,
    orphans: Orphans,
    *,
    observe_only: bool = False,
) -> Reconciler:
    """Build the reconciler with its observer, reporter and account cache.

    `observe_only` is not taken from the settings: it is for the operator, and does not bind `kubectl sms detach`.
    """
    accounts = AccountCache(twilio, is_own_url=settings.template.made, max_age=settings.drift_interval_seconds / 2)
    intervals = Intervals(drift=settings.drift_interval_seconds, slow=settings.slow_interval_seconds)
    return Reconciler(
        kube,
        twilio,
        Observer(kube, twilio, accounts, channels, drift_interval=intervals.drift, slow_interval=intervals.slow),
        Reporter(kube, settings.template, _clock),
        orphans,
        rules=Rules(
            settings.template,
            deletion_grace=timedelta(seconds=settings.deletion_grace_seconds),
            restore_deadline=timedelta(seconds=settings.restore_deadline_seconds),
        ),
        intervals=intervals,
        clock=_clock,
        observe_only=observe_only,
    )


def rotation(settings: Settings, kube: KubeStore) -> Rotation:
    """Build the care for the keyring."""
    return Rotation(kube, renewal=timedelta(days=settings.key_renewal_days), clock=_clock)


def _clock() -> datetime:
    return datetime.now(UTC)
