"""`kubectl sms` without a cluster: its options, its output and its error messages."""

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

import click
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
def _no_kubeconfig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def error_of(result: Result) -> str:
    """Return the error message on one line; check that nothing went to standard output, and no token anywhere."""
    assert result.exit_code in {1, 2}, result.output
    assert result.stdout == ""
    assert TOKEN not in result.output
    return " ".join(result.stderr.split())


# Output


def test_seal_prints_the_value_alone(seal: Run) -> None:
    result = seal("-n", "team-1")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert opened(result.stdout.removesuffix("\n"), "team-1") == TOKEN
    assert result.stderr == f"Sealed for namespace team-1, instance {INSTANCE}, account {ACCOUNT_SID} only.\n"


def test_seal_with_phone_number_prints_a_manifest(seal: Run) -> None:
    result = seal("--phone-number", PHONE_NUMBER)
    assert result.exit_code == 0
    assert result.stderr.startswith("Sealed for namespace sms-channels, "), "nobody chose it"
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


def test_seal_prints_the_manifest_as_json(seal: Run) -> None:
    result = seal("--phone-number", PHONE_NUMBER, "--login-sid", KEY_SID, "-o", "json")
    manifest = json.loads(result.stdout)
    assert manifest["spec"]["phoneNumber"] == PHONE_NUMBER
    assert manifest["spec"]["credentials"]["sid"] == KEY_SID
    assert opened(manifest["spec"]["credentials"]["sealed"]) == TOKEN
    assert result.stdout.endswith("}\n")


def test_output_value_overrides_phone_number(seal: Run) -> None:
    assert opened(seal("--phone-number", PHONE_NUMBER, "-o", "value").stdout.strip()) == TOKEN


@pytest.mark.parametrize("output", ["yaml", "json"])
def test_manifest_needs_a_phone_number(seal: Run, output: str) -> None:
    assert f"-o {output} prints a whole SmsChannel: add --phone-number" in error_of(seal("-o", output))


def test_login_sid_needs_a_manifest(seal: Run) -> None:
    for more in ([], ["--phone-number", PHONE_NUMBER, "-o", "value"]):
        assert "--login-sid is a field of an SmsChannel" in error_of(seal("--login-sid", KEY_SID, *more))


# Options


@pytest.mark.parametrize(
    "spelling",
    [INSTANCE.upper(), INSTANCE.replace("-", ""), f"{{{INSTANCE}}}", f"urn:uuid:{INSTANCE}"],
)
def test_instance_may_be_any_form_of_a_uuid(seal: Run, spelling: str) -> None:
    assert opened(seal(instance=spelling).stdout.strip()) == TOKEN


@pytest.mark.parametrize("invalid", ["", "x", INSTANCE[:-1], f"{INSTANCE}0", INSTANCE.replace("-", "")[:-2] + "_8"])
def test_invalid_instance_is_explained(seal: Run, invalid: str) -> None:
    assert f"a lower-case UUID with dashes, such as {INSTANCE}" in error_of(seal(instance=invalid))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--phone-number", "0400 111 222"], 'digits only and in quotes, such as "+61400111222"'),
        (["--phone-number", "+61400\u200b111222"], "it contains U+200B (zero width space) at position 7"),
        (["--phone-number", "+61400\n111222"], "it contains U+000A (line feed) at position 7"),
        (["--phone-number", "+\uff16\uff11400111222"], "it contains U+FF16 (fullwidth digit six) at position 2"),
        (["--login-sid", f"SK{'0' * 16}\u00ad{'0' * 16}"], "it contains U+00AD (soft hyphen) at position 19"),
        (["-n", "team\u20111"], "it contains U+2011 (non-breaking hyphen) at position 5"),
        (["--login-sid", "PN1"], "leave it out to log in as accountSid"),
        (["-n", "Team_1"], "a namespace is at most 63 lower-case letters, digits and dashes, such as sms-channels"),
        (["-n", ""], "such as sms-channels"),
        (["-n", "a" * 64], "at most 63"),
        (["-n", "a/../b"], "such as sms-channels"),
        (["--operator-namespace", "../secrets"], "such as sms-channels"),
        (["-o", "toml"], "'value', 'yaml', 'json'"),
    ],
)
def test_invalid_option_is_explained(seal: Run, options: list[str], expected: str) -> None:
    message = error_of(seal(*options))
    assert expected in message
    assert options[0] in message


@pytest.mark.parametrize("invalid", ["", "AC1", ACCOUNT_SID.upper(), KEY_SID])
def test_invalid_account_gets_the_message_of_the_crd(seal: Run, invalid: str) -> None:
    message = error_of(seal(account=invalid))
    assert 'accountSid is "AC" and 32 of the digits 0-9 and a-f, as the Twilio console shows it' in message


def test_missing_account_is_named() -> None:
    assert "Missing option '--account-sid'" in error_of(CliRunner().invoke(cli, ["seal", INSTANCE]))


# Token


@pytest.mark.parametrize(
    "stdin",
    [
        *(TOKEN, f"{TOKEN}\n", f"{TOKEN}\r\n", f"  {TOKEN} \n\n", f"\ufeff{TOKEN}\n", f"\t{TOKEN}"),
        f"\u00a0\u200b\u202a{TOKEN}\u202c\u2060\u2028",
        *(f"{TOKEN}\r\n".encode(name) for name in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")),
    ],
)
def test_invisible_characters_around_the_token_are_dropped(seal: Run, stdin: str | bytes) -> None:
    assert opened(seal(stdin=stdin).stdout.strip()) == TOKEN


@pytest.mark.parametrize(
    ("stdin", "expected"),
    [
        ("", "The token is empty. Type it at the prompt, or give it on standard input"),
        ("\n", "The token is empty"),
        (f"{TOKEN} {TOKEN}", "Give the token alone"),
        (f"{TOKEN}\n{TOKEN}\n", "Give the token alone"),
        (f"auth_token: {TOKEN}", "Give the token alone"),
        (f'"{TOKEN}"\n', "first U+0022 (quotation mark) at both ends"),
        (f"\u201c{TOKEN}\u201d", "first U+201C (left double quotation mark) at position 1"),
        (f"{TOKEN}\x00", "Give the token alone"),
        (f"{TOKEN}\u00e9", "Give the token alone"),
        (f"{TOKEN[:9]}\u200b{TOKEN[9:]}", "first U+200B (zero width space) at position 10"),
        (b"\xff\xfe" + TOKEN.encode("utf-16-le")[:-1], "it begins as UTF-16 text, but byte"),
        (TOKEN.encode() + b"\xe9", "it is not UTF-8 text (nor UTF-16): byte"),
        (
            TOKEN * 17,
            "This is not a token: it has at least 544 characters, and Twilio's tokens have 32. Is it already sealed?",
        ),
        ("x" * 10**6, "it has at least 8192 characters"),
        (ACCOUNT_SID, "This is a SID, not a token"),
        (f"{KEY_SID}\n", "This is a SID, not a token"),
    ],
)
def test_invalid_token_is_rejected_and_not_shown(seal: Run, stdin: str | bytes, expected: str) -> None:
    assert expected in error_of(seal(stdin=stdin))


def test_token_of_maximum_length_is_sealed(seal: Run) -> None:
    assert opened(seal(stdin="x" * 512).stdout.strip()) == "x" * 512


@pytest.mark.parametrize("option", ["--token", "--auth-token"])
def test_no_option_takes_a_token(seal: Run, option: str) -> None:
    assert f"No such option '{option}'" in error_of(seal(f"{option}={TOKEN}"))


def test_no_environment_variable_is_read_as_a_token(seal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "AUTH_TOKEN", "TWILIO_AUTH_TOKEN", "KUBECTL_SMS_SEAL_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    assert "The token is empty" in error_of(seal(stdin=""))


def test_prompt_does_not_echo_the_token(key_file: Path) -> None:
    terminal, keyboard = pty.openpty()
    command = [str(PROGRAM), "seal", INSTANCE, "--account-sid", ACCOUNT_SID, "--public-key", str(key_file)]
    process = subprocess.Popen(
        command, stdin=keyboard, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, bufsize=0
    )
    deadline = Timer(60, process.kill)
    deadline.start()
    try:
        assert process.stderr
        prompt = b""
        while not prompt.endswith(b": ") and (
            more := process.stderr.read(1)
        ):  # input typed before the prompt is discarded
            prompt += more
        os.write(terminal, f"{TOKEN}\n".encode())
        stdout, stderr = process.communicate()
        echoed = os.read(terminal, 10_000) if select.select([terminal], [], [], 0)[0] else b""
    finally:
        deadline.cancel()
        process.kill()
        os.close(keyboard)
        os.close(terminal)
    assert process.returncode == 0, stderr
    assert prompt.decode() == f"Token of {ACCOUNT_SID} (not shown): "
    assert opened(stdout.decode().removesuffix("\n")) == TOKEN
    assert TOKEN.encode() not in stderr + echoed


# Kubeconfig


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
def test_namespace_defaults_to_the_context(seal: Run, tmp_path: Path, options: list[str], namespace: str) -> None:
    file = kubeconfig(tmp_path / "config", "one", one="team-1", two="team-2", none=None)
    assert opened(seal("--kubeconfig", str(file), *options).stdout.strip(), namespace) == TOKEN


def test_first_kubeconfig_that_sets_a_value_wins(seal: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kubeconfig(tmp_path / "first", None, one="team-1")
    second = kubeconfig(tmp_path / "second", "one", one="other", two="team-2")
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, (tmp_path / "missing", first, second))))
    assert opened(seal().stdout.strip(), "team-1") == TOKEN
    assert opened(seal("--context", "two").stdout.strip(), "team-2") == TOKEN


def test_unknown_context_is_reported_with_the_existing_ones(seal: Run, tmp_path: Path) -> None:
    file = kubeconfig(tmp_path / "config", "one", one=None, two=None)
    message = error_of(seal("--kubeconfig", str(file), "--context", "three"))
    assert "has no context three. Its contexts:" in message
    assert "one" in message
    assert "two" in message


@pytest.mark.parametrize("content", ["[1]", "contexts: 7", "contexts: [{}]", "a: b: c", "\x00", '"text"'])
def test_invalid_kubeconfig_is_named(seal: Run, tmp_path: Path, content: str) -> None:
    file = tmp_path / "config"
    file.write_text(content)
    assert f"{file} is not a valid kubeconfig" in error_of(seal("--kubeconfig", str(file)))


def test_empty_kubeconfig_is_accepted(seal: Run, tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text("")
    assert opened(seal("--kubeconfig", str(file)).stdout.strip()) == TOKEN


def test_missing_kubeconfig_error_explains_offline_sealing(tmp_path: Path) -> None:
    message = error_of(CliRunner().invoke(cli, ["seal", INSTANCE, "--account-sid", ACCOUNT_SID], input=TOKEN))
    assert "The kubeconfig cannot be used" in message
    assert "Without a cluster: --public-key FILE" in message


def test_missing_kubeconfig_file_is_named(seal: Run) -> None:
    assert "File 'nowhere' does not exist" in error_of(seal("--kubeconfig", "nowhere"))


# Public key


@pytest.mark.parametrize("content", ["", "key", KEY.public.encoded[:-4], f"publicKey: {KEY.public.encoded}", "\u00fc"])
def test_invalid_public_key_file_is_rejected(seal: Run, key_file: Path, content: str) -> None:
    key_file.write_text(content)
    message = error_of(seal())
    assert f"{key_file} is not a public key" in message
    assert f"kubectl sms public-key > {key_file}" in message


@pytest.mark.parametrize("byte", [b"\xff", b"\x00"])
def test_public_key_of_arbitrary_bytes_is_rejected(seal: Run, key_file: Path, byte: bytes) -> None:
    key_file.write_text(base64.b64encode(byte * 1216).decode())
    assert "public key" in error_of(seal())


# Program


def test_help_has_examples() -> None:
    # A separate process, since click caches the help option with the names of the first context that used a command.
    shown = subprocess.run([PROGRAM, "seal", "-h"], capture_output=True, text=True, check=True).stdout
    assert "kubectl sms seal 497f6eca-6276-4993-bfeb-53cbbbba6f08 --account-sid AC..." in shown
    assert "--public-key sealing.key < token" in shown
    assert "kubectl apply -f channel.yaml" in shown


def test_help_shows_the_program_name_users_type() -> None:
    shown = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("Usage: kubectl sms ")


SLOW = {"kubernetes", "aiohttp", "cryptography", "twilio", "kopf"}


def modules_loaded(*arguments: str, stdin: str = "") -> set[str]:
    """Return the top-level modules that a run of the program imports."""
    program = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        "from smschannel.cli.main import main\nmain()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, input=stdin, text=True, check=True, capture_output=True)
    return {name.split(".")[0] for name in json.loads(run.stderr.splitlines()[-1])}


def all_commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of the group, of each of its commands, and of each command of its subgroups."""
    paths = [path]
    for name, command in group.commands.items():
        paths += all_commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return paths


@pytest.mark.parametrize("path", all_commands(cli), ids=" ".join)
def test_help_imports_no_slow_module(path: tuple[str, ...]) -> None:
    assert not SLOW & modules_loaded(*path, "--help")


def test_keys_are_a_group_of_the_one_program() -> None:
    assert {("key", "create"), ("key", "list"), ("key", "revoke")} <= set(all_commands(cli))
    assert not PROGRAM.with_name("kubectl-sms-key").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_files_may_be_in_any_encoding_of_unicode(seal: Run, key_file: Path, tmp_path: Path, encoding: str) -> None:
    """PowerShell's > writes UTF-16."""
    key_file.write_bytes(f"{KEY.public.encoded}\r\n".encode(encoding))
    config = tmp_path / "config"
    kubeconfig(config, "one", one="team-1")
    config.write_bytes(config.read_text().encode(encoding))
    assert opened(seal("--kubeconfig", str(config)).stdout.strip(), "team-1") == TOKEN


def test_public_key_in_another_encoding_is_named(seal: Run, key_file: Path) -> None:
    key_file.write_bytes(KEY.public.encoded.encode() + b"\xa0")
    assert f"{key_file} is not UTF-8 text (nor UTF-16): byte" in error_of(seal())


@pytest.mark.parametrize(
    "pasted",
    [
        *("+61 400 111 222", "+61\u00a0400\u202f111\u2009222", "\u202a+61400111222\u202c", "\u200b+61400111222\ufeff"),
        *("+61400111222\n", "+61\u2011400\u2013111\u2212222", "(+61) 400.111.222"),
    ],
)
def test_punctuation_of_pasted_numbers_is_dropped(seal: Run, pasted: str) -> None:
    manifest = yaml.safe_load(seal("--phone-number", pasted).stdout)
    assert manifest["spec"]["phoneNumber"] == PHONE_NUMBER


def test_pasted_sids_and_names_are_cleaned(seal: Run) -> None:
    result = seal("-n", "\ufeffteam-1\u00a0", instance=f" \u200b{INSTANCE}\n", account=f"{ACCOUNT_SID}\u202c ")
    assert opened(result.stdout.strip(), "team-1") == TOKEN


def test_offline_sealing_does_not_import_the_kubernetes_client(key_file: Path) -> None:
    arguments = ["seal", INSTANCE, "--account-sid", ACCOUNT_SID, "--public-key", str(key_file)]
    loaded = modules_loaded(*arguments, stdin=TOKEN)
    assert "cryptography" in loaded
    assert not {"kubernetes", "aiohttp", "kopf", "twilio"} & loaded


def test_closed_standard_input_counts_as_empty(key_file: Path) -> None:
    command = f"'{PROGRAM}' seal {INSTANCE} --account-sid {ACCOUNT_SID} --public-key '{key_file}' <&-"
    closed = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert closed.returncode == 1
    assert "The token is empty" in closed.stderr


def test_token_given_as_an_argument_is_not_repeated(seal: Run) -> None:
    result = seal(TOKEN)
    assert result.exit_code == 2
    assert TOKEN not in result.output
    assert "replace it at Twilio" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all", INSTANCE, "--restore"], "name the INSTANCEs or use --all, not both"),
        (["--all", "--restore", "--orphan"], "use --restore or --orphan, not both"),
        (["--restore"], "name the INSTANCEs, or use --all"),
        (["--all"], "use --restore (as the deletion policies say) or --orphan"),
    ],
)
def test_detach_says_which_options_contradict(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["detach", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
