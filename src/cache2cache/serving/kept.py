"""What later turns of chats start from: the caches of prompts that were read and fused lately, up to a budget in bytes.

A chat's next prompt begins with the last one, so what was computed for that is taken from here. The least recently used
are dropped first; one that a newer one begins with is dropped at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from ..kv import Read
from ..pair import Turn


class Kept:
    """Reads and turns by the model or pair that they are of. Threads may share it.

    Attributes:
        budget: bytes.
        nbytes: bytes in use.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._entries: OrderedDict[int, tuple[str, Read | Turn, int]] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def best(
        self, kind: str, ids: Sequence[int], positions: Sequence[int] | None = None
    ) -> tuple[Read | Turn | None, int]:
        """What says most about these tokens, and how many of them it knows."""
        with self._lock:
            found, most = None, 0
            for key, (of, entry, _) in reversed(self._entries.items()):
                if of == kind and (shared := _read(entry).shared(ids, positions)) > most:
                    found, most = key, shared
            if found is None:
                return None, 0
            self._entries.move_to_end(found)
            return self._entries[found][1], most

    def add(self, kind: str, entry: Read | Turn) -> None:
        """Keep a copy: what is given may be a view of a whole batch."""
        size = _nbytes(entry)
        if not 0 < size <= self.budget:
            return
        entry, read = _copied(entry), _read(entry)
        with self._lock:
            for key, (of, old, _) in list(self._entries.items()):
                if of == kind and read.shared(_read(old).ids, _read(old).positions) == len(_read(old).ids):
                    self._drop(key)
            self._count += 1
            self._entries[self._count] = (kind, entry, size)
            self.nbytes += size
            while self.nbytes > self.budget:
                self._drop(next(iter(self._entries)))

    def _drop(self, key: int) -> None:
        self.nbytes -= self._entries.pop(key)[2]


def _read(entry: Read | Turn) -> Read:
    """What the model that answers has read."""
    return entry.receiver if isinstance(entry, Turn) else entry


def _nbytes(entry: Read | Turn) -> int:
    if isinstance(entry, Read):
        return entry.kv.nbytes
    return entry.receiver.kv.nbytes + entry.fused.nbytes + sum(read.kv.nbytes for read in entry.sharers if read)


def _copied(entry: Read | Turn) -> Read | Turn:
    def copy(read: Read) -> Read:
        return replace(read, kv=read.kv.clone())

    if isinstance(entry, Read):
        return copy(entry)
    sharers = [copy(read) if read else None for read in entry.sharers]
    return replace(entry, receiver=copy(entry.receiver), fused=entry.fused.clone(), sharers=sharers)
