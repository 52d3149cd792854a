"""Draws README's picture of the story from the real output of its commands: `make picture`, which needs kubectl."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.console import Console
from rich.text import Text
from twilio.request_validator import RequestValidator

from deploy.build import Narrator, Progress
from deploy.local.demo import Receiver
from deploy.local.stack import ROOT, Options, Stack, StackError

PICTURE = ROOT / "docs/site/story.svg"
INSTANCE, NUMBER = "497f6eca-6276-4993-bfeb-53cbbbba6f08", "+61400111222"
COMMANDS = (
    f"kubectl sms seal {INSTANCE} --account-sid $ACCOUNT_SID \\\n"
    f"    --phone-number {NUMBER} < token.txt > channel.yaml",
    "kubectl apply -f channel.yaml",
    f"kubectl -n sms-channels wait --for=condition=Ready smsch/{INSTANCE}",
    "kubectl -n sms-channels get smsch",
)
_WIDTH = 96


class Step(NamedTuple):
    """A command, or what somebody does, and what was printed then."""

    title: str
    output: str
    is_command: bool = True


def play(home: Path, say: Progress) -> list[Step]:
    """Start a stack in `home`, apply a channel, wait until it is Ready, send it a message, and stop everything."""
    receiver = Receiver()
    template = f"{receiver.origin}/v1/instances/{{instance_id}}/channels/sms/webhook"
    try:
        with Stack(home, Options(webhook_url_template=template), say) as stack:
            (home / "token.txt").write_text(stack.twin["auth_token"])
            return [*(Step(each, _run(stack, each, home)) for each in COMMANDS), _message(stack, receiver)]
    finally:
        receiver.close()


def _run(stack: Stack, command: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "KUBECONFIG": str(stack.kubeconfig),
        "ACCOUNT_SID": stack.twin["account_sid"],
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    shell = ["/bin/sh", "-ec", command]
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise StackError(f"{command}: {done.stderr}")
    return done.stdout.rstrip()


def _message(stack: Stack, receiver: Receiver) -> Step:
    """Send an SMS from a phone, and show the request that the instance receives."""
    sent = {"to": NUMBER, "from": "+61491570006", "body": "Hello, instance!"}
    stack.twin_call("POST", "/inbound", sent)
    path, signature, form = receiver.received.get(timeout=30)
    valid = RequestValidator(stack.twin["auth_token"]).validate(receiver.origin + path, form, signature)
    if not valid:
        raise StackError(f"X-Twilio-Signature {signature} is not valid")
    output = f"POST {path}\nX-Twilio-Signature: valid\nFrom={form['From']}  Body={form['Body']}"
    return Step(f"{sent['from']} sends an SMS to {NUMBER}; the instance receives:", output, is_command=False)


def draw(steps: list[Step]) -> str:
    """Return the steps as an SVG of a terminal, without fonts from elsewhere."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for number, step in enumerate(steps):
        prompt, style = ("$ ", "bold") if step.is_command else ("# ", "italic")
        line = Text.assemble("\n" * (number > 0), (prompt, "green"), (step.title, style))
        console.print(line, Text(f"\n{step.output}") if step.output else "", sep="", soft_wrap=True)
    svg = console.export_svg(title="SMS Channel Operator", unique_id="story")
    svg = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "ui-monospace, monospace") + "\n"


def main() -> None:
    """Run the story and write the picture."""
    if not shutil.which("kubectl"):
        raise SystemExit("This needs kubectl.")
    with TemporaryDirectory() as home:
        PICTURE.write_text(draw(play(Path(home), Narrator(sys.stdout))))
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
