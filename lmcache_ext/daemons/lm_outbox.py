"""What a connection still has to send, in order, without copying objects.

`asyncio` before Python 3.12 copies whatever a socket does not take at once. So an object is written in pieces,
the next one when the last has gone: what is copied is never more than a piece.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

PIECE_BYTES = 1024**2
TURN_BYTES = 8 * 1024**2
"""Sent before other connections get their turn."""
JOINED_BYTES = 16 * 1024
"""Of a body, sent in one piece with its head."""


class Outbox:
    """Heads and bodies for one transport; `drained` is told when there is room for more replies."""

    def __init__(self, transport: asyncio.Transport, counters: Counter[str], drained: Callable[[], None]) -> None:
        self._transport = transport
        self._drained = drained
        self._counters = counters
        self._waiting: deque[tuple[bytes, memoryview | None, Callable[[], None] | None]] = deque()
        self._body: memoryview | None = None
        self._done: Callable[[], None] | None = None
        self._paused = False
        self._running = False
        self._is_closed = False
        self.sent_bytes = 0
        is_tls = transport.get_extra_info("sslcontext") is not None
        # Told of the first byte that waits. TLS transports compare with >=: at 0 they would pause for nothing.
        transport.set_write_buffer_limits(high=1 if is_tls else 0, low=0)

    def __len__(self) -> int:
        """Replies not handed to the system yet."""
        return len(self._waiting) + (self._body is not None or self._paused)

    def send(self, head: bytes, body: memoryview | None = None, done: Callable[[], None] | None = None) -> None:
        """Queue a reply; `done` is called once when `body` is not needed any more, sent or not."""
        if self._is_closed:
            if done is not None:
                done()
            return
        self._waiting.append((head, body, done))
        self._run()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._run()

    def close(self) -> None:
        """Drop what was not sent."""
        self._is_closed = True
        waiting, self._waiting = self._waiting, deque()
        self._finish_body()
        for _head, _body, done in waiting:
            if done is not None:
                done()

    def _run(self) -> None:
        """Write until the socket takes no more, or it is the turn of others."""
        if self._running:
            return
        self._running = True
        had_replies = len(self) > 0
        budget = TURN_BYTES
        while not self._paused and not self._is_closed and budget > 0 and (self._waiting or self._body is not None):
            budget -= self._write_piece()
        self._running = False
        if self._is_closed:
            return
        if budget <= 0 and not self._paused:
            asyncio.get_running_loop().call_soon(self._run)
        elif had_replies and len(self) == 0:
            self._drained()

    def _write_piece(self) -> int:
        if self._body is None:
            head, body, self._done = self._waiting.popleft()
            if body is None or not len(body):
                self._transport.write(head)
                self._finish_body()
                return self._sent(len(head))
            self._body = body[JOINED_BYTES:]
            self._transport.write(b"".join((head, body[:JOINED_BYTES])))
            return self._sent(len(head) + min(len(body), JOINED_BYTES))
        piece, self._body = self._body[:PIECE_BYTES], self._body[PIECE_BYTES:]
        if piece:
            self._transport.write(piece)
        if not self._body:
            # From Python 3.12 on the transport may refer to the piece until it has gone.
            if self._paused:
                self._body = self._body[:0]
                return self._sent(len(piece))
            self._finish_body()
        return self._sent(max(len(piece), 1))

    def _finish_body(self) -> None:
        done, self._done, self._body = self._done, None, None
        if done is not None:
            done()

    def _sent(self, num_bytes: int) -> int:
        self.sent_bytes += num_bytes
        self._counters["sent_bytes"] += num_bytes
        return num_bytes
