"""Records: what their metadata and contents keep, what is never shown of them, and which webhooks are ours."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from smschannel.api.errors import Unreadable
from smschannel.api.resource import DeletionPolicy
from smschannel.api.sealing import Keyring, SealingKey
from smschannel.core.record import (
    RECORD_LABEL,
    Contents,
    Key,
    Login,
    Record,
    Webhook,
    WebhookTemplate,
    secret_source,
)

TOKEN = "5e5c0ffee5e5c0ffee5e5c0ffee5e5c0"
PASSWORD = "hunter2"
ACCOUNT = "AC" + "0" * 32
NUMBER_SID = "PN" + "0a" * 16
INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
UID = "3c9a3a52-0000-4000-8000-000000000001"
SINCE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

LOGIN = Login(sid=ACCOUNT, token=SecretStr(TOKEN))
CONTENTS = Contents(
    login=LOGIN,
    previous=Webhook(url=f"https://user:{PASSWORD}@before.example.com/", method="GET"),
    wrote=(f"https://user:{PASSWORD}@sms.example.com/1",),
)
RECORD = Record(
    number_sid=NUMBER_SID,
    phone_number="+61400111222",
    account_sid=ACCOUNT,
    namespace="sms-channels",
    name=INSTANCE,
    uid=UID,
    source="secret/twilio@7",
    deletion_policy=DeletionPolicy.CLEAR,
    restore_since=SINCE,
    unseen_since=SINCE,
    version="7",
    contents=CONTENTS,
    sealed_with="3164a69de2dd004a",
)


def metadata(record: Record, **annotations: str) -> dict[str, Any]:
    """Return the metadata of a written record, as the API server returns it."""
    written = {name: value for name, value in record.annotations().items() if value is not None}
    return {"name": record.secret_name, "resourceVersion": record.version, "annotations": {**written, **annotations}}


# Metadata


@settings(deadline=None)
@given(
    number=st.uuids(),
    source=st.text(),
    policy=st.sampled_from(DeletionPolicy),
    since=st.none() | st.datetimes(datetime(2020, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
def test_metadata_has_everything_but_the_contents(
    number: UUID, source: str, policy: DeletionPolicy, since: datetime | None
) -> None:
    since = since and since.replace(microsecond=0)
    record = replace(
        RECORD, number_sid=f"PN{number.hex}", source=source, deletion_policy=policy, restore_since=since, contents=None
    )
    assert Record.from_metadata(metadata(record)) == record


def test_contents_are_not_part_of_the_metadata() -> None:
    assert Record.from_metadata(metadata(RECORD)) == replace(RECORD, contents=None)
    written = str(RECORD.annotations()) + str(RECORD.labels())
    assert TOKEN not in written
    assert PASSWORD not in written


@pytest.mark.parametrize("field", ["restore_since", "unseen_since"])
def test_missing_time_removes_its_annotation(field: str) -> None:
    """Annotations are written as merge patch: without null the former value would stay."""
    changes: dict[str, Any] = {field: None}
    without = replace(RECORD, **changes)
    (name,) = RECORD.annotations().keys() - metadata(without)["annotations"].keys()
    assert without.annotations()[name] is None


def test_times_are_written_in_utc() -> None:
    there = SINCE.astimezone(timezone(timedelta(hours=10)))
    east = replace(RECORD, restore_since=there, unseen_since=there)
    assert east.annotations() == RECORD.annotations()


def test_label_selects_records() -> None:
    assert RECORD.labels()[RECORD_LABEL] == "true"


def names_of_annotations() -> list[str]:
    return sorted(RECORD.annotations())


@pytest.mark.parametrize("name", names_of_annotations())
@pytest.mark.parametrize("value", [None, "", "nonsense", "/", "a/b/c", "9999-99-99T99:99:99Z", "0000-01-01T00:00:00Z"])
def test_record_with_a_damaged_annotation_still_holds_its_number(name: str, value: str | None) -> None:
    meta = metadata(RECORD)
    if value is None:
        del meta["annotations"][name]
    else:
        meta["annotations"][name] = value
    record = Record.from_metadata(meta)
    assert record.number_sid == NUMBER_SID
    assert record.version == "7"
    intact = Record.from_metadata(metadata(RECORD))
    others = [
        field for field in ("phone_number", "account_sid", "uid", "source") if not name.endswith(_ANNOTATED[field])
    ]
    assert [getattr(record, field) for field in others] == [getattr(intact, field) for field in others]


_ANNOTATED = {
    "phone_number": "phone-number",
    "account_sid": "account-sid",
    "uid": "channel-uid",
    "source": "credentials-source",
}


@pytest.mark.parametrize("meta", [{}, {"annotations": None}, {"annotations": {}}], ids=["absent", "null", "empty"])
def test_record_without_annotations_still_holds_its_number(meta: dict[str, Any]) -> None:
    record = Record.from_metadata({"name": RECORD.secret_name, "resourceVersion": "7", **meta})
    assert record == Record(NUMBER_SID, "", "", "", "", "", version="7")
    assert record.deletion_policy is DeletionPolicy.RESTORE, "the policy that leaves a number as it was found"


@settings(deadline=None)
@given(values=st.fixed_dictionaries({}, optional={name: st.text() for name in names_of_annotations()}))
def test_no_annotation_makes_reading_fail(values: dict[str, str]) -> None:
    record = Record.from_metadata({"name": RECORD.secret_name, "resourceVersion": "7", "annotations": values})
    assert record.number_sid == NUMBER_SID


def test_key_is_the_name_of_the_channel() -> None:
    assert RECORD.key == Key("sms-channels", INSTANCE)


def test_secret_is_named_after_the_number() -> None:
    """Two records of one number would be one Secret: the API server lets one channel create it."""
    assert RECORD.secret_name == "pn" + "0a" * 16
    assert replace(RECORD, uid="another", name="another", namespace="another").secret_name == RECORD.secret_name


# Contents


def test_metadata_that_somebody_changed_is_as_it_was_sealed() -> None:
    """Each of these says whose number it is, or what it is: the operator would act for another channel."""
    changed = replace(
        RECORD, namespace="team-b", name="another", phone_number="+61400999999", account_sid="AC" + "9" * 32
    )
    assert changed.opened(RECORD.document()) == RECORD


def test_record_of_an_earlier_release_opens_with_the_metadata_that_it_has() -> None:
    document = json.loads(RECORD.document())
    del document["of"]
    assert RECORD.opened(json.dumps(document).encode()) == RECORD


@settings(deadline=None)
@given(
    token=st.text(), urls=st.lists(st.text()), previous=st.none() | st.builds(Webhook, url=st.text(), method=st.text())
)
def test_encoded_contents_decode(token: str, urls: list[str], previous: Webhook | None) -> None:
    contents = Contents(login=Login(sid=ACCOUNT, token=SecretStr(token)), previous=previous, wrote=tuple(urls))
    assert RECORD.opened(replace(RECORD, contents=contents).document()).contents == contents


def test_document_for_sealing_is_the_only_place_with_a_token() -> None:
    assert TOKEN.encode() in RECORD.document()
    for shown in (
        repr(RECORD),
        str(RECORD),
        f"{RECORD}",
        repr(CONTENTS),
        str(CONTENTS),
        CONTENTS.model_dump_json(),
        str(CONTENTS.model_dump()),
        str(CONTENTS.model_dump(mode="json")),
        repr(LOGIN),
        str(LOGIN),
        LOGIN.model_dump_json(),
    ):
        assert TOKEN not in shown


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        (repr(RECORD), "a record is shown in logs and assertion errors"),
        (str(RECORD), "a record is part of a planned change, which may be shown"),
        (repr(CONTENTS), "contents are part of a record"),
        (str(CONTENTS), "contents are part of a record"),
        (repr(CONTENTS.previous), "a webhook that was found may contain the password of another server"),
        (str(CONTENTS.previous), "a webhook that was found may contain the password of another server"),
    ],
)
def test_urls_with_passwords_are_not_shown(shown: str, reason: str) -> None:
    assert PASSWORD not in shown, reason


def test_damaged_contents_are_refused_without_showing_any_of_them() -> None:
    damaged = RECORD.document().replace(b'"wrote"', b'"write"')
    with pytest.raises(ValidationError) as refused:
        Contents.decode(damaged)
    assert TOKEN not in str(refused.value)
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize("document", [b"", b"null", b"[]", b"{}", RECORD.document()[:-2], b"\xff" + RECORD.document()])
def test_truncated_document_is_refused(document: bytes) -> None:
    with pytest.raises(ValidationError) as refused:
        Contents.decode(document)
    assert TOKEN not in str(refused.value)


def test_changed_contents_leave_the_rest_of_the_record() -> None:
    newer = Login(sid=ACCOUNT, token=SecretStr("newer"))
    changed = RECORD.with_contents(login=newer)
    assert changed == replace(RECORD, contents=Contents(login=newer, previous=CONTENTS.previous, wrote=CONTENTS.wrote))
    assert RECORD.contents == CONTENTS, "the record itself stays as it was"


def test_contents_that_were_not_opened_are_not_changed() -> None:
    with pytest.raises(AssertionError):
        replace(RECORD, contents=None).with_contents(previous=None)


@pytest.mark.parametrize(
    ("webhook", "ours"),
    [
        pytest.param(Webhook(url=CONTENTS.wrote[0], method="GET"), True, id="whatever its method"),
        pytest.param(Webhook(url="", method="POST"), False, id="an empty webhook"),
        pytest.param(CONTENTS.previous, False, id="the previous webhook"),
    ],
)
def test_webhook_points_at_us_if_the_record_names_its_url(webhook: Webhook, ours: bool) -> None:
    assert CONTENTS.points_at_us(webhook) is ours


@pytest.mark.parametrize(
    ("other", "opens"),
    [
        pytest.param(
            replace(RECORD, phone_number="+1", version="8", restore_since=None), True, id="the same record later"
        ),
        pytest.param(replace(RECORD, uid="another"), False, id="another channel's record of this number"),
        pytest.param(replace(RECORD, number_sid="PN" + "0b" * 16), False, id="this channel's record of another number"),
    ],
)
def test_contents_open_only_for_this_number_held_by_this_channel(other: Record, opens: bool) -> None:
    keyring = Keyring([SealingKey.generate()])
    sealed = keyring.wrap(RECORD.document(), RECORD.binding)
    if opens:
        assert Contents.decode(keyring.unwrap(sealed, other.binding)) == CONTENTS
    else:
        with pytest.raises(Unreadable):
            keyring.unwrap(sealed, other.binding)


def test_source_of_a_login_names_the_version_of_its_secret() -> None:
    assert secret_source("twilio", "7") == "secret/twilio@7"
    assert len({secret_source("twilio", "7"), secret_source("twilio", "8"), secret_source("other", "7"), "sealed"}) == 4


# Templates

TEMPLATE = WebhookTemplate(
    "https://sms.example.com/v1/instances/{instance_id}/sms?v=1", ("https://old.example.com/{instance_id}",)
)
NAMESPACED = WebhookTemplate(
    "https://sms.example.com/{namespace}/{instance_id}/sms",
    ("https://{namespace}.old.example.com/{instance_id}", "https://old.example.com/{instance_id}"),
)


def test_url_without_namespace_is_the_same_for_every_namespace() -> None:
    url = f"https://sms.example.com/v1/instances/{INSTANCE}/sms?v=1"
    assert TEMPLATE.url("team-a", INSTANCE) == TEMPLATE.url("team-b", INSTANCE) == url


def test_url_with_namespace_is_not_shared_by_two_namespaces() -> None:
    assert NAMESPACED.url("team-a", INSTANCE) == f"https://sms.example.com/team-a/{INSTANCE}/sms"
    assert NAMESPACED.url("team-b", INSTANCE) == f"https://sms.example.com/team-b/{INSTANCE}/sms"


@pytest.mark.parametrize(
    ("url", "made", "reason"),
    [
        (TEMPLATE.url("ns", INSTANCE), True, "it is this template's own URL"),
        (TEMPLATE.url("ns", "0" * 8 + "-0000-0000-0000-" + "0" * 12), True, "every instance's URL is ours"),
        (f"https://old.example.com/{INSTANCE}", True, "a former template made it"),
        (f"https://older.example.com/{INSTANCE}", False, "no template has this host"),
        (TEMPLATE.url("ns", "not-a-uuid"), False, "instances are UUIDs"),
        (TEMPLATE.url("ns", INSTANCE.upper()), False, "names of channels are lower-case, so we never wrote this one"),
        (TEMPLATE.url("ns", INSTANCE) + "&x=1", False, "with an addition it is not our URL"),
        (TEMPLATE.url("ns", INSTANCE) + "\n", False, "a line end is an addition too"),
        (
            TEMPLATE.url("ns", INSTANCE).replace("sms.example", "smsXexample"),
            False,
            "a dot in a template is only a dot",
        ),
        (TEMPLATE.url("ns", INSTANCE).replace("sms?v", "smv"), False, "a question mark in a template is not a pattern"),
        (TEMPLATE.template, False, "a template is not a URL that it made"),
        ("", False, "an empty webhook is not ours"),
    ],
)
def test_template_recognises_the_urls_that_it_made(url: str, made: bool, reason: str) -> None:
    assert TEMPLATE.made(url) is made, reason


@pytest.mark.parametrize(
    ("url", "made", "reason"),
    [
        (NAMESPACED.url("team-a", INSTANCE), True, "it is this template's own URL"),
        (NAMESPACED.url("a" * 63, INSTANCE), True, "a namespace has up to 63 characters"),
        (NAMESPACED.url("a", INSTANCE), True, "a namespace may have one character"),
        (f"https://team-a.old.example.com/{INSTANCE}", True, "a former template had the namespace in the host"),
        (f"https://old.example.com/{INSTANCE}", True, "a former template had no namespace"),
        (f"https://sms.example.com/{INSTANCE}/sms", False, "the namespace is missing"),
        (f"https://sms.example.com//{INSTANCE}/sms", False, "an empty namespace"),
        (NAMESPACED.url("a" * 64, INSTANCE), False, "no namespace is that long"),
        (NAMESPACED.url("team-a/team-b", INSTANCE), False, "a slash would mix one namespace with another's path"),
        (NAMESPACED.url(f"team-a/{INSTANCE}", INSTANCE), False, "nor is another instance's path a namespace"),
        (NAMESPACED.url("..", INSTANCE), False, "a path that leads elsewhere"),
        (NAMESPACED.url("team%2Da", INSTANCE), False, "an encoded namespace is another URL"),
        (NAMESPACED.url("Team-A", INSTANCE), False, "namespaces are lower-case"),
        (NAMESPACED.url("-team", INSTANCE), False, "a namespace does not begin with a dash"),
        (NAMESPACED.url("team-", INSTANCE), False, "nor end with one"),
        (NAMESPACED.url("team-a\n", INSTANCE), False, "a line end is not part of a namespace"),
        (f"https://evil.example.com/.old.example.com/{INSTANCE}", False, "a slash ends the host"),
        (f"https://evil.example.com#.old.example.com/{INSTANCE}", False, "and so does a fragment"),
        (f"https://a.b.old.example.com/{INSTANCE}", False, "a namespace is one label of a host"),
        (f"https://user@.old.example.com/{INSTANCE}", False, "a user is not a namespace"),
        (NAMESPACED.template, False, "a template is not a URL that it made"),
    ],
)
def test_template_with_namespace_recognises_the_urls_that_it_made(url: str, made: bool, reason: str) -> None:
    assert NAMESPACED.made(url) is made, reason


NAMESPACES = st.from_regex("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)


@settings(deadline=None)
@given(namespace=NAMESPACES, instance=st.uuids())
def test_template_recognises_whatever_it_makes(namespace: str, instance: UUID) -> None:
    assert TEMPLATE.made(TEMPLATE.url(namespace, str(instance)))
    assert NAMESPACED.made(NAMESPACED.url(namespace, str(instance)))


@settings(deadline=None)
@given(one=NAMESPACES, other=NAMESPACES, instance=st.uuids(), another=st.uuids())
def test_no_namespace_has_the_webhook_of_another(one: str, other: str, instance: UUID, another: UUID) -> None:
    if one != other:
        assert NAMESPACED.url(one, str(instance)) != NAMESPACED.url(other, str(another))
