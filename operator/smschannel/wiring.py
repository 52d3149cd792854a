"""How the parts are put together from the settings: the operator and `kubectl sms` do it alike."""

from __future__ import annotations

from datetime import UTC, datetime

from smschannel.gate import Gate
from smschannel.inventory import Inventory
from smschannel.kube_port import KubePort
from smschannel.ledger import Claims
from smschannel.reconcile import Intervals, Key, Reconciler
from smschannel.sealing import Keyring
from smschannel.settings import Settings
from smschannel.twilio_port import TwilioPort


def twilio_port(settings: Settings) -> TwilioPort:
    return TwilioPort(
        Gate(concurrency=settings.twilio_concurrency, refusal_memory=settings.slow_interval_seconds / 4),
        api_origin=settings.api_origin,
        messaging_origin=settings.messaging_origin,
        timeout=settings.twilio_timeout_seconds,
    )


def reconciler(
    settings: Settings, kube: KubePort, twilio: TwilioPort, keyring: Keyring, claims: Claims[Key]
) -> Reconciler:
    return Reconciler(
        kube,
        twilio,
        Inventory(twilio, ours=settings.template.made, max_age=settings.drift_interval_seconds / 2),
        keyring=keyring,
        template=settings.template,
        claims=claims,
        intervals=Intervals(
            drift=settings.drift_interval_seconds,
            slow=settings.slow_interval_seconds,
            deletion_grace=settings.deletion_grace_seconds,
            release_deadline=settings.release_deadline_seconds,
        ),
        clock=lambda: datetime.now(UTC),
    )
