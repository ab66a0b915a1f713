"""Memory before disk, as one cache with names; what the connections of a server call.

All methods run on the event loop; the disk is touched on a few threads of its own. What can be answered
from memory is answered without waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lmcache_ext.daemons.lm_disk import Disk
from lmcache_ext.daemons.lm_memory import Block, Memory
from lmcache_ext.errors import StoreError
from lmcache_ext.stores.base import NAMESPACE_BYTES
from lmcache_ext.wire import lm
from lmcache_ext.wire.names import key_of

logger = logging.getLogger("lmcache_ext.daemons.lmserver")

T = TypeVar("T")

NUM_DISK_THREADS = 4
MAX_NAMESPACES = 4096  # an answer has room for 20,000


class Cache:
    """Objects by name.

    Threads:  the event loop's.
    Order:    a put is visible when `commit` returned, and survives a crash of the server when `keep` returned.
    Owner:    of memory, disk and the disk's threads; blocks as in `Memory`.
    Failure:  a failing disk is a miss, a counter, and one log line when it begins and one when it ends to fail.
    """

    def __init__(self, memory: Memory, disk: Disk | None) -> None:
        self.memory = memory
        self.disk = disk
        self.counters: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(NUM_DISK_THREADS, thread_name_prefix="disk") if disk else None
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._disk_failed = False

    def commit(self, name: str, block: Block, meta: lm.Meta) -> None:
        """Make it visible; the caller still holds the block."""
        self._loading.pop(name, None)  # what is being loaded is older
        self.memory.commit(name, block, meta)

    async def keep(self, disk: Disk, name: str, block: Block) -> None:
        """Write a committed block to disk. One that cannot be written is still in memory."""
        await self._on_disk(lambda: disk.save(name, block.meta, block.view), "writes")

    async def fetch(self, disk: Disk, name: str) -> Block | None:
        """An object that memory does not have, held by the caller. Asked for twice, read once."""
        task = self._loading.get(name)
        if task is None:
            task = asyncio.create_task(self._load(disk, name))
            self._loading[name] = task
        await asyncio.shield(task)
        return self.memory.get(name)

    async def exists_on_disk(self, disk: Disk, names: Sequence[str]) -> list[bool]:
        """For each name; all False where the disk fails."""
        return await self._on_disk(lambda: disk.exists(names), "lookups") or [False] * len(names)

    def delete(self, names: Sequence[str]) -> list[bool]:
        """Remove from memory; which of them were there."""
        for name in names:
            self._loading.pop(name, None)
        return [self.memory.delete(name) for name in names]

    async def delete_on_disk(self, disk: Disk, names: Sequence[str]) -> list[bool]:
        """Remove from disk; which of them were there."""
        return await self._on_disk(lambda: disk.delete(names), "deletes") or [False] * len(names)

    async def names(self) -> list[str]:
        """All of them, sorted."""
        found = set(self.memory.names())
        if self.disk is not None:
            found.update(await self._on_disk(self.disk.names, "lists") or ())
        return sorted(found)

    async def namespaces(self) -> dict[str, int]:
        """How many objects there are of each namespace, as hex, of those with the most; "" is nobody's."""
        keys = map(key_of, await self.names())
        counts = Counter("" if key is None else key[:NAMESPACE_BYTES].hex() for key in keys)
        return dict(counts.most_common(MAX_NAMESPACES))

    def close(self) -> None:
        """After the last call: waits for the disk's threads."""
        if self._threads is not None:
            self._threads.shutdown()
        if self.disk is not None:
            self.disk.close()

    async def _load(self, disk: Disk, name: str) -> None:
        """Bring an object from disk into memory, unless it was put or deleted meanwhile."""
        task = asyncio.current_task()
        try:
            found = await self._on_disk(lambda: disk.find(name), "lookups")
            block = self.memory.claim(found.num_bytes) if found is not None else None
            if found is None or block is None:
                return
            try:
                is_good = await self._on_disk(lambda: disk.load(name, block.view), "reads")
                if is_good and self._loading.get(name) is task:
                    self.memory.commit(name, block, found.meta)
                elif is_good is False:
                    self.counters["disk_bad_objects"] += 1
            finally:
                self.memory.let_go(block)
        finally:
            if self._loading.get(name) is task:
                del self._loading[name]

    async def _on_disk(self, call: Callable[[], T], what: str) -> T | None:
        """Run on a disk thread; None where the disk failed."""
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except (StoreError, OSError) as error:
            self.counters[f"disk_failed_{what}"] += 1
            if not self._disk_failed:
                logger.warning("data directory: %s", error)
            self._disk_failed = True
            return None
        self.counters[f"disk_{what}"] += 1
        if self._disk_failed:
            logger.info("data directory: it works again")
        self._disk_failed = False
        return result
