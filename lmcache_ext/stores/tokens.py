"""A secret that clients must know, in a file that may change: kubelet swaps a mounted Secret under its readers."""

from __future__ import annotations

import hmac
import logging
from pathlib import Path

from lmcache_ext.errors import ConfigError

logger = logging.getLogger("vllm.lmcache_ext.stores.tokens")


class Token:
    """Judges what clients send.

    Threads:  any.
    Order:    the file as it is at each question counts.
    Owner:    of nothing.
    Failure:  a file that cannot be read leaves the token read before in force; none, or an empty one, lets nobody in.
    """

    def __init__(self, path: str | None) -> None:
        """None: everybody is welcome. Does not read the file yet."""
        self._path = path
        self._last = b""

    @property
    def is_needed(self) -> bool:
        return self._path is not None

    def check(self) -> None:
        """At the start, where somebody looks. Raises ConfigError where there is a file and no token in it."""
        try:
            self.read()
        except OSError as error:
            raise ConfigError(str(error)) from error
        if self._path is not None and not self._last:
            raise ConfigError(f"{self._path} is empty, and would let nobody in: write a token into it")

    def read(self) -> None:
        """Raises OSError where there is a file and it cannot be read."""
        if self._path is not None:
            self._last = Path(self._path).read_bytes().strip()

    def accepts(self, given: bytes) -> bool:
        """Whether a client that sent this is welcome."""
        if self._path is None:
            return True
        try:
            self.read()
        except OSError as error:
            logger.warning("%s: %s; the token read before still counts", self._path, error)
        return bool(self._last) and hmac.compare_digest(self._last, given)
