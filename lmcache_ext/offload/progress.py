"""News from far tiers for the scheduler's thread, which has nothing to do until they come.

A step that computes nothing takes a millisecond or more of Python, with the interpreter's lock held: taken over and
over while a chunk is being fetched, it slows the very fetch it waits for, and notices its end late.
"""

from __future__ import annotations

import threading


class Progress:
    """Counts answers and ended jobs. `advance` from any thread, after what it tells of can be taken."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    @property
    def count(self) -> int:
        """Another number than before where a request that waits may be answered."""
        return self._count

    def advance(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait_beyond(self, seen: int, timeout_s: float) -> int:
        """The count as soon as it is not `seen`, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._count != seen, timeout_s)
            return self._count
