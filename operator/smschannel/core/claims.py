"""Which channel holds which number: an index of the records. No I/O.

The API server decides, since creating a record is the claim. The index only saves calls: it may be out of date, and
every write of a record has a precondition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from smschannel.core.record import Key, Record


class Claims:
    """Records without their contents, by number and by channel.

    `on_free` is called with a number that becomes free, `on_change` with the key of a record that another client wrote,
    and `on_account` with namespace and account when the namespace gets its first record of the account.
    """

    def __init__(self) -> None:
        self.on_free: Callable[[str], object] = lambda number_sid: None
        self.on_change: Callable[[Key], object] = lambda key: None
        self.on_account: Callable[[str, str], object] = lambda namespace, account_sid: None
        self._accounts: Counter[tuple[str, str]] = Counter()  # records of each namespace and account
        self._by_number: dict[str, Record] = {}
        self._by_key: dict[Key, set[str]] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Record]:
        return iter(tuple(self._by_number.values()))

    def holder(self, number_sid: str) -> Record | None:
        """Return the record of a number; None if no channel holds it."""
        return self._by_number.get(number_sid)

    def of(self, key: Key) -> tuple[Record, ...]:
        """Return the records of this name: of its current channel and of deleted ones."""
        return tuple(self._by_number[each] for each in sorted(self._by_key.get(key, ())))

    def has_account(self, namespace: str, account_sid: str) -> bool:
        """Return whether a channel of the namespace holds a number of the account: it has working credentials."""
        return (namespace, account_sid) in self._accounts

    def put(self, record: Record) -> None:
        """Add or replace a record that this operator wrote."""
        account = record.namespace, record.account_sid
        is_new = account not in self._accounts
        self._unlink(record.number_sid)
        self._by_number[record.number_sid] = replace(record, contents=None)
        self._by_key.setdefault(record.key, set()).add(record.number_sid)
        self._accounts[account] += 1
        if is_new:
            self.on_account(*account)

    def observe(self, record: Record) -> None:
        """Add or replace a record that was read. If its version is another than the indexed one, call `on_change`."""
        indexed = self._by_number.get(record.number_sid)
        self.put(record)
        if indexed and indexed.version and indexed.version != record.version:
            for key in {indexed.key, record.key}:
                self.on_change(key)

    def remove(self, number_sid: str) -> None:
        """Remove the record of a number, if it is indexed, and call `on_free`."""
        if self._unlink(number_sid):
            self.on_free(number_sid)

    def update_from_list(self, listed: Iterable[Record], before: Iterable[Record]) -> set[Key]:
        """Update the index from a list of all records; `before` is the index when the list began.

        What changed in the index since then is newer than the list, and stays. Return the keys whose records differ.
        """
        unlisted = {each.number_sid: each for each in before}
        changed: set[Key] = set()
        for record in listed:
            indexed = unlisted.pop(record.number_sid, None)
            if self._by_number.get(record.number_sid) == indexed and record != indexed:
                self.put(record)
                changed |= {each.key for each in (indexed, record) if each}
        for number_sid, indexed in unlisted.items():
            if self._by_number.get(number_sid) == indexed:
                self.remove(number_sid)
                changed.add(indexed.key)
        return changed

    def _unlink(self, number_sid: str) -> bool:
        indexed = self._by_number.pop(number_sid, None)
        if indexed is None:
            return False
        numbers = self._by_key[indexed.key]
        numbers.discard(number_sid)
        if not numbers:
            del self._by_key[indexed.key]
        account = indexed.namespace, indexed.account_sid
        self._accounts[account] -= 1
        if not self._accounts[account]:
            del self._accounts[account]
        return True


def is_swap(
    key: Key,
    *,
    awaited: Callable[[Key], str | None],
    holder: Callable[[str], Key | None],
    first_waiter: Callable[[str], Key | None],
) -> bool:
    """Return whether `key` is part of a circle of channels, each waiting for the number that the next one holds.

    Such channels would wait for each other forever. A circle only counts if each of its channels is the first waiter of
    the number that it waits for. `awaited` returns the number that a channel waits for, `holder` the existing channel
    that holds a number, `first_waiter` the oldest channel that waits for a number.
    """
    path = [key]
    while (number := awaited(path[-1])) and (after := holder(number)) != key:
        if after is None or after in path:
            return False
        path.append(after)
    # A circle of one waits for the number of a deleted channel of its name: restoring others does not free that.
    return bool(number) and len(path) > 1 and all(first_waiter(awaited(each) or "") == each for each in path)
