"""A plan in words: each kind of change, what is left as it is and why, and URLs without what nobody may see."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smschannel.api.resource import DeletionPolicy
from smschannel.cli.plan_text import Outlook, shown
from smschannel.core.plan import Debt, Desired, Observed, Routing, foresee
from smschannel.core.record import Entry, Record, Webhook
from tests.unit.test_plan import (
    ACCOUNT,
    ANOTHER_INSTANCE,
    BEFORE,
    DENIED,
    DOWN,
    ELSEWHERE,
    ENTRY,
    GOING,
    MOVED,
    NEW,
    NEWER,
    NOW,
    OURS,
    SEALED_AWAY,
    SET,
    TEMPLATE,
    WANT,
    at,
    kept,
    owing,
)


def outlook(want: Desired | None, seen: Observed) -> Outlook:
    policy = want.deletion_policy if want else seen.record.deletion_policy
    return Outlook(seen, foresee(want, seen, TEMPLATE, NOW), policy)


def told(want: Desired | None, seen: Observed) -> list[str]:
    return [text for _, text in outlook(want, seen).changes()]


@pytest.mark.parametrize(
    ("url", "safe", "reason"),
    [
        ("", "(empty)", "a number without a webhook"),
        ("https://a.example.com/x?y=1#rc=2", "https://a.example.com/x?y=1#rc=2", "what is harmless stays whole"),
        ("https://user:pw@a.example.com/x", "https://***@a.example.com/x", "a password"),
        ("https://user@a.example.com/x", "https://***@a.example.com/x", "a user alone may be a key"),
        ("https://user:p@w@a.example.com/x", "https://***@a.example.com/x", "the last @ ends the password"),
        ("HTTPS://user:pw@a.example.com", "HTTPS://***@a.example.com", "a scheme in capitals"),
        ("//user:pw@a.example.com", "//***@a.example.com", "no scheme"),
        ("user:pw@a.example.com/x", "***@a.example.com/x", "no slashes either"),
        ("https:///user:pw@a.example.com", "https:///***@a.example.com", "a slash too many"),
        ("https://us\ner:pw@a.example.com", "https://***@a.example.com", "over two lines"),
        ("https://us\x1b[2Jer:pw@a.example.com/\x1b[2J", "https://***@a.example.com/?[2J", "a terminal's commands"),
        ("https://a.example.com/@home", "https://a.example.com/@home", "an @ in the path is no password"),
        ("https://a.example.com/?mail=a@b", "https://a.example.com/?mail=a@b", "nor is one in the query"),
    ],
)
def test_what_is_shown_of_a_url(url: str, safe: str, reason: str) -> None:
    assert shown(url) == safe, reason


@given(
    user=st.text(st.characters(exclude_characters="/?#", exclude_categories=["Cs"]), min_size=1),
    path=st.text(st.characters(exclude_characters="@", exclude_categories=["Cs"])),
)
def test_no_password_is_ever_shown(user: str, path: str) -> None:
    assert shown(f"https://{user}:s3cret@h.example.com/{path}").startswith("https://***@h.example.com/")


ONCE = f"record what +61400111222 (PN1) points at now: {BEFORE.url}"
POINT = f"write +61400111222 (PN1): SmsUrl {BEFORE.url} -> {OURS.url}, SmsMethod GET -> POST"
GIVE_BACK = f"give back +61400111222 (PN1): SmsUrl {OURS.url} -> {BEFORE.url}, SmsMethod POST -> GET"
FINALIZER = "add the finalizer channels.hydracore.io/restore"
DROP = "drop the operator's record of the channel"
LET_GO = "remove the finalizer, so that the channel can go"


@pytest.mark.parametrize(
    ("want", "seen", "texts"),
    [
        pytest.param(WANT, NEW, [FINALIZER, ONCE, POINT], id="a new channel"),
        pytest.param(
            WANT,
            replace(NEW, number=at(ANOTHER_INSTANCE)),
            [
                FINALIZER,
                "record what +61400111222 (PN1) points at now: not known, for it is already a webhook of this operator",
                f"write +61400111222 (PN1): SmsUrl {ANOTHER_INSTANCE.url} -> {OURS.url}",
            ],
            id="a number that another instance had",
        ),
        pytest.param(WANT, SET, [], id="all is well"),
        pytest.param(
            WANT,
            replace(SET, number=at(Webhook(url=OURS.url, method="GET"))),
            ["write +61400111222 (PN1): SmsMethod GET -> POST"],
            id="the method alone has drifted",
        ),
        pytest.param(
            WANT, replace(SET, login=NEWER), ["record the credentials that Twilio accepts"], id="a rotated token"
        ),
        pytest.param(
            WANT,
            replace(SET, source="secret/twilio@2"),
            ["record the credentials that Twilio accepts"],
            id="the same token from elsewhere",
        ),
        pytest.param(
            replace(WANT, deletion_policy=DeletionPolicy.CLEAR),
            SET,
            ["record the deletion policy Clear"],
            id="another policy",
        ),
        pytest.param(
            replace(WANT, webhook=ELSEWHERE),
            SET,
            [
                f"record that {ELSEWHERE.url} is ours",
                f"write +61400111222 (PN1): SmsUrl {OURS.url} -> {ELSEWHERE.url}",
            ],
            id="another template",
        ),
        pytest.param(
            WANT,
            replace(SET, record=MOVED, debts={"PN0": at(OURS, "PN0")}),
            [
                f"give back +61400111222 (PN0): SmsUrl {OURS.url} -> {BEFORE.url}, SmsMethod POST -> GET",
                "strike +61400000000 (PN0) off the record",
            ],
            id="the number before is given back",
        ),
        pytest.param(None, GOING, [GIVE_BACK, DROP, LET_GO], id="a deletion"),
        pytest.param(None, replace(GOING, finalizer=False), [GIVE_BACK, DROP], id="a record whose channel is gone"),
        pytest.param(None, replace(GOING, debts={"PN1": DOWN}), [], id="a deletion that waits"),
        pytest.param(
            None,
            replace(GOING, debts={"PN1": DOWN}, grace_over=True),
            ["record since when this is owed", LET_GO],
            id="a deletion that does not wait any longer",
        ),
        pytest.param(
            None,
            replace(GOING, finalizer=False, debts={"PN1": DOWN}, deadline_over=True),
            ["give up: write off what is still owed, and keep the record for people to look at"],
            id="a debt that is too old",
        ),
    ],
)
def test_changes_in_words(want: Desired | None, seen: Observed, texts: list[str]) -> None:
    assert told(want, seen) == texts


@pytest.mark.parametrize(
    ("record", "debt", "says"),
    [
        (kept(deletion_policy=DeletionPolicy.RETAIN), None, "is left as it is: the deletion policy is Retain"),
        (kept(), None, f"is not in account {ACCOUNT} any more: there is nothing to give back"),
        (kept(), at(ELSEWHERE), f"is left as it is: somebody pointed it elsewhere since, at {ELSEWHERE.url}"),
        (owing(previous=None), at(OURS), "is left as it is: what it pointed at before is not known"),
        (owing(previous=OURS), at(OURS), "is left as it is: it points there already"),
        (kept(), DENIED, "cannot be given back: Twilio refuses the credentials."),
        (kept(), DOWN, "cannot be given back: Twilio answers HTTP 503."),
    ],
)
def test_what_is_left_as_it_is_and_why(record: Record, debt: Debt, says: str) -> None:
    looked = outlook(None, replace(GOING, record=record, debts={"PN1": debt}))
    assert [(entry.number_sid, text) for entry, text in looked.left()] == [("PN1", f"+61400111222 (PN1) {says}")]


@pytest.mark.parametrize(
    ("want", "seen", "stuck", "verdict"),
    [
        (WANT, SET, False, "Configured. The number points at the instance's webhook."),
        (WANT, NEW, False, "Configured. The number points at the instance's webhook."),
        (WANT, replace(NEW, number=DENIED), True, "AuthenticationFailed. Twilio refuses the credentials. Take the"),
        (WANT, replace(SET, number=replace(at(OURS), application_sid="AP1")), True, "WebhookOverridden. The TwiML"),
        (replace(WANT, suspend=True), SET, False, "Suspended. Twilio is left as it is: spec.suspend is true. Set"),
        (None, GOING, False, ""),
        (None, replace(GOING, finalizer=False, debts={"PN1": DOWN}, deadline_over=True), True, ""),
        (None, replace(GOING, debts={"PN1": DOWN}), True, "Restoring. The number is not given back yet: Twilio"),
        (None, replace(GOING, debts={"PN1": DENIED}), True, "RestoreFailed. The number is not given back yet: Twilio"),
        (None, replace(GOING, debts={"": SEALED_AWAY}), True, "RestoreFailed. The number is not given back yet: the"),
    ],
)
def test_the_end_of_it(want: Desired | None, seen: Observed, stuck: bool, verdict: str) -> None:
    looked = outlook(want, seen)
    assert looked.stuck is stuck
    assert looked.verdict.startswith(verdict)
    assert bool(looked.verdict) is bool(verdict)


def test_what_could_not_be_seen_is_told() -> None:
    looked = outlook(WANT, replace(SET, routing=Routing(unknown="The Messaging Services cannot be read.")))
    assert looked.verdict.endswith("at the instance's webhook. The Messaging Services cannot be read.")
    assert not looked.stuck


def test_no_document_holds_a_password() -> None:
    found = Webhook(url="https://user:s3cret@before.example.com/", method="POST")
    entry: Entry = ENTRY.model_copy(update={"previous": found})
    cases = [
        (WANT, replace(NEW, number=at(found))),
        (None, replace(GOING, record=kept(entries=(entry,)))),
        (None, replace(GOING, debts={"PN1": at(found)})),
    ]
    for want, seen in cases:
        document = str(outlook(want, seen).document())
        assert "https://***@before.example.com/" in document
        assert "s3cret" not in document
        assert ENTRY.login.token.get_secret_value() not in document
