"""Whether a far store has a chunk: asked in the background, under the key that all engines share."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import OffloadKey, ReqContext

from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.offload.cores import leave_compute_cores

logger = init_logger("vllm.lmcache_ext.offload.lookups")

ADAPTER_PARAM = "lmcache_ext.adapter"
"""Key in a request's ``kv_transfer_params``: hex identity of its LoRA adapter, "" where unknown."""


@dataclass(slots=True, eq=False)
class Question:
    """Chunks that a request asks a store for, all at once, in the order of its prompt, and the answer to it."""

    keys: list[OffloadKey]
    req_context: ReqContext
    due: float
    """When nobody waits for the answer any more; seconds of `time.monotonic`."""
    rows: list[int] = field(default_factory=list)
    """Rows of host memory lent for the first of the chunks, into which they are read at once (`ahead.ReadAhead`)."""
    answer: dict[OffloadKey, bool] = field(default_factory=dict)
    """Whether each chunk is there; of those of which it is known."""
    num_holders: int = 1
    """Requests that wanted to know of one of the chunks, and live."""


_Answer = tuple[Question, Sequence[bool]]
_Begin = Callable[[ChunkIO, Question, Sequence[bool]], None]


class Lookups:
    """Existence checks of one store, for whole prompts at once.

    Threads:  `_run` in a thread of its own, everything else in the scheduler's.
    Order:    `ask` or `ask_for`, then `flush` at the end of the step, which sends what was asked; requests that ask
              for the same chunk share the answer.
    Owner:    an answer is kept while a request that asked for it lives, and is not asked for again.
    Failure:  a store that fails has nothing; a chunk that was asked for too long ago is not there.

    vLLM's `AsyncLookupManager` does the same for one chunk at a time, which takes three times as long.
    """

    def __init__(self, name: str, chunks: ChunkIO, answered: Callable[[], None], begin: _Begin) -> None:
        """`answered` is called in the thread of the lookups, once a batch of answers can be taken.

        `begin` is, too, with what the store has for a question with rows, which is answered by who takes it back.
        """
        self._chunks = chunks
        self._answered = answered
        self._begin = begin
        self._questions: dict[OffloadKey, Question] = {}
        self._held: dict[str, list[Question]] = {}
        self._to_send: list[Question] = []
        self._sent: queue.SimpleQueue[list[Question] | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[list[_Answer]] = queue.SimpleQueue()
        self._num_unanswered = 0
        self._thread = threading.Thread(target=self._run, name=f"lmcache_ext-lookup-{name}", daemon=True)
        self._thread.start()

    def ask(self, keys: Sequence[OffloadKey], req_context: ReqContext, timeout_s: float) -> list[bool | None]:
        """Whether each chunk is there; None while that is not known, False once it was asked for so long."""
        if self._num_unanswered:
            self._take_answers()
        questions = list(map(self._questions.get, keys))
        if None in questions:
            new = [key for key, question in zip(keys, questions, strict=True) if question is None]
            self.ask_for(Question(new, req_context, time.monotonic() + timeout_s))
            questions = list(map(self._questions.get, keys))
        asked = [question for question in questions if question is not None]
        self._hold(asked, req_context.req_id)
        found = [question.answer.get(key) for question, key in zip(asked, keys, strict=True)]
        if None in found:
            now = time.monotonic()
            return [
                False if answer is None and question.due <= now else answer
                for question, answer in zip(asked, found, strict=True)
            ]
        return found

    def _hold(self, questions: Iterable[Question], req_id: str) -> None:
        held = self._held.setdefault(req_id, [])
        for question in set(questions).difference(held):
            question.num_holders += 1
            held.append(question)

    def ask_for(self, question: Question) -> None:
        """Ask for chunks of which nobody has asked for any (`is_new`)."""
        self._held.setdefault(question.req_context.req_id, []).append(question)
        self._questions.update(dict.fromkeys(question.keys, question))
        self._to_send.append(question)

    def is_new(self, keys: Sequence[OffloadKey]) -> bool:
        """Whether nothing is known of any chunk, and nobody is asking."""
        return self._questions.keys().isdisjoint(keys)

    def verdict(self, key: OffloadKey) -> str:
        """What is known of a chunk: has, miss, slow (asked, no answer), not asked."""
        if (question := self._questions.get(key)) is None:
            return "not asked"
        return {True: "has", False: "miss", None: "slow"}[question.answer.get(key)]

    def mark_miss(self, keys: Iterable[OffloadKey]) -> None:
        """What was said to be there could not be fetched: it is not asked for again by those who wait."""
        for key in keys:
            if (question := self._questions.get(key)) is not None:
                question.answer[key] = False

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
        for question in self._held.pop(req_id, ()):
            question.num_holders -= 1
            if not question.num_holders:
                for key in question.keys:
                    del self._questions[key]

    def stop(self, timeout_s: float | None) -> None:
        """End the thread, and wait for it so long; it is a daemon, for a file system may have gone away."""
        self._sent.put(None)
        self._thread.join(timeout_s)

    def _take_answers(self) -> None:
        while not self._arrived.empty():
            self._num_unanswered -= 1
            for question, found in self._arrived.get_nowait():
                settle(question, found)

    def _run(self) -> None:
        """Top of a thread."""
        leave_compute_cores()
        while (questions := self._sent.get()) is not None:
            answers: list[_Answer] = []
            for question in questions:
                try:
                    self._answer(question, self._look(question), answers)
                except Exception:  # the top of this thread: it lives, and everybody gets an answer
                    logger.exception("A lookup of %d chunks failed", len(question.keys))
                    self._answer(question, [False] * len(question.keys), answers)
            self._arrived.put(answers)
            if answers:
                self._answered()

    def _answer(self, question: Question, found: Sequence[bool], answers: list[_Answer]) -> None:
        """To who asked, or first to who reads what is there."""
        if question.rows:
            self._begin(self._chunks, question, found)
        else:
            answers.append((question, found))

    def _look(self, question: Question) -> Sequence[bool]:
        adapter = adapter_of(question.req_context)
        return self._chunks.present([far_key(key, adapter) for key in question.keys])


def settle(question: Question, found: Sequence[bool]) -> None:
    """Answer a question, but for what a fetch has judged since."""
    question.answer = dict(zip(question.keys, found, strict=True)) | question.answer


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
