"""Twilio's JSON, resource by resource. No I/O.

Two dialects: the 2010 API (RFC 2822 dates, relative `uri`s) and the messaging API (ISO 8601, absolute `url`s).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from email.utils import format_datetime

from tests.twin.paging import Page
from tests.twin.refusals import Refusal
from tests.twin.state import Account, Number, Outbound, Service

API = "/2010-04-01"


# Made once: json.dumps makes a new encoder for every call with other than default arguments.
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def encode(document: object) -> bytes:
    return _ENCODER.encode(document).encode()


def error(refusal: Refusal) -> bytes:
    """Return `{"code", "message", "more_info", "status"}`."""
    return encode(
        {
            "code": refusal.code,
            "message": refusal.message,
            "more_info": f"https://www.twilio.com/docs/errors/{refusal.code}",
            "status": refusal.status,
        }
    )


def problem(refusal: Refusal) -> bytes:
    """Return the error as RFC 9457 has it, which some of Twilio's services use instead."""
    return encode(
        {
            "type": f"https://www.twilio.com/docs/errors/{refusal.code}",
            "title": refusal.message,
            "status": refusal.status,
            "code": refusal.code,
        }
    )


def account(one: Account) -> bytes:
    """Return an account as Twilio does, `auth_token` included."""
    uri = f"{API}/Accounts/{one.sid}"
    return encode(
        {
            "auth_token": one.auth_token,
            "date_created": _rfc2822(one.created),
            "date_updated": _rfc2822(one.created),
            "friendly_name": one.friendly_name,
            "owner_account_sid": (one.parent or one).sid,
            "sid": one.sid,
            "status": one.status,
            "subresource_uris": {"incoming_phone_numbers": f"{uri}/IncomingPhoneNumbers.json"},
            "type": "Full",
            "uri": f"{uri}.json",
        }
    )


def number(one: Number) -> bytes:
    """Return a number, cached until it changes. Empty fields are a mix of "" and null, as at Twilio."""
    if one.rendered is None:
        uri = f"{API}/Accounts/{one.account_sid}/IncomingPhoneNumbers/{one.sid}"
        # Which of the two differs from field to field and from number to number.
        mix = int(one.sid[-1], 16)
        settings = {
            name: value or (None if (mix + place) % 2 else "")
            for place, (name, value) in enumerate(one.settings.items())
        }
        one.rendered = encode(
            {
                "sid": one.sid,
                "account_sid": one.account_sid,
                "phone_number": one.phone_number,
                **settings,
                "address_requirements": "none",
                "address_sid": None,
                "api_version": "2010-04-01",
                "beta": False,
                "bundle_sid": "",
                "capabilities": {"fax": False, "voice": True, "sms": one.sms, "mms": False},
                "date_created": _rfc2822(one.created),
                "date_updated": _rfc2822(one.updated),
                "emergency_address_sid": None,
                "emergency_address_status": "unregistered",
                "emergency_status": "Inactive",
                "identity_sid": "",
                "origin": "twilio",
                "status": "in-use",
                "subresource_uris": {"assigned_add_ons": f"{uri}/AssignedAddOns.json"},
                "trunk_sid": None,
                "type": "mobile",
                "uri": f"{uri}.json",
                "voice_caller_id_lookup": False,
                "voice_receive_mode": "voice",
            }
        )
    return one.rendered


def numbers(page: Page[Number], path: str) -> bytes:
    """Return a page of the 2010 API: all URIs are relative."""
    keys = {
        "end": page.end,
        "first_page_uri": f"{path}?{page.first}",
        "next_page_uri": None if page.next is None else f"{path}?{page.next}",
        "page": page.number,
        "page_size": page.size,
        "previous_page_uri": None if page.previous is None else f"{path}?{page.previous}",
        "start": page.start,
        "uri": f"{path}?{page.this}",
    }
    return _with_list(keys, "incoming_phone_numbers", map(number, page.items))


def message(one: Outbound) -> bytes:
    """Return a message; Twilio knows its price some time after it was sent."""
    uri = f"{API}/Accounts/{one.account_sid}/Messages/{one.sid}.json"
    return encode(
        {
            "sid": one.sid,
            "account_sid": one.account_sid,
            "api_version": "2010-04-01",
            "body": one.body,
            "date_created": _rfc2822(one.created),
            "date_sent": None if one.status == "queued" else _rfc2822(one.created),
            "date_updated": _rfc2822(one.created),
            "direction": "outbound-api",
            "error_code": None,
            "error_message": None,
            "from": one.sender,
            "messaging_service_sid": None,
            "num_media": "0",
            "num_segments": "1",
            "price": None,
            "price_unit": "USD",
            "status": one.status,
            "subresource_uris": {"media": uri.replace(".json", "/Media.json")},
            "to": one.to,
            "uri": uri,
        }
    )


def lookup(phone_number: str, country: str | None) -> bytes:
    """Return the free part of Lookup v2."""
    return encode(
        {
            "calling_country_code": None,
            "country_code": country,
            "phone_number": phone_number,
            "national_format": phone_number,
            "valid": country is not None,
            "validation_errors": [] if country else ["INVALID_COUNTRY_CODE"],
            "url": f"https://lookups.twilio.com/v2/PhoneNumbers/{phone_number}",
        }
    )


def prices(country: str) -> bytes:
    """Return the prices of a country: two carriers, which cost differently."""
    carriers = (("Carrier A", "0.0515"), ("Carrier B", "0.0620"))
    outbound = [
        {
            "carrier": name,
            "mcc": "505",
            "mnc": "01",
            "prices": [{"base_price": price, "current_price": price, "number_type": "mobile"}],
        }
        for name, price in carriers
    ]
    return encode(
        {
            "country": country,
            "iso_country": country,
            "price_unit": "USD",
            "outbound_sms_prices": outbound,
            "inbound_sms_prices": [{"base_price": "0.0075", "current_price": "0.0075", "number_type": "mobile"}],
            "url": f"https://pricing.twilio.com/v1/Messaging/Countries/{country}",
        }
    )


def service(one: Service, origin: str) -> bytes:
    return encode(_service(one, origin))


def services(page: Page[Service], path: str, origin: str) -> bytes:
    return _messaging_page("services", [_service(one, origin) for one in page.items], page, origin + path)


def service_number(one: Number, origin: str) -> bytes:
    return encode(_service_number(one, origin))


def service_numbers(page: Page[Number], path: str, origin: str) -> bytes:
    return _messaging_page("phone_numbers", [_service_number(one, origin) for one in page.items], page, origin + path)


def _service(one: Service, origin: str) -> dict[str, object]:
    url = f"{origin}/v1/Services/{one.sid}"
    return {
        "sid": one.sid,
        "account_sid": one.account_sid,
        "friendly_name": one.friendly_name,
        "date_created": _iso8601(one.created),
        "date_updated": _iso8601(one.created),
        "inbound_request_url": one.inbound_request_url,
        "inbound_method": one.inbound_method,
        "fallback_url": None,
        "fallback_method": "POST",
        "status_callback": "",
        "sticky_sender": True,
        "smart_encoding": True,
        "mms_converter": True,
        "fallback_to_long_code": True,
        "scan_message_content": "inherit",
        "area_code_geomatch": True,
        "validity_period": 36000,
        "synchronous_validation": False,
        "usecase": "undeclared",
        "us_app_to_person_registered": False,
        "use_inbound_webhook_on_number": one.use_inbound_webhook_on_number,
        "url": url,
        "links": {"phone_numbers": f"{url}/PhoneNumbers"},
    }


def _service_number(one: Number, origin: str) -> dict[str, object]:
    return {
        "sid": one.sid,
        "account_sid": one.account_sid,
        "service_sid": one.service_sid,
        "date_created": _iso8601(one.created),
        "date_updated": _iso8601(one.updated),
        "phone_number": one.phone_number,
        "country_code": "AU",
        "capabilities": ["Voice", "SMS"] if one.sms else ["Voice"],
        "url": f"{origin}/v1/Services/{one.service_sid}/PhoneNumbers/{one.sid}",
    }


def _messaging_page(
    key: str, items: Sequence[dict[str, object]], page: Page[Service] | Page[Number], url: str
) -> bytes:
    meta = {
        "page": page.number,
        "page_size": page.size,
        "first_page_url": f"{url}?{page.first}",
        "previous_page_url": None if page.previous is None else f"{url}?{page.previous}",
        "url": f"{url}?{page.this}",
        "next_page_url": None if page.next is None else f"{url}?{page.next}",
        "key": key,
    }
    return encode({key: items, "meta": meta})


def _with_list(keys: dict[str, object], name: str, encoded: Iterable[bytes]) -> bytes:
    # The items are JSON already: decoding and encoding them again would be too slow for a page of 1,000.
    return b'%s,"%s":[%s]}' % (encode(keys)[:-1], name.encode(), b",".join(encoded))


def _rfc2822(moment: datetime) -> str:
    return format_datetime(moment)


def _iso8601(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
