"""Which channel holds which number: an index of the records. No I/O.

The API server decides, since creating a record is the claim. The index only saves asking it: it may be out of date,
and every write has a precondition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from smschannel.core.record import Key, Record


class Claims:
    """Records without their contents, by number and by channel.

    `on_free` is called with a number that becomes free, `on_change` with the key of a record that somebody else wrote.
    """

    def __init__(self) -> None:
        self.on_free: Callable[[str], object] = lambda number_sid: None
        self.on_change: Callable[[Key], object] = lambda key: None
        self._by_number: dict[str, Record] = {}
        self._by_key: dict[Key, set[str]] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Record]:
        return iter(tuple(self._by_number.values()))

    def holder(self, number_sid: str) -> Record | None:
        return self._by_number.get(number_sid)

    def of(self, key: Key) -> tuple[Record, ...]:
        """What this name's channel holds, and what earlier channels of this name left."""
        return tuple(self._by_number[each] for each in sorted(self._by_key.get(key, ())))

    def put(self, record: Record) -> None:
        self._unlink(record.number_sid)
        self._by_number[record.number_sid] = replace(record, contents=None)
        self._by_key.setdefault(record.key, set()).add(record.number_sid)

    def observe(self, record: Record) -> None:
        """Take in a record that was read. If it is not the version known here, its channel is to be reconciled."""
        known = self._by_number.get(record.number_sid)
        self.put(record)
        if known and known.version and known.version != record.version:
            for key in {known.key, record.key}:
                self.on_change(key)

    def remove(self, number_sid: str) -> None:
        if self._unlink(number_sid):
            self.on_free(number_sid)

    def update_from_list(self, listed: Iterable[Record], before: Iterable[Record]) -> set[Key]:
        """Bring the index to what a list of all records says; `before` is the index when the list began.

        What changed here since then is newer than the list, and stays. Returns the keys whose records differ.
        """
        unlisted = {each.number_sid: each for each in before}
        changed: set[Key] = set()
        for record in listed:
            known = unlisted.pop(record.number_sid, None)
            if self._by_number.get(record.number_sid) == known and record != known:
                self.put(record)
                changed |= {each.key for each in (known, record) if each}
        for number_sid, known in unlisted.items():
            if self._by_number.get(number_sid) == known:
                self.remove(number_sid)
                changed.add(known.key)
        return changed

    def _unlink(self, number_sid: str) -> bool:
        known = self._by_number.pop(number_sid, None)
        if known is None:
            return False
        numbers = self._by_key[known.key]
        numbers.discard(number_sid)
        if not numbers:
            del self._by_key[known.key]
        return True


def is_swap(
    key: Key,
    *,
    awaited: Callable[[Key], str | None],
    holder: Callable[[str], Key | None],
    first_waiter: Callable[[str], Key | None],
) -> bool:
    """Whether `key` waits for a number whose holder waits for one of `key`'s, perhaps by way of others.

    Such channels would wait for each other forever. It only counts if each of them would get the number that it waits
    for: none may have an older waiter from outside before it. `awaited` gives the number a channel waits for, `holder`
    the living channel that holds a number.
    """
    path = [key]
    while (number := awaited(path[-1])) and (after := holder(number)) != key:
        if after is None or after in path:
            return False
        path.append(after)
    # A single channel waits for what an earlier one of its name left: restoring other numbers does not free that.
    return bool(number) and len(path) > 1 and all(first_waiter(awaited(each) or "") == each for each in path)
