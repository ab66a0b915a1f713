"""A running process notices that the LMCache file has changed, and takes on what may change.

The file is read once a second, whole, and compared by its digest. Nothing cheaper sees every way in which
files change: kubelet swaps a symlink above the file (``..data``) and never touches the file itself, editors
rename a new one over it or write into it in place, inotify hears nothing of another NFS client, and on
overlayfs or with ``cp -p`` inode and times may stay as they were. One small file a second costs microseconds.
A change counts once two looks in a row saw the same bytes, so that a file is not judged half written.

Only ``Config.live`` changes. A file that is not valid changes nothing. A file that differs in another place
too is taken like PostgreSQL takes its own: what is live takes effect, every other difference is refused by
name and waits for a restart; so a ``chunk_size`` that waits for tonight's rollout cannot hold up a ``freeze``
that is needed now. A live setting whose meaning hangs on a refused one is kept with it (`config_diff.merged`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcache_ext.config import Config
from lmcache_ext.config_diff import differences, merged
from lmcache_ext.config_sources import MAX_FILE_BYTES
from lmcache_ext.errors import ConfigError

logger = logging.getLogger("vllm.lmcache_ext.reload")

INTERVAL_S = 1.0
SETTLE_S = 0.2
SHOWN_DIGITS = 8
"""Of the file's SHA-256, in log lines and in the gauge: enough to tell one file from the next."""

OUTCOMES = ("applied", "partly", "refused", "invalid")
"""Of one changed file: taken whole; live part taken, rest refused; nothing taken as all of it needs a restart;
nothing taken as it is not valid."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a file, or a part of it, is not in effect."""

    at: float  # seconds since the epoch
    digest: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """What is in effect, and of which file."""

    config: Config
    generation: int = 1
    digest: str = ""  # of the file that `config` was read from last; "" before the first look
    refusal: Refusal | None = None  # the last one
    whole: bool = True  # whether the file, as it is now, is in effect in all of its parts


@dataclass(frozen=True, slots=True)
class Reload:
    """A new live part, to be applied by whoever takes it."""

    before: Config
    after: Config
    status: Status
    changes: tuple[str, ...]  # "freeze: false -> true"
    prepared: Any  # what the watcher's `prepare` returned

    def __str__(self) -> str:
        status = self.status
        return (
            f"LMCache configuration {status.generation} is in effect: {'; '.join(self.changes)} "
            f"[file={status.digest} generation={status.generation}]"
        )


def set_log_level(config: Config) -> None:
    """Of everything under ``vllm.lmcache_ext``; that of vLLM's own loggers where none is written."""
    written = config.origin("log_level").kind != "default"
    logging.getLogger("vllm.lmcache_ext").setLevel(config.live.log_level if written else logging.NOTSET)


class ConfigWatcher:
    """Watches one file in a thread of its own.

    Threads:  `look` runs in the watching thread (or, in its place, a test's); everything else from any.
    Order:    reloads are taken in the order in which the files appeared; none is left out.
    Owner:    a `Reload` that was taken, with what was prepared for it, belongs to the taker.
    Failure:  a file that cannot be used is one warning, a count and a `Refusal`; nothing raises.

    `load` reads the configuration anew. `prepare(before, after)` does, in the watching thread, what may take
    long or fail (opening a store); its ConfigError makes the file invalid. `quiet` leaves the warnings to
    another process that watches the same file, and has its own at level DEBUG. What the whole process has but once,
    how much it logs, is changed here.
    """

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        *,
        prepare: Callable[[Config, Config], object] = lambda before, after: None,
        quiet: bool = False,
        interval_s: float = INTERVAL_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._path = config.path
        self._load = load
        self._prepare = prepare
        self._level = logging.DEBUG if quiet else logging.WARNING
        self._interval_s = interval_s
        self._settle_s = settle_s
        self._lock = threading.Lock()
        self._status = Status(config)
        self._counts: Counter[str] = Counter()
        self._reloads: queue.SimpleQueue[Reload] = queue.SimpleQueue()
        self._judged: str | None = None
        self._pending: str | None = None
        self._failed: str | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> ConfigWatcher:
        """Begin to watch; without a file there is nothing to watch."""
        if self._path is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lmcache_ext-reload", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop watching; may be called twice."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(self._interval_s)

    def has_news(self, seen: Status) -> bool:
        """Whether there is something to take, or another status than `seen`; without a lock, for every step."""
        return self._status is not seen or not self._reloads.empty()

    def take(self) -> Reload | None:
        """The next change to apply, if there is one."""
        if self._reloads.empty():
            return None
        return self._reloads.get_nowait()

    @property
    def status(self) -> Status:
        with self._lock:
            return self._status

    def take_counts(self) -> Mapping[str, int]:
        """Changed files by outcome (one of OUTCOMES), since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

    def look(self) -> float:
        """Look at the file once; returns the seconds until it should be looked at again."""
        digest = self._digest()
        if digest == self._judged:
            self._pending = None
        elif digest != self._pending:
            self._pending = digest
            return self._settle_s
        else:
            self._judge(digest)
        return self._interval_s

    def _run(self) -> None:
        """Top of the thread."""
        wait_s = 0.0
        while not self._closing.wait(wait_s):
            try:
                wait_s = self.look()
            except Exception:
                if self._failed != self._pending:  # once for each file: the next look fails on it again
                    self._failed = self._pending
                    logger.exception("Watching %s failed; it is tried again", self._path)
                wait_s = self._interval_s

    def _digest(self) -> str:
        """SHA-256 of the file, or why it cannot be read."""
        assert self._path is not None
        try:
            with open(self._path, "rb", opener=_without_waiting) as file:
                return hashlib.sha256(file.read(MAX_FILE_BYTES + 1) or b"").hexdigest()
        except OSError as error:
            return f"unreadable: {error.strerror}"

    def _judge(self, digest: str) -> None:
        before = self.status.config
        try:
            new = self._load()
            if self._digest() != digest:  # changed between the look and the reading: the next look sees it
                return
            after = merged(before, new)
            live, fixed = differences(before, after)[0], differences(before, new)[1]
            prepared = self._prepare(before, after) if live else None
        except ConfigError as error:
            self._refuse(digest, "invalid", [str(error)])
        else:
            if fixed:
                self._refuse(digest, "partly" if live else "refused", fixed)
            self._accept(digest, after, live, prepared, whole=not fixed)
        self._judged = digest

    def _refuse(self, digest: str, outcome: str, reasons: Sequence[str]) -> None:
        refusal = Refusal(time.time(), _short(digest), tuple(reasons))
        with self._lock:
            self._counts[outcome] += 1
            self._status = replace(self._status, refusal=refusal, whole=False)
        logger.log(
            self._level,
            "LMCache configuration %d %s: %s [file=%s outcome=%s]",
            self.status.generation,
            "changes in part" if outcome == "partly" else "stays as it is",
            "; ".join(reasons),
            refusal.digest,
            outcome,
        )

    def _accept(self, digest: str, after: Config, changes: Sequence[str], prepared: object, *, whole: bool) -> None:
        with self._lock:
            before = self._status
            generation = before.generation + bool(changes)
            self._status = status = replace(
                before, config=after, generation=generation, digest=_short(digest), whole=whole
            )
            if changes:
                self._reloads.put(Reload(before.config, after, status, tuple(changes), prepared))
            if changes and whole:
                self._counts["applied"] += 1
        if after.live.log_level != before.config.live.log_level:
            set_log_level(after)
        if changes or not whole or self._level == logging.DEBUG:
            return
        if not before.digest:
            logger.info("LMCache configuration 1 is in effect [file=%s generation=1]", status.digest)
        elif not before.whole:
            logger.info("LMCache configuration %d: the file agrees with it again", generation)


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe in its place has nobody who ever writes."""
    return os.open(path, flags | os.O_NONBLOCK)


def _short(digest: str) -> str:
    """As log lines show it; "-" for a file that cannot be read."""
    return digest[:SHOWN_DIGITS] if digest.isalnum() else "-"
