"""Reporting: a channel's status, and Events on transitions. Nothing is written if nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import structlog

from smschannel.api.errors import ChannelError, KubernetesRefused, NoKindMatch
from smschannel.api.reasons import Reason
from smschannel.api.resource import SmsChannel
from smschannel.api.status import check_now, condition, reason_of
from smschannel.core.conditions import next_status, status_while_refused, status_while_unavailable
from smschannel.core.plan import Verdict
from smschannel.core.record import WebhookTemplate
from smschannel.kube_store import KubeStore
from smschannel.metrics import DRIFT

log = structlog.get_logger()


class Reporter:
    """Writes a channel's status and Events. `clock` returns the time for conditions."""

    def __init__(self, kube: KubeStore, template: WebhookTemplate, clock: Callable[[], datetime]) -> None:
        self._kube = kube
        self._template = template
        self._clock = clock

    async def report(self, channel: SmsChannel, verdict: Verdict, *, corrected: bool = False) -> Reason:
        """Report a verdict and return the reason that Ready has now. `corrected`: drift was found and corrected.

        Raises `NotFound` or `Conflict` if the channel is gone.
        """
        before, meta = channel.status, channel.metadata
        checked = verdict.reason not in {Reason.TwilioUnavailable, Reason.KubernetesRefused}
        after = next_status(
            before,
            verdict,
            generation=meta.generation,
            webhook_url=self._template.url(meta.namespace, meta.name),
            check_now=check_now(meta.annotations) if checked else "",
            now=self._clock(),
        )
        await self._write_status(channel, after)
        await self._report_drift(channel, verdict, corrected)
        reported, ready_before = reason_of(before), condition(before, "Ready")
        changed = verdict.reason is not reported or (ready_before and ready_before["status"] != verdict.ready)
        if changed and not (reported is None and verdict.reason is Reason.Configured):
            warning = verdict.ready == "False" and verdict.reason is not Reason.Restoring
            warning = warning or verdict.progress == "Stalled"
            ready = condition(after, "Ready")
            note = ready["message"] if ready else verdict.message
            await self._post_event(channel, warning=warning, reason=verdict.reason.name, note=note)
        return verdict.reason

    async def report_unavailable(self, channel: SmsChannel, verdict: Verdict, *, suspected: bool = False) -> Reason:
        """Report that Twilio is unavailable and return the reason that Ready has now.

        A channel that worked before is not reported as broken. `suspected`: Twilio answers, and a refusal is to be
        confirmed, so that nothing is reported of a generation that has a status already.
        """
        reported = reason_of(channel.status)
        if suspected and reported and channel.status.get("observedGeneration") == channel.metadata.generation:
            return reported
        status = status_while_unavailable(
            channel.status, verdict.message, generation=channel.metadata.generation, now=self._clock()
        )
        if status is None:
            return await self.report(channel, verdict)
        await self._write_status(channel, status)
        return reason_of(status) or verdict.reason

    async def report_refused(self, channel: SmsChannel, verdict: Verdict) -> Reason:
        """Report what Kubernetes refuses and return the reason that Ready has now, or should have.

        A channel that worked before is not reported as broken for the first minute. If the status is refused, too, an
        Event and the log say so.
        """
        meta = channel.metadata
        status = status_while_refused(channel.status, verdict.message, generation=meta.generation, now=self._clock())
        try:
            if status is None:
                return await self.report(channel, verdict)
            await self._write_status(channel, status)
        except NoKindMatch:
            raise
        except KubernetesRefused as error:
            log.warning("cannot write status", namespace=meta.namespace, name=meta.name, error=str(error))
            await self._post_event(channel, warning=True, reason=verdict.reason.name, note=verdict.message)
            return verdict.reason
        return reason_of(status) or verdict.reason

    async def previous_unknown(self, channel: SmsChannel, phone_number: str) -> None:
        """Report a number that cannot be restored, since its previous webhook is not recorded."""
        unknown = f"What {phone_number} pointed at before is not known"
        note = f"{unknown}, so it keeps pointing at the instance's webhook."
        await self._post_event(channel, warning=True, reason="PreviousUnknown", note=note)

    async def _report_drift(self, channel: SmsChannel, verdict: Verdict, corrected: bool) -> None:
        if corrected:
            DRIFT.labels("corrected").inc()
            if verdict.reason is not Reason.WebhookContested:
                note = "The number's webhook was changed at Twilio; it is corrected."
                await self._post_event(channel, warning=True, reason="DriftCorrected", note=note)
        elif verdict.reason is Reason.WebhookDrifted and reason_of(channel.status) is not verdict.reason:
            DRIFT.labels("reported").inc()

    async def _write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None:
        if status != channel.status:
            await self._kube.write_status(channel, status)

    async def _post_event(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None:
        """Post an Event. A failure is only logged: the conditions contain the same."""
        try:
            await self._kube.post_event(channel, warning=warning, reason=reason, note=note)
        except ChannelError as error:
            meta = channel.metadata
            about = {"namespace": meta.namespace, "name": meta.name, "reason": reason}
            log.warning("cannot post event", **about, error=str(error))
