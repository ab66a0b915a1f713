"""Page copies one way on a CUDA stream of their own: a step's are one launch, and events say when it is done.

A step's copies are submitted one by one and begun together: one launch for each cache group, whatever the number of
requests. Nothing here waits for the GPU but `wait`.

Thread:  one, the worker's.
Order:   a launch comes behind all that the thread's current stream had been given when it began, and behind earlier
         launches: a gather reads what the model wrote until then, a scatter writes where it no longer does. Nothing
         holds the current stream back: whoever uses the bytes of a copy asks `finished` first.
Owner:   the caller keeps tensors and rows alive until all has finished; tables and numbers are read within `begin`.
Failure: a copy that is refused, or whose launch or GPU fails, has finished without bytes; not before the GPU is through
         with what was launched for it, as until then blocks or rows of it may still be written.

None of it has met a GPU yet: the tests run it on stand-ins of streams and events (`tests/cuda_streams.py`), and
`benchmarks/gpu/launches.py` is what runs it on a real one.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from lmcache_ext.ops.table import Part

logger = logging.getLogger("vllm.lmcache_ext.ops.launches_cuda")

Copy = Callable[[Part, int], int]
"""Enqueues the copy of blocks on a ``cudaStream_t`` and returns its bytes, as `pages_cuda.copy_pages` does."""


class CudaStream(Protocol):
    """What we ask of ``torch.cuda.Stream``."""

    @property
    def cuda_stream(self) -> int: ...

    def wait_stream(self, stream: Any, /) -> None: ...  # noqa: ANN401  another of the driver's streams


class CudaEvent(Protocol):
    """What we ask of ``torch.cuda.Event``; each of these raises RuntimeError once the GPU has failed."""

    def record(self, stream: Any, /) -> None: ...  # noqa: ANN401

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any, /) -> float: ...  # noqa: ANN401


class Driver(Protocol):
    """What we ask of ``torch.cuda``."""

    @property
    def Stream(self) -> Callable[[], CudaStream]: ...

    @property
    def Event(self) -> Callable[[bool], CudaEvent]: ...

    @property
    def current_stream(self) -> Callable[[], CudaStream]: ...


class Finished(NamedTuple):
    """A copy that is over. `seconds` is its share, by bytes, of the time that its launch took."""

    job_id: int
    num_bytes: int | None  # None: it failed
    seconds: float


@dataclass(slots=True)
class _Launch:
    copied: Mapping[int, int | None]  # bytes of each job, None of one that failed
    begin: CudaEvent
    end: CudaEvent

    def fail(self) -> None:
        self.copied = dict.fromkeys(self.copied)


class Launches:
    """See the module's docstring. `copy` knows the way and the rows."""

    def __init__(self, copy: Copy, driver: Driver) -> None:
        self._copy = copy
        self._driver = driver
        self._stream = driver.Stream()
        self._submitted: dict[int, Sequence[Part]] = {}
        self._running: deque[_Launch] = deque()
        self._told: set[str] = set()

    def submit(self, job_id: int, parts: Iterable[Part]) -> None:
        """Take a copy into the next launch; one whose `parts` raise ValueError or IndexError has failed."""
        try:
            self._submitted[job_id] = tuple(parts)
        except (ValueError, IndexError):
            self._tell("A copy of KV pages was refused")
            self._running.append(_Launch({job_id: None}, self._driver.Event(True), self._driver.Event(True)))

    def begin(self) -> None:
        """Launch what was submitted since the last time, if anything was."""
        jobs, self._submitted = self._submitted, {}
        if not jobs:
            return
        launch = _Launch(dict.fromkeys(jobs), self._driver.Event(True), self._driver.Event(True))
        try:
            self._stream.wait_stream(self._driver.current_stream())
            launch.begin.record(self._stream)
            launch.copied = self._enqueue(jobs)
            launch.end.record(self._stream)
        except RuntimeError:
            self._tell("The GPU takes no work: %d copies of KV pages failed", len(jobs))
            launch.fail()
        self._running.append(launch)

    def is_busy(self) -> bool:
        """Whether anything was submitted or begun that `finished` has not returned yet."""
        return bool(self._submitted or self._running)

    def finished(self) -> list[Finished]:
        """Copies that are over and were not returned yet, launch after launch; never waits."""
        over: list[Finished] = []
        while self._running and (seconds := self._seconds(self._running[0])) is not None:
            copied = self._running.popleft().copied
            total = sum(num_bytes or 0 for num_bytes in copied.values()) or 1
            over += [Finished(job_id, size, seconds * (size or 0) / total) for job_id, size in copied.items()]
        return over

    def wait(self, job_ids: set[int] | None = None) -> None:
        """Until none of `job_ids`, or nothing at all, is being copied; `finished` then returns them."""
        self.begin()
        for launch in self._running:
            if job_ids is None or not job_ids.isdisjoint(launch.copied):
                try:
                    launch.end.synchronize()
                except RuntimeError:
                    self._tell("The GPU failed while it copied KV pages")
                    launch.fail()

    def _seconds(self, launch: _Launch) -> float | None:
        """What it took, once it is over; None until then."""
        try:
            if not launch.end.query():
                return None
            if all(num_bytes is None for num_bytes in launch.copied.values()):
                return 0.0  # its events may never have been recorded
            return launch.begin.elapsed_time(launch.end) / 1e3
        except RuntimeError:  # of whatever ran on this GPU last: it runs nothing any more
            self._tell("The GPU failed while it copied KV pages")
            launch.fail()
            return 0.0

    def _tell(self, message: str, *args: object) -> None:
        """Once, with its traceback: what fails in one step may fail in every other, and each failure is counted."""
        if message not in self._told:
            self._told.add(message)
            logger.exception(message, *args)

    def _enqueue(self, jobs: Mapping[int, Sequence[Part]]) -> dict[int, int | None]:
        """One launch of all jobs for each table; where one of them is refused, of each job by itself."""
        try:
            return self._launch(jobs)
        except RuntimeError:
            self._tell("The launch of %d copies of KV pages failed", len(jobs))
        except ValueError:  # names a block or a row that is not there; nobody else's copy is lost to it
            if len(jobs) > 1:
                alone = [self._enqueue({job_id: parts}) for job_id, parts in jobs.items()]
                return {job_id: copied for each in alone for job_id, copied in each.items()}
            self._tell("A copy of KV pages was refused")
        return dict.fromkeys(jobs)

    def _launch(self, jobs: Mapping[int, Sequence[Part]]) -> dict[int, int | None]:
        copied = dict.fromkeys(jobs, 0)
        by_table: dict[int, list[tuple[int, Part]]] = {}
        for job_id, parts in jobs.items():
            for part in parts:
                by_table.setdefault(id(part.table), []).append((job_id, part))
        for same in by_table.values():
            joined = _joined([part for _, part in same])
            num_bytes = self._copy(joined, self._stream.cuda_stream)
            for job_id, part in same:
                copied[job_id] += num_bytes * part.block_ids.size // joined.block_ids.size
        return dict(copied)


def _joined(parts: Sequence[Part]) -> Part:
    """Parts of one table as one."""
    if len(parts) == 1:
        return parts[0]
    block_ids, offsets = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[1:])
    return Part(parts[0].table, block_ids, offsets)
