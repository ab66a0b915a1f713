"""What happens when our own code fails inside vLLM's scheduler or worker.

Any exception that leaves a connector hook ends the engine for every request. Here it ends the cache
for one request, is logged once per hook with its traceback, and is counted. A failure that cannot
be pinned on a request, or too many of them, turns the cache off until the next start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from vllm.logger import init_logger

logger = init_logger("vllm.lmcache_ext.hooks")

T = TypeVar("T")

_MAX_FAILURES = 100


class Hooks:
    """Runs the bodies of connector hooks. One per connector; used from one thread."""

    def __init__(self) -> None:
        self.off = False
        self._bypassed: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._num_failures = 0
        self._told: set[str] = set()

    @property
    def has_failures(self) -> bool:
        """Whether `take_failures` has something to give."""
        return bool(self._failures)

    def bypassed(self, req_id: str) -> bool:
        """Whether the cache is off for this request."""
        return self.off or req_id in self._bypassed

    def forget(self, req_id: str) -> None:
        """The request is gone."""
        self._bypassed.discard(req_id)

    def bypass(self, req_id: str) -> None:
        """Turn the cache off for this request."""
        self._bypassed.add(req_id)

    def run(self, hook: str, body: Callable[[], T], fallback: T, *, req_id: str | None = None) -> T:
        """`body()`, or `fallback` where it raises; then the cache is off for `req_id`, or altogether."""
        try:
            return body()
        except Exception:  # the one place where our failures are contained
            self._contain(hook, req_id)
            return fallback

    def take_failures(self) -> Counter[str]:
        """Failures by hook since the last call."""
        failures, self._failures = self._failures, Counter()
        return failures

    def _contain(self, hook: str, req_id: str | None) -> None:
        self._failures[hook] += 1
        self._num_failures += 1
        if hook not in self._told:
            self._told.add(hook)
            logger.exception("KV cache hook %s failed; the request goes on without the cache", hook)
        if req_id is not None and self._num_failures < _MAX_FAILURES:
            self._bypassed.add(req_id)
        elif not self.off:
            self.off = True
            logger.error("KV cache is off until the next start, after a failure in %s", hook)
