"""What a webhook's answer to a test message means. No I/O."""

from __future__ import annotations

from typing import NamedTuple

from smschannel.cli.http import Delivery

_XML = {"text/xml", "application/xml"}
_REFUSED = {401, 403}


class Verdict(NamedTuple):
    """Whether the webhook does what it should, why, and what to do if not."""

    good: bool
    text: str
    remedy: str = ""


def judge(answer: Delivery, *, signed: bool, url: str) -> Verdict:
    """Judge the answer to a message with a signature, or without one."""
    if answer.status is None:
        text = f"The webhook does not answer: {answer.problem}."
        return Verdict(False, text, "See its DNS, TLS and firewall: Twilio must reach it from the Internet.")
    said = f"The webhook answers HTTP {answer.status} in {answer.seconds:.2f} s"
    if answer.status in _REFUSED:
        return _refused(said, signed=signed, url=url)
    if answer.status < 300:
        return _accepted(answer, said, signed=signed)
    if answer.status < 400:
        text = f"{said}: a redirect. It was not followed."
        return Verdict(False, text, "Let the webhook URL template name the final URL.")
    if answer.status == 404:
        return Verdict(False, f"{said}.", "Does this instance exist there, and is the webhook URL template right?")
    remedy = "Look at the log of the instance's own service: Twilio counts this as a failed delivery."
    return Verdict(False, f"{said}.", remedy)


def _refused(said: str, *, signed: bool, url: str) -> Verdict:
    if not signed:
        return Verdict(True, f"{said}: it rejects a message without a signature, as it should.")
    remedy = (
        "The instance must have the auth token of this account, and compute the signature over exactly this URL:"
        f" {url}. A proxy in front of it may show it another host or path."
    )
    return Verdict(False, f"{said}: it rejects the signature.", remedy)


def _accepted(answer: Delivery, said: str, *, signed: bool) -> Verdict:
    if not signed:
        remedy = "Have the instance check X-Twilio-Signature: anybody who knows the URL can send it messages."
        return Verdict(False, f"{said}: it accepts a message without a signature.", remedy)
    if not answer.body or answer.content_type in _XML:
        return Verdict(True, f"{said}, {answer.content_type if answer.body else 'empty'}: delivered.")
    if answer.content_type == "text/plain":
        return Verdict(True, f"{said}, text/plain: delivered. Twilio sends such a text as a reply.")
    text = f"{said}, {answer.content_type}: delivered, but Twilio reports error 12300 for this content type."
    return Verdict(False, text, "Answer with text/xml (TwiML), or with an empty body.")
