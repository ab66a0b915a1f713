"""One store behind a tier, with what is known of it, while anybody works on it.

A tier may be given another store while jobs of the old one run (`StoredTier.replace`). They finish on the
store that they began on, which is closed when the last of them has.
"""

from __future__ import annotations

import threading
from collections import Counter

from vllm.logger import init_logger

from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.offload.lookups import Lookups
from lmcache_ext.stores.guard import Guarded, only_failures

logger = init_logger("vllm.lmcache_ext.offload.backing")


class Backing:
    """A store, its verified reads and writes, and its background lookups.

    Threads:  `hold` in the scheduler's, `release` in any, `retire` once, in the scheduler's.
    Owner:    of all three; `retire` closes them in a thread of its own, which may wait for ever on a file
              system that has gone away, and so is a daemon.
    """

    def __init__(self, store: Guarded, chunks: ChunkIO, lookups: Lookups) -> None:
        self.store = store
        self.chunks = chunks
        self.lookups = lookups
        self.closed = False
        self._changed = threading.Condition()
        self._holders = 0
        self._failures: Counter[str] = Counter()

    def hold(self) -> None:
        """One more job works on the store."""
        with self._changed:
            self._holders += 1

    def release(self) -> None:
        """A job has ended."""
        with self._changed:
            self._holders -= 1
            self._changed.notify_all()

    def retire(self) -> None:
        """Close the store when nobody works on it any more; returns at once."""
        threading.Thread(target=self._close, name=f"lmcache_ext-retire-{self.store.name}", daemon=True).start()

    def take_failures(self) -> dict[str, int]:
        """Failed operations of the store by cause, since the last call."""
        found = {}
        for cause, total in only_failures(self.store.counters()).items():
            increase = total - self._failures[cause]
            if increase:
                self._failures[cause] = total
                found[cause] = increase
        return found

    def _close(self) -> None:
        self.lookups.stop(None)
        with self._changed:
            self._changed.wait_for(lambda: self._holders == 0)
        self.store.close()
        self.closed = True
        logger.info("%s: closed, another store has taken its place or it was removed", self.store.name)
