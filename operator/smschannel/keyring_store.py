"""Where the private keys are kept: the keyring Secret, or the files of a directory; and how the operator follows them.

A key is stored before its public half is published, so that whatever is sealed can be opened. The Secret's data:

    keyring     all seeds, the newest last; releases that knew one key only read it, too
    created     when each key was created
    proof       that whoever wrote this had a key of the keyring before
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from smschannel import metrics
from smschannel.api.errors import Conflict, KeyringLost, KubernetesUnavailable, NotFound
from smschannel.api.kube_client import MERGE_PATCH, KubeClient, Object
from smschannel.api.names import KEYRING_SECRET, MANAGED, PUBLIC_KEY_CONFIGMAP, core_path
from smschannel.api.sealing import Keyring, SealingKey, parse_keys
from smschannel.core.record import RECORD_LABEL, Key

log = structlog.get_logger()

_LARGEST_FILE = 2**20  # bytes


@dataclass(frozen=True)
class Stored:
    """A keyring as it is stored: `keyring` with the dates that are stored, `opened` with one for every key.

    `version` is the Secret's resourceVersion, empty for files; `proof` shows who wrote it.
    """

    keyring: Keyring
    opened: Keyring
    version: str = ""
    proof: str = ""


class KeyringStore:
    """Reads and writes the keyring. `directory` has the keys as files, which are never written; None: the Secret."""

    def __init__(self, api: KubeClient, namespace: str, directory: Path | None = None) -> None:
        self._api = api
        self._namespace = namespace
        self.directory = directory

    @property
    def place(self) -> str:
        """Return where the keys are, for messages."""
        return str(self.directory) if self.directory else f"Secret {self._namespace}/{KEYRING_SECRET}"

    async def read(self) -> Stored | None:
        """Read the keyring; None if there is none. Raises `KeyringLost` if it is there and cannot be read."""
        if self.directory:
            keyring = _read_files(self.directory)  # a few small files in memory
            return Stored(keyring, keyring) if keyring else None
        try:
            secret = await self._api.request("GET", core_path(self._namespace, "secrets", KEYRING_SECRET))
        except NotFound as error:
            if error.name != KEYRING_SECRET:
                raise KubernetesUnavailable(f"asked for {KEYRING_SECRET}, the API server answers: {error}") from None
            return None
        if (secret.get("metadata") or {}).get("name") != KEYRING_SECRET:
            raise KubernetesUnavailable(f"asked for {KEYRING_SECRET}, the API server answers with something else")
        return self._stored(secret)

    async def write(self, keyring: Keyring, before: Stored | None) -> Stored:
        """Store a keyring in place of what was read; None: create it. Raises `Conflict` if others wrote meanwhile."""
        if self.directory:
            raise KeyringLost(f"the keys are files in {self.directory}, which whoever provides them must change")
        path = core_path(self._namespace, "secrets")
        author = before.opened if before else keyring
        content = {
            "keyring": keyring.dump(),
            "created": keyring.dump_dates(),
            "proof": author.authenticate(keyring),
        }
        data = {name: base64.b64encode(value.encode()).decode() for name, value in content.items()}
        metrics.KUBERNETES_WRITES.labels("keyring").inc()
        if before:
            patch: Object = {"metadata": {"resourceVersion": before.version}, "data": data}
            try:
                saved = await self._api.request("PATCH", f"{path}/{KEYRING_SECRET}", patch, content_type=MERGE_PATCH)
            except NotFound:
                raise Conflict("the keyring was deleted meanwhile") from None
        else:
            meta = {"name": KEYRING_SECRET, "namespace": self._namespace, "labels": MANAGED}
            body = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": data}
            saved = await self._api.request("POST", path, body)
        return self._stored(saved)

    async def lost_witness(self) -> str | None:
        """Return what shows that there was a keyring, although it is missing; None if nothing does."""
        try:
            await self._api.request("GET", core_path(self._namespace, "configmaps", PUBLIC_KEY_CONFIGMAP))
        except NotFound:
            path, selector = core_path(self._namespace, "secrets"), {"labelSelector": f"{RECORD_LABEL}=true"}
            records = await self._api.request("GET", path, params={**selector, "limit": "1"})
            return "records of channels" if records["items"] else None
        return f"ConfigMap {PUBLIC_KEY_CONFIGMAP}"

    def _stored(self, secret: Object) -> Stored:
        def text(name: str) -> str:
            return base64.b64decode(secret["data"].get(name) or "").decode()

        try:
            keyring, proof = Keyring.load(text("keyring"), text("created") or "{}"), text("proof")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise KeyringLost(
                f"{self.place} holds no keyring that this release can read: run the release that wrote it, or a newer"
                " one; if it is damaged, restore it from its backup"
            ) from None
        meta = secret["metadata"]
        made = datetime.now(UTC)  # only if the API server does not say
        with contextlib.suppress(KeyError, TypeError, ValueError):
            made = datetime.fromisoformat(meta["creationTimestamp"])
        return Stored(keyring, keyring.dated(made), meta["resourceVersion"], proof)


class Keys:
    """The keyring in use. `report` raises an alarm about a change that others made; `lacking` are the keys of channels
    whose token or record could not be opened since a key was missing.
    """

    def __init__(self, store: KeyringStore, report: Callable[[str], Awaitable[None]]) -> None:
        self.store = store
        self.lacking: set[Key] = set()
        self._report = report
        self._stored: Stored | None = None

    @property
    def is_open(self) -> bool:
        return self._stored is not None

    @property
    def keyring(self) -> Keyring:
        assert self._stored, "open comes first"
        return self._stored.opened

    async def open(self, now: datetime) -> Keyring:
        """Read the keyring; create it at the first start.

        Raises `KeyringLost` if it is missing although there was one before: a new one could not open old records.
        """
        stored = await self.store.read()
        if stored is None and self.store.directory:
            raise KeyringLost(f"{self.store.place} has no files with keys, or is not there")
        witness = await self.store.lost_witness() if stored is None else None
        # Read once more: an operator of another shard may have created both meanwhile.
        if witness and not (stored := await self.store.read()):
            raise KeyringLost(
                f"{self.store.place} is gone, but {witness} made with it are there. Restore it: kubectl sms keys"
                " restore BACKUP. Only if there is no backup: kubectl sms keys renew --without-backup, and seal"
                " every token again"
            )
        if stored is None:
            try:
                stored = await self.store.write(Keyring([SealingKey.generate(now)]), None)
            except Conflict:  # another operator was faster: use its keyring
                stored = await self.store.read()
                if stored is None:
                    raise
        self.use(stored)
        return self.keyring

    async def follow(self) -> set[str]:
        """Bring the keyring in use up to date. Return the fingerprints of the keys that were added.

        Changes by `kubectl sms keys` prove that their author had the keyring. Anything else raises an alarm, and loses
        nothing: a missing keyring is written again, and another one is merged with the one in use, which still seals.
        """
        assert self._stored, "open comes first"
        before = set(self.keyring.fingerprints)
        try:
            stored = await self.store.read()
        except KeyringLost as error:
            await self._report(f"The operator goes on with the keyring that it has: {error}.")
            return set()
        if self.store.directory:
            self._follow_files(stored)
        elif stored is None:
            await self._report("Writing it again.")
            self.use(await self.store.write(self.keyring, None))
        elif stored.keyring == self._stored.keyring or self.keyring.is_authentic(stored.keyring, stored.proof):
            self.use(stored)
        else:
            merged = self.keyring.merged(stored.opened)
            await self._report("Its keys are added to those in use, which are kept; what seals stays the same.")
            self.use(await self.store.write(merged, Stored(stored.keyring, self.keyring, stored.version)))
        added = set(self.keyring.fingerprints) - before
        if removed := before - set(self.keyring.fingerprints):
            log.info("keys retired", fingerprints=sorted(removed))
        if added:
            log.info("keys added", fingerprints=sorted(added))
        return added

    def _follow_files(self, stored: Stored | None) -> None:
        if stored is None:
            log.error("files of the keyring are gone, going on with the keys in use", directory=self.store.place)
        elif stored.keyring != self.keyring:
            self.use(stored)

    async def renew(self, now: datetime) -> SealingKey:
        """Add a new key, which seals from now on. Return it. Raises `Conflict` if others changed the keyring."""
        assert self._stored, "open comes first"
        key = SealingKey.generate(now)
        self.use(await self.store.write(self.keyring.with_newest([key]), self._stored))
        log.info("key renewed", fingerprint=key.fingerprint)
        return key

    def use(self, stored: Stored) -> None:
        """Use a keyring that was read or written."""
        self._stored = stored
        newest = stored.opened.current.created
        metrics.KEYS.set(len(stored.opened))
        metrics.NEWEST_KEY_CREATED.set(newest.timestamp() if newest else 0)

    def take_lacking(self) -> set[Key]:
        """Return `lacking`, and forget it: whoever still lacks a key is added again."""
        taken, self.lacking = self.lacking, set()
        return taken


def _read_files(directory: Path) -> Keyring | None:
    """Return the keys of all files, in the order of their names; None if there are none. Raises `KeyringLost`."""
    try:
        files = sorted(each for each in directory.iterdir() if not each.name.startswith(".") and each.is_file())
        keys = [key for file in files for key in _keys_of(file)]
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            return None
        raise KeyringLost(f"the keys in {directory} cannot be read: {error.strerror}") from None
    return Keyring(keys) if keys else None


def _keys_of(file: Path) -> Iterable[SealingKey]:
    with file.open("rb") as content:
        text = content.read(_LARGEST_FILE)
    try:
        return parse_keys(text.decode())
    except ValueError:
        raise KeyringLost(
            f"{file} is not a sealing key: write 96 random bytes in base64, or a keyring, into each file"
        ) from None
