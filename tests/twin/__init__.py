"""The Twilio twin: a stateful stand-in for api.twilio.com and messaging.twilio.com on one loopback origin.

As a process: `python -m tests.twin --help`. In a test:

    twin = Twin()
    [account] = twin.seed(accounts=1, numbers=40)
    async with twin_server(twin) as url:
        ...                                  # the test can read and change the twin object meanwhile

state     accounts, tokens, numbers, services; faults, journal (no I/O)
api       Twilio's API as a function from a call to an answer; payloads, paging, refusals (no I/O)
app       both over HTTP, and control: the API under /_twin/ that stands for console, outages and phones
inbound   which webhook is in force, and a signed message to it
"""

from tests.twin.app import twin_server
from tests.twin.faults import Action, Match
from tests.twin.state import DEMO_URL, Account, Number, Twin

__all__ = ["DEMO_URL", "Account", "Action", "Match", "Number", "Twin", "twin_server"]
