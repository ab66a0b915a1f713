"""One client's connection to the cache server: bytes in, bytes out, and how long it may take.

What is said on it is a dialect's business (`lm_dialects`): the old one until the client asks for the new.
A payload is received from the socket into its block and nowhere else in between.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, cast

from lmcache_ext.daemons.lm_cache import Cache
from lmcache_ext.daemons.lm_outbox import Outbox
from lmcache_ext.stores.tokens import Token
from lmcache_ext.wire.stream import Decoder, WireError

logger = logging.getLogger("lmcache_ext.daemons.lmserver")

SCRATCH_BYTES = 256 * 1024
HEAD_READ_BYTES = 4 * 1024
"""Read where a head comes next: more would be bodies, which are then copied twice on their way to their block."""

DIRECT_BYTES = 32 * 1024
"""A body with fewer bytes to come is read together with what follows it."""

MIN_BYTES_PER_S = 256 * 1024
"""Slower than this, over the timeout and the length of the payload, is not a client but a siege."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may ask for."""

    max_object_bytes: int
    max_in_flight: int = 128
    read_timeout_s: float = 30.0
    idle_timeout_s: float = 0.0  # 0: LMCache's clients lie idle for hours and never connect again


class Host(Protocol):
    """What a connection needs of its server."""

    cache: Cache
    limits: Limits
    counters: Counter[str]
    scratch: memoryview
    token: Token

    def admits(self, connection: Connection) -> bool: ...
    def dropped(self, connection: Connection) -> None: ...
    def stats(self) -> dict[str, Any]: ...


class Dialect(Protocol):
    """What a connection's bytes mean."""

    is_ordered: bool
    max_waiting: int

    @property
    def decoder(self) -> Decoder[Any]: ...
    def on_head(self, head: Any) -> None: ...  # noqa: ANN401
    def on_error(self, error: WireError) -> None: ...


@dataclass(slots=True)
class Intake:
    """A body on its way in: `view` is where it goes, None where nobody wants it."""

    view: memoryview | None
    done: Callable[[], None]
    abandoned: Callable[[], None] | None
    at: int = 0


class Connection(asyncio.BufferedProtocol):
    """Protocol of one transport; all methods run on the event loop."""

    def __init__(self, host: Host, first: Callable[[Connection], Dialect]) -> None:
        self.host = host
        self.is_authorized = not host.token.is_needed
        self.peer = "?"
        self._dialect = first(self)
        self._intake: Intake | None = None
        self._num_jobs = 0
        self._is_advancing = False
        self._is_ending = False
        self._is_at_eof = False
        self._is_reading = True
        self._is_lost = False
        self._is_made = False
        self._loop = asyncio.get_running_loop()
        self._last_used = self._opened_at = self._loop.time()
        self._read_deadline: float | None = None
        self._write_mark: tuple[float, int] | None = None

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._outbox = Outbox(self._transport, self.host.counters, self._advance)
        self._is_made = True
        self.peer = str(transport.get_extra_info("peername"))
        if not self.host.admits(self):
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._abandon()
        self._outbox.close()
        self.host.dropped(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        intake = self._intake
        if intake is not None and intake.view is not None and self._goes_direct():
            return intake.view[intake.at :]
        return self.host.scratch[:HEAD_READ_BYTES] if intake is None else self.host.scratch

    def buffer_updated(self, nbytes: int) -> None:
        self.host.counters["received_bytes"] += nbytes
        self._last_used = self._loop.time()
        intake = self._intake
        decoder = self._dialect.decoder
        if intake is not None and intake.view is not None and self._goes_direct():
            decoder.landed(nbytes)
            intake.at += nbytes
        elif intake is not None and intake.view is None and nbytes <= decoder.body_left and not decoder.buffered_bytes:
            decoder.landed(nbytes)
        else:
            decoder.feed(self.host.scratch[:nbytes])
        self._advance()

    def eof_received(self) -> bool:
        """What was sent before the end is answered; TLS knows no half-closed connections."""
        self._is_at_eof = True
        self._advance()
        return not self._transport.is_closing() and self._transport.get_extra_info("sslcontext") is None

    def pause_writing(self) -> None:
        if self._is_made:  # a TLS handshake that fails is paused without ever having been a connection
            self._outbox.pause()

    def resume_writing(self) -> None:
        if self._is_made:
            self._outbox.resume()

    # -- what dialects call

    def receive(
        self,
        view: memoryview | None,
        done: Callable[[], None],
        abandoned: Callable[[], None] | None = None,
    ) -> None:
        """Read the body of the head just given into `view` (None: drop it), then call `done`; else `abandoned`."""
        self._intake = Intake(view, done, abandoned)
        allowed_s = self.host.limits.read_timeout_s + self._dialect.decoder.body_left / MIN_BYTES_PER_S
        self._read_deadline = self._loop.time() + allowed_s

    def send(self, head: bytes, body: memoryview | None = None, done: Callable[[], None] | None = None) -> None:
        """Queue a reply; `done` when its body is not needed any more."""
        self._outbox.send(head, body, done)

    def start(self, job: Coroutine[Any, Any, None]) -> None:
        """Run what has to wait; an ordered dialect understands nothing more until it is done."""
        self._num_jobs += 1
        task = self._loop.create_task(job)
        task.add_done_callback(self._job_done)

    def change_over(self, dialect: Dialect) -> None:
        """From the next byte on, `dialect` reads."""
        dialect.decoder.feed(self._dialect.decoder.take_rest())
        self._dialect = dialect

    def count(self, name: str) -> None:
        self.host.counters[name] += 1

    def end(self) -> None:
        """Read nothing more, finish what is under way, close."""
        self._is_ending = True
        if self._is_idle():
            self._transport.close()

    # -- what the server calls

    def finish(self) -> None:
        """The server stops: let the request that is under way end, take no other."""
        if self._intake is None:
            self.end()
        else:
            self._is_ending = True

    def abort(self) -> None:
        self._transport.abort()

    def check(self, now: float) -> str | None:
        """What is overdue, if anything; the server then aborts the connection."""
        limits = self.host.limits
        if self._read_deadline is not None and now > self._read_deadline:
            return "a request did not come through in time"
        if not self.is_authorized and now - self._opened_at > limits.read_timeout_s:
            return "no token came in time"
        if not len(self._outbox):
            self._write_mark = None
            idle = not self._num_jobs and self._intake is None
            too_long = limits.idle_timeout_s and now - self._last_used > limits.idle_timeout_s
            return "idle" if idle and too_long else None
        if self._write_mark is None:
            self._write_mark = (now, self._outbox.sent_bytes)
        since, sent = self._write_mark
        if now - since < limits.read_timeout_s:
            return None
        if self._outbox.sent_bytes - sent < limits.read_timeout_s * MIN_BYTES_PER_S:
            return "replies are not read"
        self._write_mark = (now, self._outbox.sent_bytes)
        return None

    # -- inside

    def _goes_direct(self) -> bool:
        decoder = self._dialect.decoder
        return not decoder.buffered_bytes and decoder.body_left >= DIRECT_BYTES

    def _is_idle(self) -> bool:
        return self._intake is None and not self._num_jobs and not len(self._outbox)

    def _may_go_on(self) -> bool:
        if self._dialect.is_ordered and self._num_jobs:
            return False
        return self._num_jobs + len(self._outbox) < self._dialect.max_waiting

    def _advance(self) -> None:
        """Understand as much of what came as may be answered now."""
        if self._is_advancing or self._is_lost:
            return
        self._is_advancing = True
        try:
            while self._step():
                pass
        except WireError as error:
            self.count("malformed")
            logger.info("%s: %s", self.peer, error)
            self._dialect.on_error(error)
            self.end()
        finally:
            self._is_advancing = False
        self._settle()

    def _step(self) -> bool:
        """One head or one body; False where more bytes or room for replies are needed first."""
        decoder = self._dialect.decoder
        intake = self._intake
        if intake is not None:
            if intake.view is None:
                decoder.skip()
            else:
                intake.at += decoder.drain(intake.view[intake.at :])
            if decoder.body_left:
                if self._is_at_eof:
                    self._abandon()
                    self._is_ending = True
                return False
            self._intake = self._read_deadline = None
            intake.done()
            return True
        if self._is_ending or not self._may_go_on():
            return False
        head = decoder.head()
        if head is None:
            self._is_ending = self._is_at_eof
            return False
        self._read_deadline = None
        self._dialect.on_head(head)
        return True

    def _settle(self) -> None:
        """After a step: end, hold back the peer, or begin to wait for the rest of a head."""
        if self._is_ending and self._is_idle():
            self._transport.close()
            return
        reads = not self._is_at_eof and (self._intake is not None or (not self._is_ending and self._may_go_on()))
        if reads != self._is_reading and not self._transport.is_closing():
            self._is_reading = reads
            if reads:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()
        if self._intake is None:
            partial = self._dialect.decoder.buffered_bytes > 0 and reads
            if not partial:
                self._read_deadline = None
            elif self._read_deadline is None:
                self._read_deadline = self._loop.time() + self.host.limits.read_timeout_s

    def _job_done(self, task: asyncio.Task[None]) -> None:
        self._num_jobs -= 1
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s: a request failed", self.peer, exc_info=task.exception())
            self.abort()
        self._advance()

    def _abandon(self) -> None:
        intake, self._intake = self._intake, None
        self._read_deadline = None
        if intake is not None:
            self.count("truncated")
            if intake.abandoned is not None:
                intake.abandoned()
