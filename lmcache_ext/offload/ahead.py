"""Reading ahead: chunks that a lookup finds in a far store are read at once, into rows that were lent for it.

Otherwise the answer goes to the scheduler first, which gives rows to the chunks and has them fetched at the end of a
step: that is one more step for who waits, and one more lookup.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm.v1.kv_offload.base import OffloadKey
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.offload.lookups import Question, adapter_of, far_key
from lmcache_ext.stores.jobs import JobPool


@dataclass(slots=True, eq=False)
class Loan(Question):
    """A question with rows, and what has become of it."""

    release: Callable[[], None] = lambda: None
    """Lets go of the store; called once, when it is not touched any more."""
    fetch_timeout_s: float = 0.0
    found: list[bool] = field(default_factory=list)
    """Whether each chunk is there; of those that were read, whether all of it came."""
    num_read: int = 0
    """So many of the first chunks were read."""
    seconds: float = 0.0
    """How long that took."""
    read: dict[OffloadKey, ChunkStatus] = field(default_factory=dict)
    """The chunks that are in their rows now, which nothing pins."""
    tasks_left: int = 0

    @property
    def is_late(self) -> bool:
        """Whether reading took longer than anybody waited."""
        return self.seconds > self.fetch_timeout_s

    def collect(self) -> None:
        """Name what was read, once all of it is there."""
        first = slice(self.num_read)
        for key, row, is_read in zip(self.keys[first], self.rows[first], self.found[first], strict=True):
            if is_read:
                chunk = self.read[key] = ChunkStatus(row)
                chunk.ref_cnt = 0


class ReadAhead:
    """The loans of one tier.

    Threads:  `begin` in threads of lookups, `_read` in those of the pool, everything else in the scheduler's.
    Order:    `lend`, then `begin` once; loans come back in any order, each of them once, whatever happens.
    Owner:    of a loan's rows from `lend` until `take` gives them back.
    Failure:  what cannot be read is not there.
    """

    def __init__(
        self, pool: JobPool, views: Callable[[Sequence[int]], list[memoryview]], told: Callable[[], None], per_task: int
    ) -> None:
        """`views` gives rows to write to, `told` is called once a loan can be taken; tasks are of so many chunks."""
        self._pool = pool
        self._views = views
        self._told = told
        self._per_task = per_task
        self._lock = threading.Lock()
        self._back: queue.SimpleQueue[Loan] = queue.SimpleQueue()
        self._num_lent = 0
        self._closed = False

    def lend(self) -> None:
        """One more loan is to come back."""
        self._num_lent += 1

    def begin(self, chunks: ChunkIO, question: Question, found: Sequence[bool]) -> None:
        """Read the chunks up to the first that is not there: nobody needs what is behind it.

        Where this raises nothing was begun, and it is to be called again with nothing found.
        """
        assert isinstance(question, Loan)
        loan, refused = question, []
        loan.found = list(found)
        num_wanted = min(loan.found.index(False) if False in loan.found else len(loan.found), len(loan.rows))
        with self._lock:
            if num_wanted and not self._closed:
                refused = self._submit(chunks, loan, num_wanted)
        for part in refused:
            self._end(loan, part, ())
        if not loan.num_read:
            self._give_back(loan)

    def take(self) -> list[Loan]:
        """Those that are back."""
        loans = []
        while not self._back.empty():
            loans.append(self._back.get_nowait())
        self._num_lent -= len(loans)
        return loans

    def drain(self) -> None:
        """Wait until every loan is back; they are still to be taken."""
        for loan in [self._back.get() for _ in range(self._num_lent)]:
            self._back.put(loan)

    def close(self) -> None:
        """No row is touched that is not being read into already."""
        with self._lock:
            self._closed = True

    def _submit(self, chunks: ChunkIO, loan: Loan, num_wanted: int) -> list[slice]:
        """Queue reads; returns those that the pool refused."""
        per_task = 1 if chunks.decodes else self._per_task  # one is decoded while the next arrives
        parts = [slice(begin, min(begin + per_task, num_wanted)) for begin in range(0, num_wanted, per_task)]
        views = [self._views(loan.rows[part]) for part in parts]
        now = time.monotonic()
        loan.num_read, loan.tasks_left, loan.seconds, loan.due = (
            num_wanted,
            len(parts),
            -now,
            now + loan.fetch_timeout_s,
        )
        return [
            part
            for part, rows in zip(parts, views, strict=True)
            if not self._pool.submit(self._read, chunks, loan, part, rows, urgent=True)
        ]

    def _read(self, chunks: ChunkIO, loan: Loan, part: slice, rows: list[memoryview]) -> None:
        good: Sequence[bool] = ()
        try:
            adapter = adapter_of(loan.req_context)
            good = chunks.fetch([far_key(key, adapter) for key in loan.keys[part]], rows)
        finally:
            rows.clear()  # the pool may hold on to its arguments for longer than `drain` waits
            self._end(loan, part, good)

    def _end(self, loan: Loan, part: slice, good: Sequence[bool]) -> None:
        with self._lock:
            loan.found[part] = good or [False] * (part.stop - part.start)
            loan.tasks_left -= 1
            if loan.tasks_left:
                return
        loan.seconds += time.monotonic()
        self._give_back(loan)

    def _give_back(self, loan: Loan) -> None:
        loan.collect()  # here, where nobody waits for this thread but the one that waits for the chunks
        loan.release()
        self._back.put(loan)
        self._told()
