"""Whether a far store has a chunk: asked in the background, under the key that all engines share."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import OffloadKey, ReqContext

from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.offload.cores import leave_compute_cores

logger = init_logger("vllm.lmcache_ext.offload.lookups")

ADAPTER_PARAM = "lmcache_ext.adapter"
"""Key in a request's ``kv_transfer_params``: hex identity of its LoRA adapter, "" where unknown."""


@dataclass(frozen=True, slots=True)
class _Question:
    """Keys that one request asks for, all at once."""

    keys: list[OffloadKey]
    req_context: ReqContext


_Answer = tuple[list[OffloadKey], Sequence[bool]]


class Lookups:
    """Existence checks of one store, for whole prompts at once.

    Threads:  `_run` in a thread of its own, everything else in the scheduler's.
    Order:    `ask`, then `flush` at the end of the step, which sends what was asked; requests that ask for the same
              chunk share the answer.
    Owner:    an answer is kept while a request that asked for it lives, and is not asked for again.
    Failure:  a store that fails has nothing; a chunk that was asked for too long ago is not there.

    vLLM's `AsyncLookupManager` does the same for one chunk at a time, which takes three times as long.
    """

    def __init__(self, name: str, chunks: ChunkIO, answered: Callable[[], None]) -> None:
        """`answered` is called in the thread of the lookups, once a batch of answers can be taken."""
        self._chunks = chunks
        self._answered = answered
        self._known: dict[OffloadKey, bool | None] = {}  # None: asked, no answer yet
        self._asked_at: dict[OffloadKey, float] = {}  # of those without an answer
        self._keys_of: dict[str, set[OffloadKey]] = {}
        self._num_requests: Counter[OffloadKey] = Counter()
        self._to_send: list[_Question] = []
        self._sent: queue.SimpleQueue[list[_Question] | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[list[_Answer]] = queue.SimpleQueue()
        self._num_unanswered = 0
        self._thread = threading.Thread(target=self._run, name=f"lmcache_ext-lookup-{name}", daemon=True)
        self._thread.start()

    def ask(self, keys: Sequence[OffloadKey], req_context: ReqContext, timeout_s: float) -> list[bool | None]:
        """Whether each chunk is there; None while that is not known, False once it was asked for so long."""
        self._take_answers()
        own = self._keys_of.setdefault(req_context.req_id, set())
        new = [key for key in keys if key not in own]
        if new:
            own.update(new)
            self._num_requests.update(new)
            self._ask_store([key for key in new if key not in self._known], req_context)
        known = self._known
        found = [known[key] for key in keys]
        if None in found:
            overdue = time.monotonic() - timeout_s
            asked_at = self._asked_at
            return [
                False if answer is None and asked_at[key] <= overdue else answer
                for key, answer in zip(keys, found, strict=True)
            ]
        return found

    def _ask_store(self, keys: list[OffloadKey], req_context: ReqContext) -> None:
        if not keys:
            return
        self._known.update(dict.fromkeys(keys))
        self._asked_at.update(dict.fromkeys(keys, time.monotonic()))
        self._to_send.append(_Question(keys, req_context))

    def verdict(self, key: OffloadKey) -> str:
        """What is known of a chunk: has, miss, slow (asked, no answer), not asked."""
        if key not in self._known:
            return "not asked"
        return {True: "has", False: "miss", None: "slow"}[self._known[key]]

    def mark_miss(self, keys: Iterable[OffloadKey]) -> None:
        """What was said to be there could not be fetched: it is not asked for again by those who wait."""
        for key in keys:
            if key in self._known:
                self._known[key] = False
                self._asked_at.pop(key, None)

    @property
    def num_unanswered(self) -> int:
        """Batches that were sent and whose answers were not taken yet."""
        return self._num_unanswered

    def flush(self) -> None:
        """Send what was asked in this step, and take what has been answered."""
        if self._num_unanswered:
            self._take_answers()
        if self._to_send:
            self._num_unanswered += 1
            self._sent.put(self._to_send)
            self._to_send = []

    def cleanup(self, req_id: str) -> None:
        """The request is gone; what nobody else asked for is forgotten."""
        counts = self._num_requests
        for key in self._keys_of.pop(req_id, ()):
            counts[key] -= 1
            if not counts[key]:
                del counts[key], self._known[key]
                self._asked_at.pop(key, None)

    def stop(self, timeout_s: float | None) -> None:
        """End the thread, and wait for it so long; it is a daemon, for a file system may have gone away."""
        self._sent.put(None)
        self._thread.join(timeout_s)

    def _take_answers(self) -> None:
        known, asked_at = self._known, self._asked_at
        while not self._arrived.empty():
            self._num_unanswered -= 1
            for keys, found in self._arrived.get_nowait():
                for key, is_there in zip(keys, found, strict=True):
                    if known.get(key, is_there) is None:  # else forgotten, or judged by a fetch since
                        known[key] = is_there
                        del asked_at[key]

    def _run(self) -> None:
        """Top of a thread."""
        leave_compute_cores()
        while (questions := self._sent.get()) is not None:
            try:
                answers = [(question.keys, self._look(question)) for question in questions]
            except Exception:  # the top of this thread: it lives, and everybody gets an answer
                logger.exception("Lookups of %d requests failed", len(questions))
                answers = [(question.keys, [False] * len(question.keys)) for question in questions]
            self._arrived.put(answers)
            self._answered()

    def _look(self, question: _Question) -> Sequence[bool]:
        adapter = adapter_of(question.req_context)
        return self._chunks.present([far_key(key, adapter) for key in question.keys])


def adapter_of(req_context: ReqContext) -> str | None:
    """Hex identity of the request's LoRA adapter; None without one; "" where it has none we trust."""
    params = req_context.kv_transfer_params
    return params.get(ADAPTER_PARAM) if params else None


def far_key(key: OffloadKey, adapter: str | None) -> bytes:
    """The key outside this engine: vLLM hashes an adapter's name, we add what is in it."""
    plain = bytes(key)
    if adapter is None:
        return plain
    return hashlib.blake2b(plain[:-4] + bytes.fromhex(adapter), digest_size=32).digest() + plain[-4:]
