"""Whether a far store has a chunk: asked in the background, under the key that all engines share."""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from typing_extensions import override
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager

from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.offload.cores import leave_compute_cores

ADAPTER_PARAM = "lmcache_ext.adapter"
"""Key in a request's ``kv_transfer_params``: hex identity of its LoRA adapter, "" where unknown."""


class _Answers(queue.SimpleQueue[Any]):
    """The way of answers to the scheduler, which is told of each."""

    def __init__(self, told: Callable[[], None]) -> None:
        super().__init__()
        self._told = told

    @override
    def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self._told()


class Lookups(AsyncLookupManager):
    """vLLM's background existence checks, asked of our store; they know for how long each key waits."""

    def __init__(self, name: str, chunks: ChunkIO, answered: Callable[[], None]) -> None:
        """`answered` is called in the thread of the lookups, once a batch of answers can be taken."""
        self._chunks = chunks
        self._asked_at: dict[OffloadKey, float] = {}
        self._need_to_drain: bool  # vLLM's; said again for the type checker
        super().__init__(name)
        self._pending_results = _Answers(answered)

    def ask(self, keys: Sequence[OffloadKey], req_context: ReqContext, timeout_s: float) -> list[bool | None]:
        """Whether each chunk is there; None while that is not known, False once it was asked for so long."""
        now, req_id, states, asked_at = time.monotonic(), req_context.req_id, self._lookup_state, self._asked_at
        if self._need_to_drain:
            self.drain_results()
            self._need_to_drain = False
        answers: list[bool | None] = []
        for key in keys:
            state = states.get(key)
            known = state is not None and req_id in state.request_ids
            found: bool | None = state.result if known else self.lookup(key, req_context)
            if found is not None:
                asked_at.pop(key, None)
            elif now - asked_at.setdefault(key, now) >= timeout_s:
                found = False
            answers.append(found)
        return answers

    @override
    def flush(self) -> None:
        if self._lookup_batch or not self._pending_results.empty():
            super().flush()
        self._need_to_drain = True

    @override
    def cleanup(self, req_id: str) -> None:
        keys = self._req_keys.get(req_id, ())
        super().cleanup(req_id)
        for key in keys:
            state = self._lookup_state.get(key)
            if state is None or not state.request_ids:
                self._asked_at.pop(key, None)

    def stop(self, timeout_s: float | None) -> None:
        """`shutdown` that does not wait for a file system that has gone away; the thread is a daemon."""
        self._lookup_queue.put(None)
        self._thread.join(timeout_s)

    @override
    def _worker(self) -> None:
        leave_compute_cores()
        super()._worker()

    @override
    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        adapter = adapter_of(req_context)
        return self._chunks.present([far_key(key, adapter) for key in keys])


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
