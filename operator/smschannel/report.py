"""Reporting: a channel's status, and Events on transitions. Nothing is written if nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import structlog

from smschannel.api.errors import ChannelError, KubernetesRefused, NoKindMatch
from smschannel.api.reasons import Reason
from smschannel.api.resource import SmsChannel
from smschannel.api.status import check_now, condition, reason_of
from smschannel.core.conditions import next_status, status_while_refused, status_while_unavailable
from smschannel.core.plan import Verdict, Waiter
from smschannel.core.record import Record, WebhookTemplate
from smschannel.kube_store import KubeStore
from smschannel.metrics import DRIFT

log = structlog.get_logger()


class StatusRefused(KubernetesRefused):
    """Kubernetes refuses to have the status written: writing another one would be refused, too."""


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

    async def report_refused(self, channel: SmsChannel, verdict: Verdict, refused: KubernetesRefused) -> Reason:
        """Report what Kubernetes refuses and return the reason that Ready has now, or should have.

        A channel that worked before is not reported as broken for the first minute. If the status itself is refused,
        an Event and the log say so.
        """
        meta = channel.metadata
        if isinstance(refused, StatusRefused):
            return await self._report_without_status(channel, verdict, refused)
        status = status_while_refused(channel.status, verdict.message, generation=meta.generation, now=self._clock())
        try:
            if status is None:
                return await self.report(channel, verdict)
            await self._write_status(channel, status)
        except StatusRefused as error:
            return await self._report_without_status(channel, verdict, error)
        return reason_of(status) or verdict.reason

    async def _report_without_status(self, channel: SmsChannel, verdict: Verdict, error: StatusRefused) -> Reason:
        meta = channel.metadata
        log.warning("cannot write status", namespace=meta.namespace, name=meta.name, error=str(error))
        await self._post_event(channel, warning=True, reason=verdict.reason.name, note=verdict.message)
        return verdict.reason

    async def previous_unknown(self, channel: SmsChannel, phone_number: str) -> None:
        """Report a number that cannot be restored, since its previous webhook is not recorded."""
        unknown = f"What {phone_number} pointed at before is not known"
        note = f"{unknown}, so it keeps pointing at the instance's webhook."
        await self._post_event(channel, warning=True, reason="PreviousUnknown", note=note)

    async def yielded(self, channel: SmsChannel, record: Record, waiter: Waiter) -> None:
        """Report that a channel loses a number: on both channels, neither of which learns the other's name, and for
        the administrators in the operator's namespace.
        """
        why = "for an hour Twilio has refused this channel's credentials, or not shown them the number"
        note = f"{record.phone_number} goes to another channel, whose credentials Twilio accepts: {why}."
        await self._post_event(channel, warning=True, reason="ClaimLost", note=note)
        about = {"namespace": waiter.key.namespace, "name": waiter.key.name, "reason": "ClaimFreed"}
        note = f"{record.phone_number} is free: its former holder has had no access to it at Twilio for an hour."
        with self._logged(about):
            await self._kube.post_event_about(waiter.key, waiter.uid, reason="ClaimFreed", note=note)
        note = (
            f"{record.phone_number} ({record.number_sid}) goes from {'/'.join(record.key)} to {'/'.join(waiter.key)}:"
            " for an hour Twilio has refused the former's credentials, or not shown them the number."
        )
        with self._logged({**about, "reason": "ClaimMoved"}):
            await self._kube.post_event_about_record(record, reason="ClaimMoved", note=note)

    async def _report_drift(self, channel: SmsChannel, verdict: Verdict, corrected: bool) -> None:
        if corrected:
            DRIFT.labels("corrected").inc()
            if verdict.reason is not Reason.WebhookContested:
                note = "The number's webhook was changed at Twilio; it is corrected."
                await self._post_event(channel, warning=True, reason="DriftCorrected", note=note)
        elif verdict.reason is Reason.WebhookDrifted and reason_of(channel.status) is not verdict.reason:
            DRIFT.labels("reported").inc()

    async def _write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None:
        if status == channel.status:
            return
        try:
            await self._kube.write_status(channel, status)
        except NoKindMatch:
            raise
        except KubernetesRefused as error:
            raise StatusRefused(error.status, str(error)) from None

    async def _post_event(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None:
        """Post an Event. A failure is only logged: the conditions contain the same."""
        with self._logged({"namespace": channel.metadata.namespace, "name": channel.metadata.name, "reason": reason}):
            await self._kube.post_event(channel, warning=warning, reason=reason, note=note)

    @contextmanager
    def _logged(self, about: Mapping[str, str]) -> Iterator[None]:
        """Log errors of the block, which posts an Event, instead of raising them."""
        try:
            yield
        except ChannelError as error:
            log.warning("cannot post event", **about, error=str(error))
