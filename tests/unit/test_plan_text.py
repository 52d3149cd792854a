"""A plan in words: each kind of change, numbers that are left as they are and why, and URLs without their secrets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smschannel.api.resource import DeletionPolicy
from smschannel.cli.plan_text import Outlook, shown
from smschannel.core.plan import Current, Desired, Observed, RestoreWebhook, Routing, SetWebhook, foresee
from smschannel.core.record import Record, Webhook
from tests.unit.test_plan import (
    ACCOUNT,
    ANOTHER_INSTANCE,
    BEFORE,
    CLEAR,
    CONFIGURED,
    DAMAGED,
    DEADLINE_OVER,
    DELETING,
    DENIED,
    DESIRED,
    DOWN,
    ELSEWHERE,
    GONE,
    IN_USE,
    LATE,
    MOVED,
    NEW,
    NEWER,
    NOW,
    OLD_RECORD,
    OTHER_ACCOUNT,
    OTHER_LOGIN,
    OURS,
    RECORD,
    RULES,
    SUSPENDED,
    UNREADABLE,
    at,
    by_number,
    situations,
)


def outlook(desired: Desired | None, observed: Observed) -> Outlook:
    policy = desired.deletion_policy if desired else None
    return Outlook(observed, foresee(desired, observed, RULES, NOW), policy)


def texts(desired: Desired | None, observed: Observed) -> list[str]:
    return [text for _, text in outlook(desired, observed).changes()]


@pytest.mark.parametrize(
    ("url", "safe", "reason"),
    [
        ("", "(empty)", "a number without a webhook"),
        ("https://a.example.com/x?y=1#rc=2", "https://a.example.com/x?y=1#rc=2", "a harmless URL stays whole"),
        ("https://user:pw@a.example.com/x", "https://***@a.example.com/x", "a password"),
        ("https://user@a.example.com/x", "https://***@a.example.com/x", "a user alone may be a key"),
        ("https://user:p@w@a.example.com/x", "https://***@a.example.com/x", "the last @ ends the password"),
        ("HTTPS://user:pw@a.example.com", "HTTPS://***@a.example.com", "a scheme in capitals"),
        ("//user:pw@a.example.com", "//***@a.example.com", "no scheme"),
        ("user:pw@a.example.com/x", "***@a.example.com/x", "no slashes either"),
        ("https:///user:pw@a.example.com", "https:///***@a.example.com", "a slash too many"),
        ("https://us\ner:pw@a.example.com", "https://***@a.example.com", "over two lines"),
        ("https://us\x1b[2Jer:pw@a.example.com/\x1b[2J", "https://***@a.example.com/?[2J", "control characters"),
        ("https://a.example.com/@home", "https://a.example.com/@home", "an @ in the path does not mark a password"),
        ("https://a.example.com/?mail=a@b", "https://a.example.com/?mail=a@b", "nor is one in the query"),
    ],
)
def test_shown_url(url: str, safe: str, reason: str) -> None:
    assert shown(url) == safe, reason


@given(
    user=st.text(st.characters(exclude_characters="/?#", exclude_categories=["Cs"]), min_size=1),
    path=st.text(st.characters(exclude_characters="@", exclude_categories=["Cs"])),
)
def test_password_is_never_shown(user: str, path: str) -> None:
    assert shown(f"https://{user}:s3cret@h.example.com/{path}").startswith("https://***@h.example.com/")


CLAIM = f"claim +61400111222 (PN1), and record what it points at now: {BEFORE.url}"
SET = f"set the webhook of +61400111222 (PN1): SmsUrl {BEFORE.url} -> {OURS.url}, SmsMethod GET -> POST"
RESTORE = f"restore the webhook of +61400111222 (PN1): SmsUrl {OURS.url} -> {BEFORE.url}, SmsMethod POST -> GET"
RESTORE_OLD = RESTORE.replace("+61400111222 (PN1)", "+61400000000 (PN0)")
FREE = "free +61400111222 (PN1): delete the operator's record of it"
FREE_OLD = "free +61400000000 (PN0): delete the operator's record of it"
WRITE_OFF = "write off +61400111222 (PN1): stop trying to restore it, and keep a copy of its record"
ADD_FINALIZER = "add the finalizer channels.hydracore.io/restore"
REMOVE_FINALIZER = "remove the finalizer, so that the channel can go"


@pytest.mark.parametrize(
    ("desired", "observed", "expected"),
    [
        pytest.param(DESIRED, NEW, [ADD_FINALIZER, CLAIM, SET], id="a new channel"),
        pytest.param(
            DESIRED,
            replace(NEW, number=at(ANOTHER_INSTANCE)),
            [
                ADD_FINALIZER,
                "claim +61400111222 (PN1), and record what it points at now:"
                " not known, since it is already a webhook of this operator",
                f"set the webhook of +61400111222 (PN1): SmsUrl {ANOTHER_INSTANCE.url} -> {OURS.url}",
            ],
            id="a number that another instance had",
        ),
        pytest.param(DESIRED, CONFIGURED, [], id="all is well"),
        pytest.param(
            DESIRED,
            replace(CONFIGURED, number=at(Webhook(url=OURS.url, method="GET"))),
            ["set the webhook of +61400111222 (PN1): SmsMethod GET -> POST"],
            id="only the method has drifted",
        ),
        pytest.param(
            DESIRED,
            replace(CONFIGURED, login=NEWER),
            ["record for +61400111222 (PN1): the credentials that Twilio accepts"],
            id="a rotated token",
        ),
        pytest.param(
            DESIRED,
            replace(CONFIGURED, source="secret/twilio@2"),
            ["record for +61400111222 (PN1): the credentials that Twilio accepts"],
            id="the same token from elsewhere",
        ),
        pytest.param(
            DESIRED,
            replace(MOVED, login=NEWER, to_restore={"PN0": DOWN}),
            [
                "record for +61400000000 (PN0): the credentials that Twilio accepts",
                "record for +61400111222 (PN1): the credentials that Twilio accepts",
            ],
            id="a rotated token for two numbers",
        ),
        pytest.param(
            CLEAR,
            CONFIGURED,
            ["record for +61400111222 (PN1): deletion policy Clear"],
            id="another policy",
        ),
        pytest.param(
            replace(CLEAR, account_sid=OTHER_ACCOUNT),
            replace(CONFIGURED, login=OTHER_LOGIN),
            [
                f"record for +61400111222 (PN1): deletion policy Clear, account {OTHER_ACCOUNT},"
                " the credentials that Twilio accepts"
            ],
            id="another account and another policy",
        ),
        pytest.param(
            DESIRED,
            replace(CONFIGURED, records=by_number(replace(RECORD, restore_since=NOW))),
            ["record for +61400111222 (PN1): no longer to be restored"],
            id="a channel that was created again",
        ),
        pytest.param(
            replace(DESIRED, webhook=ELSEWHERE),
            CONFIGURED,
            [
                f"record for +61400111222 (PN1): {ELSEWHERE.url} as a URL of ours",
                f"set the webhook of +61400111222 (PN1): SmsUrl {OURS.url} -> {ELSEWHERE.url}",
            ],
            id="another template",
        ),
        pytest.param(
            DESIRED,
            MOVED,
            [RESTORE_OLD, FREE_OLD],
            id="a former number is restored",
        ),
        pytest.param(
            DESIRED,
            replace(CONFIGURED, number=IN_USE, to_restore={"PN1": at(OURS)}),
            ["record for +61400111222 (PN1): to be restored since 2026-01-02T03:04:05Z", RESTORE, FREE],
            id="two channels swap their numbers",
        ),
        pytest.param(None, DELETING, [RESTORE, FREE, REMOVE_FINALIZER], id="a deletion"),
        pytest.param(None, GONE, [RESTORE, FREE], id="a record whose channel is gone"),
        pytest.param(None, replace(DELETING, to_restore={"PN1": DOWN}), [], id="a deletion that waits"),
        pytest.param(
            None,
            replace(LATE, to_restore={"PN1": DOWN}),
            ["record for +61400111222 (PN1): to be restored since 2026-01-02T03:04:05Z", REMOVE_FINALIZER],
            id="a deletion that does not wait any longer",
        ),
        pytest.param(
            None,
            replace(GONE, records=by_number(replace(RECORD, restore_since=DEADLINE_OVER)), to_restore={"PN1": DOWN}),
            [WRITE_OFF],
            id="a restore whose deadline is over",
        ),
        pytest.param(
            None,
            replace(LATE, records=by_number(UNREADABLE), to_restore={"PN1": DAMAGED}),
            ["record for +61400111222 (PN1): to be restored since 2026-01-02T03:04:05Z", REMOVE_FINALIZER],
            id="a deletion without a readable record",
        ),
        pytest.param(
            None,
            replace(LATE, records=by_number(OLD_RECORD, RECORD), to_restore={"PN0": None, "PN1": DENIED}),
            [
                FREE_OLD,
                "record for +61400111222 (PN1): to be restored since 2026-01-02T03:04:05Z",
                REMOVE_FINALIZER,
            ],
            id="of two numbers one cannot be restored",
        ),
    ],
)
def test_changes_as_text(desired: Desired | None, observed: Observed, expected: list[str]) -> None:
    assert texts(desired, observed) == expected


@pytest.mark.parametrize(
    ("record", "current", "why"),
    [
        (
            replace(RECORD, deletion_policy=DeletionPolicy.RETAIN),
            None,
            "is left as it is: the deletion policy is Retain",
        ),
        (RECORD, None, f"is no longer in account {ACCOUNT}: there is nothing to restore"),
        (RECORD, at(ELSEWHERE), f"is left as it is: somebody pointed it elsewhere since, at {ELSEWHERE.url}"),
        (
            RECORD.with_contents(previous=None),
            at(OURS),
            "is left as it is: what it pointed at before is not known",
        ),
        (RECORD.with_contents(previous=OURS), at(OURS), "is left as it is: it points there already"),
        (RECORD, DENIED, "cannot be restored: Twilio refuses the credentials."),
        (RECORD, DOWN, "cannot be restored: Twilio answers HTTP 503."),
        (UNREADABLE, DAMAGED, "cannot be restored: the record cannot be opened"),
        (UNREADABLE, None, "cannot be restored: its record cannot be opened"),
    ],
)
def test_numbers_that_are_not_restored_and_why(record: Record, current: Current, why: str) -> None:
    found = outlook(None, replace(DELETING, records=by_number(record), to_restore={"PN1": current}))
    assert list(found.not_restored()) == [(record, f"+61400111222 (PN1) {why}")]


def test_current_policy_explains_why_a_former_number_is_not_restored() -> None:
    """The record still has the former policy; it is updated first."""
    found = outlook(replace(DESIRED, deletion_policy=DeletionPolicy.RETAIN), replace(MOVED, to_restore={"PN0": None}))
    assert [text for _, text in found.not_restored()] == [
        "+61400000000 (PN0) is left as it is: the deletion policy is Retain"
    ]


def test_restored_numbers_are_not_listed_as_not_restored() -> None:
    assert list(outlook(None, DELETING).not_restored()) == []
    assert list(outlook(DESIRED, MOVED).not_restored()) == []


def test_moved_names_the_number_and_both_webhooks() -> None:
    found = outlook(None, DELETING)
    change = next(change for change, _ in found.changes() if isinstance(change, RestoreWebhook))
    moved = found.moved(change)
    assert moved == f"+61400111222 (PN1): SmsUrl {OURS.url} -> {BEFORE.url}, SmsMethod POST -> GET"


WRITTEN_OFF = replace(GONE, records=by_number(replace(RECORD, restore_since=DEADLINE_OVER)), to_restore={"PN1": DOWN})


@pytest.mark.parametrize(
    ("desired", "observed", "stuck", "verdict"),
    [
        (DESIRED, CONFIGURED, False, "Configured. The number points at the instance's webhook."),
        (DESIRED, NEW, False, "Configured. The number points at the instance's webhook."),
        (
            DESIRED,
            replace(NEW, number=DENIED),
            True,
            "AuthenticationFailed. Twilio refuses the credentials. Take the",
        ),
        (
            DESIRED,
            replace(CONFIGURED, number=replace(at(OURS), application_sid="AP1")),
            True,
            "WebhookOverridden. The TwiML",
        ),
        (SUSPENDED, CONFIGURED, False, "Suspended. Twilio is left as it is: spec.suspend is true. Set"),
        (None, DELETING, False, ""),
        (None, WRITTEN_OFF, True, ""),
        (
            None,
            replace(
                WRITTEN_OFF,
                records=by_number(replace(OLD_RECORD, restore_since=NOW), *WRITTEN_OFF.records.values()),
                to_restore={"PN0": DOWN, "PN1": DOWN},
            ),
            True,
            "Restoring. The number is not restored yet: Twilio answers HTTP 503.",
        ),
        (
            None,
            replace(DELETING, to_restore={"PN1": DOWN}),
            True,
            "Restoring. The number is not restored yet: Twilio answers HTTP 503.",
        ),
        (
            None,
            replace(DELETING, to_restore={"PN1": DENIED}),
            True,
            "RestoreFailed. The number is not restored yet: Twilio refuses the credentials.",
        ),
        (
            None,
            replace(DELETING, records=by_number(UNREADABLE), to_restore={"PN1": DAMAGED}),
            True,
            "RestoreFailed. The number is not restored yet: the record cannot be opened",
        ),
    ],
)
def test_verdict_as_text(desired: Desired | None, observed: Observed, stuck: bool, verdict: str) -> None:
    found = outlook(desired, observed)
    assert found.stuck is stuck
    assert found.verdict.startswith(verdict)
    assert bool(found.verdict) is bool(verdict)


def test_routing_that_cannot_be_read_is_reported() -> None:
    found = outlook(DESIRED, replace(CONFIGURED, routing=Routing(unknown="The Messaging Services cannot be read.")))
    assert found.verdict.endswith("at the instance's webhook. The Messaging Services cannot be read.")
    assert not found.stuck


def test_document_of_a_new_channel() -> None:
    number = {"accountSid": ACCOUNT, "numberSid": "PN1", "phoneNumber": "+61400111222"}
    assert outlook(DESIRED, NEW).document() == {
        "reason": "Configured",
        "message": "The number points at the instance's webhook.",
        "remedy": "Nothing to do.",
        "unknown": "",
        "stuck": False,
        "changes": [
            {"change": "AddFinalizer", "text": ADD_FINALIZER},
            {"change": "CreateRecord", "text": CLAIM, **number},
            {
                "change": "SetWebhook",
                "text": SET,
                **number,
                "from": {"smsUrl": BEFORE.url, "smsMethod": "GET"},
                "to": {"smsUrl": OURS.url, "smsMethod": "POST"},
            },
        ],
        "notRestored": [],
    }


def test_document_of_a_deletion() -> None:
    number = {"accountSid": ACCOUNT, "numberSid": "PN1", "phoneNumber": "+61400111222"}
    old = {"accountSid": ACCOUNT, "numberSid": "PN0", "phoneNumber": "+61400000000"}
    records = by_number(OLD_RECORD, replace(RECORD, deletion_policy=DeletionPolicy.CLEAR))
    document = outlook(None, replace(DELETING, records=records, to_restore={"PN0": None, "PN1": at(OURS)})).document()
    assert document["changes"] == [
        {"change": "DeleteRecord", "text": FREE_OLD, **old},
        {
            "change": "RestoreWebhook",
            "text": f"restore the webhook of +61400111222 (PN1): SmsUrl {OURS.url} -> (empty)",
            **number,
            "from": {"smsUrl": OURS.url, "smsMethod": "POST"},
            "to": {"smsUrl": "", "smsMethod": "POST"},
        },
        {"change": "DeleteRecord", "text": FREE, **number},
        {"change": "RemoveFinalizer", "text": REMOVE_FINALIZER},
    ]
    assert document["notRestored"] == [
        {**old, "text": f"+61400000000 (PN0) is no longer in account {ACCOUNT}: there is nothing to restore"}
    ]


@settings(deadline=None)
@given(situation=situations())
def test_every_plan_can_be_shown(situation: tuple[Desired | None, Observed]) -> None:
    found = outlook(*situation)
    document = json.loads(json.dumps(found.document()))
    assert [each["text"] for each in document["changes"]] == [text for _, text in found.changes()]
    assert len(document["changes"]) == len(found.plan.changes)
    written = [each for each in document["changes"] if each["change"] in {"SetWebhook", "RestoreWebhook"}]
    assert all(each["from"] != each["to"] for each in written)
    assert sum(isinstance(each, SetWebhook | RestoreWebhook) for each in found.plan.changes) == len(written)
    assert all("no change" not in each["text"] for each in document["changes"])


def test_document_holds_no_password() -> None:
    found = Webhook(url="https://user:s3cret@before.example.com/", method="POST")
    cases: list[tuple[Desired | None, Observed]] = [
        (DESIRED, replace(NEW, number=at(found))),
        (None, replace(DELETING, records=by_number(RECORD.with_contents(previous=found)))),
        (None, replace(DELETING, to_restore={"PN1": at(found)})),
    ]
    for desired, observed in cases:
        document = str(outlook(desired, observed).document())
        assert "https://***@before.example.com/" in document
        assert "s3cret" not in document
        assert RECORD.contents
        assert RECORD.contents.login.token.get_secret_value() not in document
