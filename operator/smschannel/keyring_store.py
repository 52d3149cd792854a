"""Where the private keys are kept: the keyring Secret, or the files of a directory; and how the operator follows them.

A key is stored before its public half is published, so that whatever is sealed can be opened. The Secret's data:

    keyring     all seeds, the newest last; releases that knew one key only read it, too
    created     when each key was created
    generation  a number that grows with each write, so that an older keyring is known as such
    proof       that whoever wrote these three, as the text that they are, had the keys of the keyring before
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import structlog

from smschannel import metrics
from smschannel.api.errors import Conflict, KeyringLost, KubernetesUnavailable, NotFound
from smschannel.api.kube_client import MERGE_PATCH, KubeClient, Object
from smschannel.api.names import KEYRING_SECRET, MANAGED, PUBLIC_KEY_CONFIGMAP, core_path
from smschannel.api.sealing import MOST_KEYS, Keyring, SealingKey, parse_keys
from smschannel.core.record import RECORD_LABEL, Key

log = structlog.get_logger()

_LARGEST_FILE = 2**20  # bytes
_MOST_DIGITS = 18  # of a generation: more than years of changes need, and few enough for int()
_MOST_ADDED_BY_OTHERS = MOST_KEYS // 2  # keys in all, so that others leave room for the renewal
_FIELDS = ("keyring", "created", "generation", "proof")


@dataclass(frozen=True, repr=False)
class Content:
    """The data of the keyring Secret as text, which may be anything. `others` are names of data that it should lack."""

    keyring: str
    created: str
    generation: int
    proof: str
    version: str
    made: datetime
    others: tuple[str, ...] = ()

    @property
    def authenticated(self) -> bytes:
        return authenticated(self.keyring, self.created, self.generation)


@dataclass(frozen=True, repr=False)
class Stored:
    """A keyring as it is stored: `keyring` with the dates that are stored, `opened` with one for every key.

    `version` is the Secret's resourceVersion, empty for files and for a Secret that is gone.
    """

    keyring: Keyring
    opened: Keyring
    version: str = ""
    generation: int = 0
    authenticated: bytes = b""


def authenticated(keyring: str, created: str, generation: int) -> bytes:
    """Return what a proof is about. A newer release must not change this: older ones tell its keyring from damage."""
    return json.dumps([keyring, created, generation]).encode()


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
        content = await self.read_content()
        return self.load(content) if content else None

    async def read_content(self) -> Content | None:
        """Read the Secret, whatever it holds; None if there is none."""
        try:
            secret = await self._api.request("GET", core_path(self._namespace, "secrets", KEYRING_SECRET))
        except NotFound as error:
            if error.name != KEYRING_SECRET:
                raise KubernetesUnavailable(f"asked for {KEYRING_SECRET}, the API server answers: {error}") from None
            return None
        if (secret.get("metadata") or {}).get("name") != KEYRING_SECRET:
            raise KubernetesUnavailable(f"asked for {KEYRING_SECRET}, the API server answers with something else")
        return _content(secret)

    def load(self, content: Content) -> Stored:
        """Parse what was read. Raises `KeyringLost` if that cannot be done."""
        try:
            keyring = Keyring.load(content.keyring, content.created)
        except ValueError:
            raise KeyringLost(
                f"{self.place} holds no keyring that this release can read: run the release that wrote it, or a newer"
                " one. If it is damaged, delete it and restore its backup: kubectl sms keys restore BACKUP"
            ) from None
        return Stored(keyring, keyring.dated(content.made), content.version, content.generation, content.authenticated)

    async def write(self, keyring: Keyring, before: Stored | None, *, removed: Iterable[str] = ()) -> Stored:
        """Store a keyring in place of the one `before`, and prove that its keys are known. Return what is stored.

        Create the Secret if there was none, or if `before` has no version. `removed` are data to remove. Raises
        `Conflict` if others wrote meanwhile.
        """
        if self.directory:
            raise KeyringLost(f"the keys are files in {self.directory}, which whoever provides them must change")
        path = core_path(self._namespace, "secrets")
        data: Object = {name: base64.b64encode(each.encode()).decode() for name, each in _texts(keyring, before)}
        metrics.KUBERNETES_WRITES.labels("keyring").inc()
        if before and before.version:
            changed = {**dict.fromkeys(removed), **data}
            patch: Object = {"metadata": {"resourceVersion": before.version}, "data": changed}
            try:
                saved = await self._api.request("PATCH", f"{path}/{KEYRING_SECRET}", patch, content_type=MERGE_PATCH)
            except NotFound:
                raise Conflict("the keyring was deleted meanwhile") from None
        else:
            meta = {"name": KEYRING_SECRET, "namespace": self._namespace, "labels": MANAGED}
            body = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": data}
            saved = await self._api.request("POST", path, body)
        return self.load(_content(saved))

    async def lost_witness(self) -> str | None:
        """Return what shows that there was a keyring, although it is missing; None if nothing does."""
        try:
            await self._api.request("GET", core_path(self._namespace, "configmaps", PUBLIC_KEY_CONFIGMAP))
        except NotFound:
            path, selector = core_path(self._namespace, "secrets"), {"labelSelector": f"{RECORD_LABEL}=true"}
            records = await self._api.request("GET", path, params={**selector, "limit": "1"})
            return "records of channels" if records["items"] else None
        return f"ConfigMap {PUBLIC_KEY_CONFIGMAP}"


class Keys:
    """The keyring in use. `report` raises an alarm about a change that others made; `lacking` are the keys of channels
    whose token or record could not be opened since a key was missing.
    """

    def __init__(self, store: KeyringStore, report: Callable[[str], Awaitable[None]]) -> None:
        self.store = store
        self.lacking: set[Key] = set()
        self._report = report
        self._stored: Stored | None = None
        self._changing = asyncio.Lock()  # an answer that is late must not bring back what it saw

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

        Changes by `kubectl sms keys` prove that their author had the keyring, and are newer than what is in use.
        Anything else raises an alarm, and loses nothing: see `_follow_secret`.
        """
        before = set(self.keyring.fingerprints)
        async with self._changing:
            assert self._stored, "open comes first"
            if self.store.directory:
                await self._follow_files()
            else:
                await self._follow_secret(self._stored)
        added = set(self.keyring.fingerprints) - before
        if removed := before - set(self.keyring.fingerprints):
            log.info("keys retired", fingerprints=sorted(removed))
        if added:
            log.info("keys added", fingerprints=sorted(added))
        return added

    async def _follow_secret(self, own: Stored) -> None:
        """Follow a newer keyring whose author had this one. Write the keys in use again otherwise.

        A missing keyring is written again, and so is one that was damaged. The keys of any other one, or of an older
        one, are added to those in use, of which the newest still seals.
        """
        content = await self.store.read_content()
        if content is None:
            await self._report("Writing it again.")
            self.use(await self.store.write(own.opened, replace(own, version="")))
            return
        if content.authenticated == own.authenticated:
            self._stored = replace(own, version=content.version)
            return
        is_newer = content.generation > own.generation
        is_proven = is_newer and own.opened.is_authentic(content.authenticated, content.proof)
        try:
            stored = self.store.load(content)
        except KeyringLost as error:
            if is_proven:  # by a newer release: the keyring is its own
                await self._report(f"The operator goes on with the keyring that it has: {error}.")
                return
            stored = None
        if stored and is_proven:
            self.use(stored)
            return
        kept, advice = _merged(own.opened, stored)
        await self._report(advice)
        before = replace(own, version=content.version)
        self.use(await self.store.write(kept, before, removed=content.others))

    async def _follow_files(self) -> None:
        try:
            stored = await self.store.read()
        except KeyringLost as error:
            await self._report(f"The operator goes on with the keyring that it has: {error}.")
            return
        if stored is None:
            log.error("files of the keyring are gone, going on with the keys in use", directory=self.store.place)
        elif stored.keyring != self.keyring:
            self.use(stored)

    async def renew(self, now: datetime) -> SealingKey:
        """Add a new key, which seals from now on. Return it.

        The keyring must not be full. Raises `Conflict` if others changed it.
        """
        key = SealingKey.generate(now)
        async with self._changing:
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


def _content(secret: Object) -> Content:
    """Return the data of the Secret. What is not text is empty, and what is not a generation is 0."""
    found = secret.get("data")
    data: Object = found if isinstance(found, dict) else {}

    def text(name: str) -> str:
        with contextlib.suppress(TypeError, ValueError):
            return base64.b64decode(data.get(name) or "").decode()
        return ""

    meta, generation = secret["metadata"], text("generation")
    made = datetime.now(UTC)  # only if the API server does not say
    with contextlib.suppress(KeyError, TypeError, ValueError):
        made = datetime.fromisoformat(meta["creationTimestamp"])
    return Content(
        keyring=text("keyring"),
        created=text("created"),
        generation=int(generation) if generation.isdecimal() and len(generation) <= _MOST_DIGITS else 0,
        proof=text("proof"),
        version=meta["resourceVersion"],
        made=made,
        others=tuple(name for name in data if name not in _FIELDS),
    )


def _texts(keyring: Keyring, before: Stored | None) -> Iterable[tuple[str, str]]:
    """Yield the data to store in place of `before`.

    Without `before` there is no proof: whoever follows must not think that a key was retired. The generation is the
    time, so that it is larger than any of a keyring that was lost.
    """
    generation = max(before.generation + 1 if before else 0, int(time.time()))
    texts = keyring.dump(), keyring.dump_dates(), generation
    proof = before.opened.authenticate(authenticated(*texts)) if before else ""
    return zip(_FIELDS, (*map(str, texts), proof), strict=True)


def _merged(own: Keyring, others: Stored | None) -> tuple[Keyring, str]:
    """Return the keyring to write in place of one that is not proven, and what to tell people about it."""
    if others is None:
        return own, "It held no keyring that this release can read. Writing the keys in use again."
    with contextlib.suppress(ValueError):
        merged = own.merged(others.opened)
        if len(merged) <= max(_MOST_ADDED_BY_OTHERS, len(own)):
            return merged, "Its keys are added to those in use, which are kept; what seals stays the same."
    return own, (
        "It held more keys than are taken from others, and none of them was added. Writing the keys in use again. If"
        " you need these keys, restore them: kubectl sms keys restore BACKUP."
    )


def _read_files(directory: Path) -> Keyring | None:
    """Return the keys of all files, in the order of their names; None if there are none. Raises `KeyringLost`."""
    try:
        files = sorted(each for each in directory.iterdir() if not each.name.startswith(".") and each.is_file())
        keys = [key for file in files for key in _keys_of(file)]
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            return None
        raise KeyringLost(f"the keys in {directory} cannot be read: {error.strerror}") from None
    try:
        return Keyring(keys) if keys else None
    except ValueError as error:
        raise KeyringLost(f"the keys in {directory} cannot be used: {error}") from None


def _keys_of(file: Path) -> Iterable[SealingKey]:
    with file.open("rb") as content:
        text = content.read(_LARGEST_FILE)
    try:
        return parse_keys(text.decode())
    except ValueError:
        raise KeyringLost(
            f"{file} is not a sealing key: write 96 random bytes in base64, or a keyring, into each file"
        ) from None
