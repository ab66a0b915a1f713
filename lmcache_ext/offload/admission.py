"""Which chunks are worth a far store: those that were used more than once lately.

Most prompts come once, and their chunks would only push out others. With `remote_min_uses: N` a chunk
travels when the Nth request within an hour has computed it or found it in host memory. Counting costs a dictionary of
bounded size; a chunk that was forgotten begins anew. What was written is offered again after ten minutes, for the
store may have lost it since, and is asked first.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

MAX_KEYS = 65536
WINDOW_S = 3600.0
WRITTEN_S = 600.0
_WRITTEN = -1


class Admission:
    """Counts the uses of chunks. One thread."""

    def __init__(
        self,
        *,
        max_keys: int = MAX_KEYS,
        window_s: float = WINDOW_S,
        written_s: float = WRITTEN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_keys = max_keys
        self._window_s = window_s
        self._written_s = written_s
        self._clock = clock
        self._uses: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()
        """Key -> uses, and when the first of them was (or when it was written); the least recently used first."""

    def __len__(self) -> int:
        return len(self._uses)

    def admits(self, key: Hashable, min_uses: int) -> bool:
        """Count a use; whether the chunk is to be written, because it has so many and was not written lately."""
        now = self._clock()
        uses, since = self._uses.pop(key, (0, now))
        if uses == _WRITTEN and now - since > self._written_s:
            uses, since = min_uses, now
        elif now - since > self._window_s:
            uses, since = 0, now
        if uses != _WRITTEN:
            uses += 1
        self._uses[key] = (uses, since)
        if len(self._uses) > self._max_keys:
            self._uses.popitem(last=False)
        return uses >= min_uses

    def written(self, keys: Iterable[Hashable]) -> None:
        """These are in the store now: they need not be offered to it again for a while."""
        now = self._clock()
        for key in keys:
            if key in self._uses:
                self._uses[key] = (_WRITTEN, now)
