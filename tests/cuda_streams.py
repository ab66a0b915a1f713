"""Stands in for `torch.cuda` where there is no GPU: streams that run when they are told to, and in CUDA's order.

Work is given to a stream and runs no sooner than `Stream.run_to`, or an event that is waited for, asks for it; what the
stream waits for runs first. So a test sees what a launch waits for and what it does not, and that nobody waited.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from itertools import count


class Stream:
    """In-order work. `given` counts what it was given, `ran` what has run."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.cuda_stream = next(driver.handles)
        self.given = self.ran = 0
        self._work: deque[Callable[[], None]] = deque()
        driver.streams[self.cuda_stream] = self

    def give(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        self.given += 1

    def wait_stream(self, other: Stream) -> None:
        self.driver.check()
        self.give(lambda so_far=other.given: other.run_to(so_far))

    def run_to(self, mark: int) -> None:
        while self.ran < mark:
            work = self._work.popleft()
            work()
            self.ran += 1

    def run(self) -> None:
        self.run_to(self.given)


class Event:
    def __init__(self, driver: Driver, enable_timing: bool) -> None:
        self.driver = driver
        self._has_time = enable_timing
        self._at: tuple[Stream, int] | None = None
        self.ms: float | None = None

    def record(self, stream: Stream) -> None:
        self.driver.check()
        stream.give(self._take_time)
        self._at = (stream, stream.given)

    def _take_time(self) -> None:
        self.ms = self.driver.ms

    def query(self) -> bool:
        self.driver.check()
        return self._at is None or self._at[0].ran >= self._at[1]

    def synchronize(self) -> None:
        self.driver.check()
        self.driver.synchronized += 1
        if self._at is not None:
            self._at[0].run_to(self._at[1])

    def elapsed_time(self, end: Event) -> float:
        self.driver.check()
        if not (self._has_time and end._has_time) or self.ms is None or end.ms is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return end.ms - self.ms


class Driver:
    """`compute` is the stream that the model runs on. `ms` is the time on the device, which work moves on."""

    def __init__(self) -> None:
        self.handles = count(0x1000)
        self.streams: dict[int, Stream] = {}
        self.compute = Stream(self)
        self.ms = 0.0
        self.synchronized = 0
        self.error: str | None = None  # what every call raises from now on

    def Stream(self) -> Stream:
        return Stream(self)

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self, enable_timing)

    def current_stream(self) -> Stream:
        return self.compute

    def check(self) -> None:
        if self.error is not None:
            raise RuntimeError(self.error)

    def take_launches(self, library: ctypes.CDLL) -> object:
        """Kernels built for the host run when their stream does; keep what this returns while they are used."""

        def enqueue(stream: int, work: int) -> None:
            self.streams[stream].give(lambda: library.run_work(ctypes.c_void_p(work)))

        hook = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(enqueue)
        library.set_enqueue(hook)
        return hook
