"""SmsChannel manifests, good and bad: one table for the model in `resource.py` and for the CRD on a real API server.

A row is one small change to a good manifest. `refusal` lists what the message of model and API server must contain: the
field, and what to write instead. Letter case is ignored, since the messages are "Field required" and "Required value".
"""

from __future__ import annotations

import base64
import copy
from functools import reduce
from typing import Any, NamedTuple

Manifest = dict[str, Any]

NAMESPACE = "sms-channels"
INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
ACCOUNT_SID = "AC0123456789abcdef0123456789abcdef"
KEY_SID = "SK0123456789abcdef0123456789abcdef"
PHONE_NUMBER = "+61400111222"
SEALED = base64.b64encode(b"\x01" + bytes(8 + 1120 + 32 + 16)).decode()  # as long as the sealed value of a real token
TOKEN = "5e5c0ffee5e5c0ffee5e5c0ffee5e5c0"  # made up

_ABSENT = object()


class Row(NamedTuple):
    why: str
    manifest: Manifest
    refusal: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.refusal


def good() -> Manifest:
    return {
        "apiVersion": "channels.hydracore.io/v1",
        "kind": "SmsChannel",
        "metadata": {"name": INSTANCE, "namespace": NAMESPACE},
        "spec": {
            "accountSid": ACCOUNT_SID,
            "phoneNumber": PHONE_NUMBER,
            "credentials": {"sealed": SEALED},
        },
    }


def _changed(changes: dict[str, object]) -> Manifest:
    manifest = good()
    for path, value in changes.items():
        *parents, last = path.split(".")
        parent: Manifest = reduce(lambda each, name: each.setdefault(name, {}), parents, manifest)
        if value is _ABSENT:
            del parent[last]
        else:
            parent[last] = copy.deepcopy(value)
    return manifest


def _accepted(why: str, **changes: object) -> Row:
    return Row(why, _changed({path.replace("_", "."): value for path, value in changes.items()}))


def _refused(why: str, path: str, value: object, *message: str) -> Row:
    """Return a row whose message must name the field and contain each of `message`."""
    return Row(why, _changed({path: value}), (path, *message))


def _from_secret(**changes: object) -> dict[str, object]:
    reference = {"name": "twilio", "key": "auth_token", **changes}
    present = {name: value for name, value in reference.items() if value is not _ABSENT}
    return {"spec.credentials": {"secretKeyRef": present}}


def _reference(why: str, field: str, value: object, *message: str) -> Row:
    row = Row(why, _changed(_from_secret(**{field: value})))
    return row._replace(refusal=(f"spec.credentials.secretKeyRef.{field}", *message)) if message else row


_A_UUID = "a lower-case UUID with dashes, such as 497f6eca-6276-4993-bfeb-53cbbbba6f08"
_AN_ACCOUNT = 'accountSid is "AC" and 32 of the digits 0-9 and a-f'
_E164 = 'digits only and in quotes, such as "+61400111222"'
_A_LOGIN = "leave it out to log in as accountSid"
_A_SEALED_VALUE = "sealed is what 'kubectl sms seal' prints, whole and on one line"
_ONE_SOURCE = "give exactly one of sealed (made by 'kubectl sms seal') and secretKeyRef {name, key}"
_A_SECRET = "a Secret in the channel's own namespace, such as twilio"
_A_KEY = "the key within the Secret that holds the token, such as auth_token"

ROWS: tuple[Row, ...] = (
    Row("the smallest channel: account, number and a sealed token", good()),
    # The name
    _accepted("a UUID of any version", metadata_name="00000000-0000-0000-0000-000000000000"),
    Row("a name with capitals", _changed({"metadata.name": INSTANCE.upper()}), ("metadata.name", "lower")),
    Row("a UUID without dashes", _changed({"metadata.name": INSTANCE.replace("-", "")}), ("metadata.name", _A_UUID)),
    Row("a truncated UUID", _changed({"metadata.name": INSTANCE[:-1]}), ("metadata.name", _A_UUID)),
    Row("a UUID with something after it", _changed({"metadata.name": f"{INSTANCE}-sms"}), ("metadata.name", _A_UUID)),
    Row(
        "a UUID with a letter that is not a hex digit",
        _changed({"metadata.name": f"g{INSTANCE[1:]}"}),
        ("metadata.name", _A_UUID),
    ),
    Row("a name that is not a UUID", _changed({"metadata.name": "my-channel"}), ("metadata.name", _A_UUID)),
    Row("a name that ends in a line end", _changed({"metadata.name": f"{INSTANCE}\n"}), ("metadata.name",)),
    Row("no name", _changed({"metadata.name": _ABSENT}), ("name", "required")),
    Row("an empty name", _changed({"metadata.name": ""}), ("name",)),
    # The spec as a whole
    _refused("no spec", "spec", _ABSENT, "required"),
    _refused("a null spec", "spec", None, "required"),
    _refused("a spec that is a list", "spec", [], "spec"),
    _refused("a spec that is a string", "spec", "+61400111222", "spec"),
    Row(
        "an empty spec: each missing field is named",
        _changed({"spec": {}}),
        ("spec.accountSid", "spec.phoneNumber", "spec.credentials", "required"),
    ),
    _accepted("an unknown field is dropped, unless the client asks for strictness", spec_colour="red"),
    # accountSid
    _refused("no account", "spec.accountSid", _ABSENT, "required"),
    _refused("a null account", "spec.accountSid", None, "required"),
    _refused("an empty account", "spec.accountSid", "", _AN_ACCOUNT),
    _refused("an account that is a number", "spec.accountSid", 42, "string"),
    _refused("an account that is a list", "spec.accountSid", [ACCOUNT_SID], "string"),
    _refused("a truncated account", "spec.accountSid", ACCOUNT_SID[:-1], _AN_ACCOUNT),
    _refused("an account with a digit too many", "spec.accountSid", f"{ACCOUNT_SID}0", _AN_ACCOUNT),
    _refused("an account in capitals", "spec.accountSid", ACCOUNT_SID.upper(), _AN_ACCOUNT),
    _refused("an account with a lower-case prefix", "spec.accountSid", ACCOUNT_SID.replace("AC", "ac"), _AN_ACCOUNT),
    _refused("an account without its prefix", "spec.accountSid", ACCOUNT_SID[2:], _AN_ACCOUNT),
    _refused("an API key for an account", "spec.accountSid", KEY_SID, _AN_ACCOUNT),
    _refused("a number's SID for an account", "spec.accountSid", ACCOUNT_SID.replace("AC", "PN"), _AN_ACCOUNT),
    _refused("a letter that is not a hex digit", "spec.accountSid", f"{ACCOUNT_SID[:-1]}g", _AN_ACCOUNT),
    _refused("an account with a space before it", "spec.accountSid", f" {ACCOUNT_SID}", _AN_ACCOUNT),
    _refused("an account with a line end", "spec.accountSid", f"{ACCOUNT_SID}\n", _AN_ACCOUNT),
    _refused("a very long account", "spec.accountSid", ACCOUNT_SID * 100, _AN_ACCOUNT),
    # phoneNumber
    _accepted("the shortest number", spec_phoneNumber="+12"),
    _accepted("the longest number: 15 digits", spec_phoneNumber="+123456789012345"),
    _refused("no number", "spec.phoneNumber", _ABSENT, "required"),
    _refused("a null number", "spec.phoneNumber", None, "required"),
    _refused("an empty number", "spec.phoneNumber", "", _E164),
    _refused("a number without quotes, which YAML takes for an integer", "spec.phoneNumber", 61400111222, "string"),
    _refused("a number without a plus", "spec.phoneNumber", "61400111222", _E164),
    _refused("00 in place of the plus", "spec.phoneNumber", "0061400111222", _E164),
    _refused("a national number", "spec.phoneNumber", "0400111222", _E164),
    _refused("a country code that begins with zero", "spec.phoneNumber", "+0400111222", _E164),
    _refused("a number with spaces", "spec.phoneNumber", "+61 400 111 222", _E164),
    _refused("a number with dashes", "spec.phoneNumber", "+61-400-111-222", _E164),
    _refused("a number with parentheses", "spec.phoneNumber", "+61(400)111222", _E164),
    _refused("a number with a zero in parentheses", "spec.phoneNumber", "+61(0)400111222", _E164),
    _refused("two pluses", "spec.phoneNumber", "++61400111222", _E164),
    _refused("letters", "spec.phoneNumber", "+1800TWILIO", _E164),
    _refused("a sender's name", "spec.phoneNumber", "HydraCore", _E164),
    _refused("digits of another script", "spec.phoneNumber", "+٦١٤٠٠١١١٢٢٢", _E164),
    _refused("a plus alone", "spec.phoneNumber", "+", _E164),
    _refused("one digit", "spec.phoneNumber", "+1", _E164),
    _refused("16 digits", "spec.phoneNumber", "+1234567890123456", _E164),
    _refused("a thousand digits", "spec.phoneNumber", "+" + "1" * 1000, _E164),
    _refused("a number with a line end", "spec.phoneNumber", "+61400111222\n", _E164),
    _refused("a number with a space before it", "spec.phoneNumber", " +61400111222", _E164),
    _refused("Twilio's address of a WhatsApp number", "spec.phoneNumber", "whatsapp:+61400111222", _E164),
    # credentials
    _refused("no credentials", "spec.credentials", _ABSENT, "required"),
    _refused("null credentials", "spec.credentials", None, "required"),
    _refused("a token in place of the credentials", "spec.credentials", TOKEN, "credentials"),
    _refused("neither source", "spec.credentials", {}, _ONE_SOURCE),
    _refused("a login, but no token", "spec.credentials", {"sid": KEY_SID}, _ONE_SOURCE),
    _refused("a token in an unknown field", "spec.credentials", {"authToken": TOKEN}, _ONE_SOURCE),
    _refused(
        "both sources",
        "spec.credentials",
        {"sealed": SEALED, "secretKeyRef": {"name": "twilio", "key": "auth_token"}},
        _ONE_SOURCE,
        "a token in plain text is never written here",
    ),
    # credentials.sid
    _accepted("an API key logs in", spec_credentials_sid=KEY_SID),
    _accepted("the parent account logs in", spec_credentials_sid="AC" + "0" * 32),
    _accepted("an empty login is the default: the account itself", spec_credentials_sid=""),
    _accepted("a null login is the default", spec_credentials_sid=None),
    _refused("a truncated login", "spec.credentials.sid", KEY_SID[:-1], _A_LOGIN),
    _refused("a login with a digit too many", "spec.credentials.sid", f"{KEY_SID}0", _A_LOGIN),
    _refused("a login in capitals", "spec.credentials.sid", KEY_SID.upper(), _A_LOGIN),
    _refused("a login of another kind", "spec.credentials.sid", KEY_SID.replace("SK", "PN"), _A_LOGIN),
    _refused("a login with a line end", "spec.credentials.sid", f"{KEY_SID}\n", _A_LOGIN),
    _refused("a login that is only a line end", "spec.credentials.sid", "\n", _A_LOGIN),
    _refused("a mail address for a login", "spec.credentials.sid", "me@example.com", _A_LOGIN),
    _refused("a login that is a number", "spec.credentials.sid", 42, "string"),
    # credentials.sealed
    _accepted("the longest sealed value", spec_credentials_sealed="A" * 4096),
    _accepted("the sealed value of a token of one character", spec_credentials_sealed="A" * 1528),
    _refused("a null sealed value does not count", "spec.credentials", {"sealed": None}, _ONE_SOURCE),
    Row(
        "a null source leaves the other",
        _changed({**_from_secret(), "spec.credentials.sealed": None}),
    ),
    _refused("an empty sealed value", "spec.credentials.sealed", "", _A_SEALED_VALUE),
    _refused("a token in plain text, which is base64 too", "spec.credentials.sealed", TOKEN, "leaked", "replace"),
    _refused("a token in plain base64", "spec.credentials.sealed", base64.b64encode(TOKEN.encode()).decode(), "leaked"),
    _refused("a truncated sealed value", "spec.credentials.sealed", SEALED[:1527], _A_SEALED_VALUE, "whole"),
    _refused("a sealed value with a line end", "spec.credentials.sealed", f"{SEALED}\n", "on one line"),
    _refused("a sealed value over two lines", "spec.credentials.sealed", f"{SEALED[:76]}\n{SEALED[76:]}", "one line"),
    _refused("a folded sealed value", "spec.credentials.sealed", f"{SEALED[:76]} {SEALED[76:]}", "one line"),
    _refused("base64 of the kind for URLs", "spec.credentials.sealed", f"{SEALED[:-1]}-_", _A_SEALED_VALUE),
    _refused("padding in the middle", "spec.credentials.sealed", f"{SEALED}=={SEALED}", _A_SEALED_VALUE),
    _refused("too much padding", "spec.credentials.sealed", f"{SEALED.rstrip('=')}===", _A_SEALED_VALUE),
    _refused("a sealed value that is too long", "spec.credentials.sealed", "A" * 4097, "4096"),
    _refused("a sealed value that is an object", "spec.credentials.sealed", {"value": SEALED}, "string"),
    # credentials.secretKeyRef
    _reference("a token from a Secret", "name", "twilio"),
    _reference("a Secret's name with dots and dashes", "name", "twilio.team-1.example"),
    _reference("the longest name of a Secret", "name", "a" * 253),
    _reference("a key with all kinds of characters", "key", "TWILIO_AUTH-TOKEN.v2"),
    _reference("the longest key", "key", "k" * 253),
    _refused("an empty reference", "spec.credentials", {"secretKeyRef": {}}, "secretKeyRef.name", "secretKeyRef.key"),
    _refused("a reference that is a string", "spec.credentials", {"secretKeyRef": "twilio"}, "secretKeyRef"),
    _reference("no Secret", "name", _ABSENT, "required"),
    _reference("a null name of a Secret", "name", None, "required"),
    _reference("an empty name of a Secret", "name", "", _A_SECRET),
    _reference("a Secret's name with capitals", "name", "Twilio", _A_SECRET),
    _reference("a Secret's name with an underscore", "name", "twilio_token", _A_SECRET),
    _reference("a Secret's name of another namespace", "name", "other/twilio", _A_SECRET),
    _reference("a Secret's name with a path", "name", "../twilio", _A_SECRET),
    _reference("a Secret's name with an empty part", "name", "twilio..token", _A_SECRET),
    _reference("a Secret's name that ends in a dash", "name", "twilio-", _A_SECRET),
    _reference("a Secret's name with a line end", "name", "twilio\n", _A_SECRET),
    _reference("a Secret's name that is too long", "name", "a" * 254, "253"),
    _reference("a Secret's name that is a number", "name", 42, "string"),
    _reference("no key", "key", _ABSENT, "required"),
    _reference("a null key", "key", None, "required"),
    _reference("an empty key", "key", "", _A_KEY),
    _reference("a key with a slash", "key", "twilio/auth_token", _A_KEY),
    _reference("a key with a space", "key", "auth token", _A_KEY),
    _reference("a key with a line end", "key", "auth_token\n", _A_KEY),
    _reference("a key that is too long", "key", "k" * 254, "253"),
    _reference("a key that is a boolean", "key", True, "string"),
    # suspend
    _accepted("suspended", spec_suspend=True),
    _accepted("not suspended", spec_suspend=False),
    _accepted("a null suspend is the default", spec_suspend=None),
    _refused("suspend in quotes", "spec.suspend", "true", "boolean"),
    _refused("suspend as a number", "spec.suspend", 1, "boolean"),
    _refused("an empty suspend", "spec.suspend", "", "boolean"),
    # the policies
    _accepted("takes an unused number only", spec_takeoverPolicy="IfUnused"),
    _accepted("takes any number", spec_takeoverPolicy="Always"),
    _accepted("a null takeover policy is the default", spec_takeoverPolicy=None),
    _refused("a takeover policy in lower case", "spec.takeoverPolicy", "always", "Always", "IfUnused"),
    _refused("an unknown takeover policy", "spec.takeoverPolicy", "Never", "Always", "IfUnused"),
    _refused("an empty takeover policy", "spec.takeoverPolicy", "", "Always", "IfUnused"),
    _refused("a takeover policy that is a boolean", "spec.takeoverPolicy", False, "takeoverPolicy"),
    _accepted("reports drift", spec_driftPolicy="Report"),
    _accepted("corrects drift", spec_driftPolicy="Correct"),
    _accepted("a null drift policy is the default", spec_driftPolicy=None),
    _refused("a drift policy in lower case", "spec.driftPolicy", "report", "Correct", "Report"),
    _refused("an empty drift policy", "spec.driftPolicy", "", "Correct", "Report"),
    _accepted("restores the number", spec_deletionPolicy="Restore"),
    _accepted("clears the number", spec_deletionPolicy="Clear"),
    _accepted("leaves the number", spec_deletionPolicy="Retain"),
    _accepted("a null deletion policy is the default", spec_deletionPolicy=None),
    _refused("Kubernetes' word for Clear", "spec.deletionPolicy", "Delete", "Restore", "Clear", "Retain"),
    _refused("a deletion policy in lower case", "spec.deletionPolicy", "retain", "Restore", "Clear", "Retain"),
    _refused("an empty deletion policy", "spec.deletionPolicy", "", "Restore", "Clear", "Retain"),
    # status is the operator's
    _accepted("a null status", status=None),
    _accepted("a status written by a user is dropped", status_webhookUrl="https://evil.example"),
)
