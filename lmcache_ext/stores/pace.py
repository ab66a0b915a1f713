"""Whether the other side of a connection keeps sending: a deadline that only bytes put off.

A fetch has a deadline for all of it, which must be long: many large rows over a slow link take seconds. A backend that
stops in the middle would hold a request for as long. So what is awaited is looked at in windows:

    |-- timeout_s --|-- timeout_s --|...     in each window so many bytes come as the floor asks for, or the answer
    ^ an answer is due                       is complete; otherwise it has stalled

Only waiting is judged: when a window is over, what has arrived meanwhile is still taken, so that a client which had no
CPU blames nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lmcache_ext.errors import StoreStalled

STALL_TIMEOUT_S = 0.5
MIN_BYTES_PER_S = 256 * 1024
"""Below both, any prompt is computed sooner than fetched; a link of 10 Mbit/s that four fetches share is above them."""

_LAST_LOOK_S = 0.001


@dataclass(frozen=True, slots=True)
class Floor:
    """How slow an answer may be: `min_bytes_per_s` over each `timeout_s`, and a byte at least."""

    timeout_s: float = STALL_TIMEOUT_S
    min_bytes_per_s: int = MIN_BYTES_PER_S

    @property
    def window_bytes(self) -> int:
        return max(1, int(self.min_bytes_per_s * self.timeout_s))


class Pace:
    """The windows of one call.

    Threads:  one at a time.
    Order:    `begin` before each answer; before each receive `wait_s`, after it `came` or, without bytes, `stalled`.
    Owner:    of nothing.
    Failure:  StoreStalled.
    """

    def __init__(self, floor: Floor, clock: Callable[[], float] = time.monotonic) -> None:
        self._floor = floor
        self._clock = clock
        self._num_came = 0
        self._is_over = False
        self.begin()

    def begin(self) -> None:
        """An answer is due from now on."""
        self._end = self._clock() + self._floor.timeout_s
        self._num_came = 0

    def wait_s(self) -> float:
        """For how long the next receive may wait."""
        left_s = self._end - self._clock()
        self._is_over = left_s <= 0
        return max(left_s, _LAST_LOOK_S)

    def came(self, num_bytes: int) -> None:
        """What a receive has brought."""
        self._num_came += num_bytes
        if self._num_came >= self._floor.window_bytes:
            self.begin()
        elif self._is_over:
            raise self.stalled()

    def stalled(self) -> StoreStalled:
        """What to raise where a receive waited in vain."""
        expected, timeout_s = self._floor.window_bytes, self._floor.timeout_s
        return StoreStalled(
            f"stopped in the middle: {self._num_came} bytes within {timeout_s:g} s, expected {expected}"
        )
