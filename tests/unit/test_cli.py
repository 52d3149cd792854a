"""`kubectl sms` without a cluster: what it accepts, what it writes where, and what it says to mistakes."""

from __future__ import annotations

import base64
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest
import yaml
from click.testing import CliRunner, Result

from smschannel.api.sealing import Binding, Keyring, SealingKey
from smschannel.cli.main import cli
from tests.manifests import ACCOUNT_SID, INSTANCE, KEY_SID, PHONE_NUMBER, TOKEN

KEY = SealingKey(bytes(range(96)))
RING = Keyring([KEY])
PROGRAM = Path(sys.executable).with_name("kubectl-sms")

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "sealing.key"
    file.write_text(f"{KEY.public.encoded}\n")
    return file


@pytest.fixture
def seal(key_file: Path) -> Run:
    def run(
        *options: str, instance: str = INSTANCE, account: str = ACCOUNT_SID, stdin: str | bytes = f"{TOKEN}\n"
    ) -> Result:
        arguments = ["seal", instance, "--account-sid", account, "--public-key", str(key_file), *options]
        return CliRunner().invoke(cli, arguments, input=stdin)

    return run


def opened(value: str, namespace: str = "sms-channels") -> str:
    return RING.unseal(value, Binding(namespace, INSTANCE, ACCOUNT_SID)).get_secret_value()


def refusal(result: Result) -> str:
    """What was said, in one line; nothing on standard output, and no token anywhere."""
    assert result.exit_code in {1, 2}, result.output
    assert result.stdout == ""
    assert TOKEN not in result.output
    return " ".join(result.stderr.split())


# What it writes


def test_the_value_alone_is_on_standard_output(seal: Run) -> None:
    result = seal("-n", "team-1")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert opened(result.stdout.removesuffix("\n"), "team-1") == TOKEN
    assert result.stderr == f"Sealed for namespace team-1, instance {INSTANCE}, account {ACCOUNT_SID} only.\n"


def test_with_a_number_it_writes_a_manifest(seal: Run) -> None:
    result = seal("--phone-number", PHONE_NUMBER)
    assert result.exit_code == 0
    assert result.stderr == ""
    manifest = yaml.safe_load(result.stdout)
    sealed = manifest["spec"]["credentials"]["sealed"]
    assert opened(sealed) == TOKEN
    assert result.stdout == (
        "apiVersion: channels.hydracore.io/v1\n"
        "kind: SmsChannel\n"
        "metadata:\n"
        f"  name: {INSTANCE}\n"
        "  namespace: sms-channels\n"
        "spec:\n"
        f"  accountSid: {ACCOUNT_SID}\n"
        f"  phoneNumber: '{PHONE_NUMBER}'\n"
        "  credentials:\n"
        f"    sealed: {sealed}\n"
    )


def test_json_is_the_same_manifest(seal: Run) -> None:
    result = seal("--phone-number", PHONE_NUMBER, "--login-sid", KEY_SID, "-o", "json")
    manifest = json.loads(result.stdout)
    assert manifest["spec"]["phoneNumber"] == PHONE_NUMBER
    assert manifest["spec"]["credentials"]["sid"] == KEY_SID
    assert opened(manifest["spec"]["credentials"]["sealed"]) == TOKEN
    assert result.stdout.endswith("}\n")


def test_with_a_number_it_still_writes_the_value_alone_when_asked(seal: Run) -> None:
    assert opened(seal("--phone-number", PHONE_NUMBER, "-o", "value").stdout.strip()) == TOKEN


@pytest.mark.parametrize("output", ["yaml", "json"])
def test_a_manifest_needs_a_number(seal: Run, output: str) -> None:
    assert f"-o {output} writes a whole SmsChannel: give --phone-number, too" in refusal(seal("-o", output))


def test_a_login_needs_a_manifest_to_stand_in(seal: Run) -> None:
    for more in ([], ["--phone-number", PHONE_NUMBER, "-o", "value"]):
        assert "--login-sid is written into an SmsChannel" in refusal(seal("--login-sid", KEY_SID, *more))


# What it accepts


@pytest.mark.parametrize(
    "spelling",
    [INSTANCE.upper(), INSTANCE.replace("-", ""), f"{{{INSTANCE}}}", f"urn:uuid:{INSTANCE}"],
)
def test_an_instance_may_be_spelled_as_any_uuid(seal: Run, spelling: str) -> None:
    assert opened(seal(instance=spelling).stdout.strip()) == TOKEN


@pytest.mark.parametrize(
    "wrong", ["", "x", INSTANCE[:-1], f"{INSTANCE}0", f" {INSTANCE}", INSTANCE.replace("-", "")[:-2] + "_8"]
)
def test_a_wrong_instance_is_explained(seal: Run, wrong: str) -> None:
    assert f"a lower-case UUID with dashes, such as {INSTANCE}" in refusal(seal(instance=wrong))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--phone-number", "0400 111 222"], 'digits only and in quotes, such as "+61400111222"'),
        (["--phone-number", "+61400111222\n"], 'digits only and in quotes, such as "+61400111222"'),
        (["--login-sid", "PN1"], "leave it out to log in as accountSid"),
        (["-n", "Team_1"], "a namespace is at most 63 lower-case letters, digits and dashes, such as sms-channels"),
        (["-n", ""], "such as sms-channels"),
        (["-n", "a" * 64], "at most 63"),
        (["-n", "a/../b"], "such as sms-channels"),
        (["--operator-namespace", "../secrets"], "such as sms-channels"),
        (["-o", "toml"], "'value', 'yaml', 'json'"),
    ],
)
def test_a_wrong_option_is_explained(seal: Run, options: list[str], says: str) -> None:
    said = refusal(seal(*options))
    assert says in said
    assert options[0] in said


@pytest.mark.parametrize("wrong", ["", "AC1", ACCOUNT_SID.upper(), KEY_SID])
def test_a_wrong_account_is_explained_as_the_api_server_would(seal: Run, wrong: str) -> None:
    said = refusal(seal(account=wrong))
    assert 'accountSid is "AC" and 32 of the digits 0-9 and a-f, as the Twilio console shows it' in said


def test_without_an_account_it_says_what_is_missing() -> None:
    assert "Missing option '--account-sid'" in refusal(CliRunner().invoke(cli, ["seal", INSTANCE]))


# The token


@pytest.mark.parametrize(
    "stdin",
    [TOKEN, f"{TOKEN}\n", f"{TOKEN}\r\n", f"  {TOKEN} \n\n", f"\ufeff{TOKEN}\n", f"\t{TOKEN}"],
)
def test_white_space_around_the_token_is_dropped(seal: Run, stdin: str) -> None:
    assert opened(seal(stdin=stdin).stdout.strip()) == TOKEN


@pytest.mark.parametrize(
    ("stdin", "says"),
    [
        ("", "There is no token. Type it at the prompt, or give it on standard input"),
        ("\n", "There is no token"),
        (f"{TOKEN} {TOKEN}", "Give the token alone"),
        (f"{TOKEN}\n{TOKEN}\n", "Give the token alone"),
        (f"auth_token: {TOKEN}", "Give the token alone"),
        (f"{TOKEN}\x00", "Give the token alone"),
        (f"{TOKEN}\u00e9", "Give the token alone"),
        (b"\xff\xfe" + TOKEN.encode("utf-16-le"), "not text"),
        (TOKEN * 17, "This is no token: it has 544 characters or more, where Twilio's have 32. Is it sealed already?"),
        ("x" * 10**6, "characters or more"),
        (ACCOUNT_SID, "This is a SID, not a token"),
        (f"{KEY_SID}\n", "This is a SID, not a token"),
    ],
)
def test_what_is_no_token_is_refused_and_not_shown(seal: Run, stdin: str | bytes, says: str) -> None:
    assert says in refusal(seal(stdin=stdin))


def test_a_token_of_the_greatest_length_is_sealed(seal: Run) -> None:
    assert opened(seal(stdin="x" * 512).stdout.strip()) == "x" * 512


@pytest.mark.parametrize("option", ["--token", "--auth-token"])
def test_no_option_takes_a_token(seal: Run, option: str) -> None:
    assert f"No such option '{option}'" in refusal(seal(f"{option}={TOKEN}"))


def test_no_variable_is_read_as_a_token(seal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "AUTH_TOKEN", "TWILIO_AUTH_TOKEN", "KUBECTL_SMS_SEAL_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    assert "There is no token" in refusal(seal(stdin=""))


def test_at_a_terminal_it_asks_without_showing(key_file: Path) -> None:
    terminal, keyboard = pty.openpty()
    command = [str(PROGRAM), "seal", INSTANCE, "--account-sid", ACCOUNT_SID, "--public-key", str(key_file)]
    process = subprocess.Popen(
        command, stdin=keyboard, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, bufsize=0
    )
    deadline = Timer(60, process.kill)
    deadline.start()
    try:
        assert process.stderr
        asked = b""
        while not asked.endswith(b": ") and (more := process.stderr.read(1)):  # what is typed before is thrown away
            asked += more
        os.write(terminal, f"{TOKEN}\n".encode())
        stdout, stderr = process.communicate()
        echoed = os.read(terminal, 10_000) if select.select([terminal], [], [], 0)[0] else b""
    finally:
        deadline.cancel()
        process.kill()
        os.close(keyboard)
        os.close(terminal)
    assert process.returncode == 0, stderr
    assert asked.decode() == f"Token of {ACCOUNT_SID} (not shown): "
    assert opened(stdout.decode().removesuffix("\n")) == TOKEN
    assert TOKEN.encode() not in stderr + echoed


# The kubeconfig


def kubeconfig(file: Path, current: str | None, **namespaces: str | None) -> Path:
    contexts = [
        {"name": name, "context": {"cluster": "c", "user": "u", **({"namespace": space} if space else {})}}
        for name, space in namespaces.items()
    ]
    file.write_text(yaml.safe_dump({"kind": "Config", "current-context": current, "contexts": contexts}))
    return file


@pytest.mark.parametrize(
    ("options", "namespace"),
    [
        ([], "team-1"),
        (["--context", "two"], "team-2"),
        (["--context", "none"], "sms-channels"),
        (["--context", "two", "-n", "team-3"], "team-3"),
    ],
)
def test_the_namespace_is_that_of_the_context(seal: Run, tmp_path: Path, options: list[str], namespace: str) -> None:
    file = kubeconfig(tmp_path / "config", "one", one="team-1", two="team-2", none=None)
    assert opened(seal("--kubeconfig", str(file), *options).stdout.strip(), namespace) == TOKEN


def test_of_several_kubeconfigs_the_first_that_says_something_wins(
    seal: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kubeconfig(tmp_path / "first", None, one="team-1")
    second = kubeconfig(tmp_path / "second", "one", one="other", two="team-2")
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, (tmp_path / "missing", first, second))))
    assert opened(seal().stdout.strip(), "team-1") == TOKEN
    assert opened(seal("--context", "two").stdout.strip(), "team-2") == TOKEN


def test_a_context_that_is_not_there_is_told_with_those_that_are(seal: Run, tmp_path: Path) -> None:
    file = kubeconfig(tmp_path / "config", "one", one=None, two=None)
    said = refusal(seal("--kubeconfig", str(file), "--context", "three"))
    assert "There is no context three in" in said
    assert "one" in said
    assert "two" in said


@pytest.mark.parametrize("content", ["[1]", "contexts: 7", "contexts: [{}]", "a: b: c", "\x00", '"text"'])
def test_a_file_that_is_no_kubeconfig_is_named(seal: Run, tmp_path: Path, content: str) -> None:
    file = tmp_path / "config"
    file.write_text(content)
    assert f"{file} is no kubeconfig" in refusal(seal("--kubeconfig", str(file)))


def test_an_empty_kubeconfig_says_nothing(seal: Run, tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text("")
    assert opened(seal("--kubeconfig", str(file)).stdout.strip()) == TOKEN


def test_without_any_kubeconfig_it_says_how_to_do_without(tmp_path: Path) -> None:
    said = refusal(CliRunner().invoke(cli, ["seal", INSTANCE, "--account-sid", ACCOUNT_SID], input=TOKEN))
    assert "The kubeconfig cannot be used" in said
    assert "Without a cluster: --public-key FILE" in said


def test_a_kubeconfig_that_is_not_there_is_named(seal: Run) -> None:
    assert "File 'nowhere' does not exist" in refusal(seal("--kubeconfig", "nowhere"))


# The public key


@pytest.mark.parametrize("content", ["", "key", KEY.public.encoded[:-4], f"publicKey: {KEY.public.encoded}", "\u00fc"])
def test_a_file_without_a_public_key_is_refused(seal: Run, key_file: Path, content: str) -> None:
    key_file.write_text(content)
    said = refusal(seal())
    assert f"{key_file} holds no public key" in said
    assert f"kubectl sms public-key > {key_file}" in said


@pytest.mark.parametrize("byte", [b"\xff", b"\x00"])
def test_a_public_key_of_nonsense_is_refused(seal: Run, key_file: Path, byte: bytes) -> None:
    key_file.write_text(base64.b64encode(byte * 1216).decode())
    assert "public key" in refusal(seal())


# The program


def test_help_teaches_by_example() -> None:
    shown = CliRunner().invoke(cli, ["seal", "-h"]).stdout
    assert "kubectl sms seal 497f6eca-6276-4993-bfeb-53cbbbba6f08 --account-sid AC..." in shown
    assert "--public-key sealing.key < token" in shown
    assert "kubectl apply -f channel.yaml" in shown


def test_it_calls_itself_what_people_type() -> None:
    shown = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("Usage: kubectl sms ")


def test_what_needs_no_cluster_does_not_load_its_client(key_file: Path) -> None:
    program = (
        "import sys\nfrom smschannel.cli.main import cli\ncli(standalone_mode=False)\n"
        "assert not {'kubernetes', 'aiohttp', 'kopf', 'twilio'} & sys.modules.keys()"
    )
    arguments = ["seal", INSTANCE, "--account-sid", ACCOUNT_SID, "--public-key", str(key_file)]
    subprocess.run([sys.executable, "-c", program, *arguments], input=TOKEN, text=True, check=True, capture_output=True)


def test_a_closed_standard_input_is_an_empty_one(key_file: Path) -> None:
    command = f"'{PROGRAM}' seal {INSTANCE} --account-sid {ACCOUNT_SID} --public-key '{key_file}' <&-"
    closed = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert closed.returncode == 1
    assert "There is no token" in closed.stderr
