"""Twilio's errors as the twin answers them: HTTP status, error code, message. No I/O.

Messages follow Twilio's own wording where it is public.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One row of Twilio's error table; `message` is a format string."""

    status: int
    code: int
    message: str


BAD_REQUEST = Row(400, 20001, "{what}")
UNAUTHENTICATED = Row(401, 20003, "Authenticate")
METHOD_NOT_ALLOWED = Row(405, 20004, "Method not allowed")
ACCOUNT_INACTIVE = Row(401, 20005, "Account not active")
TEST_CREDENTIALS = Row(403, 20008, "Resource not accessible with Test Account Credentials")
NOT_FOUND = Row(404, 20404, "The requested resource {path} was not found")
TOO_MANY_REQUESTS = Row(429, 20429, "Too Many Requests")
INVALID_URL = Row(400, 21402, "{field} is not valid")
INVALID_METHOD = Row(400, 21403, "{field} is not valid: it must be GET or POST")
FALLBACK_WITHOUT_URL = Row(400, 21406, "SmsFallbackUrl cannot be set without SmsUrl")
NO_SMS = Row(400, 21407, "This phone number type does not support SMS")
INVALID_RECEIVER = Row(400, 21211, "Invalid 'To' Phone Number: {to}")
SENDS_TO_ITSELF = Row(400, 21266, "'To' and 'From' number cannot be the same")
NO_BODY = Row(400, 21602, "Message body is required.")
NO_SENDER = Row(400, 21603, "A 'From' phone number is required.")
NO_RECEIVER = Row(400, 21604, "A 'To' phone number is required.")
SENDER_LACKS_SMS = Row(400, 21606, "'From' {sender} is not a phone number that can send messages for your account")
FOREIGN_SENDER = Row(400, 21659, "'From' {sender} is not a Twilio phone number of your account")


class Refusal(Exception):
    """Twilio answers with this error. It contains no secret: only the row and the fields of its message."""

    def __init__(self, row: Row, **fields: str) -> None:
        self.status = row.status
        self.code = row.code
        self.message = row.message.format(**fields)
        super().__init__(f"{self.status}/{self.code} {self.message}")
