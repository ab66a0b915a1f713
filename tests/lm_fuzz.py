"""Random conversations with the cache server: good frames, bent frames and noise, in both protocols, cut anywhere.

    .venv/bin/python -m tests.lm_fuzz --frames 5000000 [--seed 1]

starts a server, talks to it until so many frames were sent, and says what they did to its memory.
"""

from __future__ import annotations

import argparse
import random
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from lmcache_ext.wire import v2
from tests.contracts.store_contract import get, key_of, views
from tests.lm_servers import ServerProcess, serving

MIB = 1024**2
MAX_BYTES = 32 * MIB
OPTIONS = ("--max-bytes", "32Mi", "--max-object-bytes", "1Mi", "--max-in-flight", "32", "--read-timeout", "2")
FRAMES_PER_TALK = 400
QUIET_S = 10.0
HELLO = struct.pack("<9i150s", 5, 0, 1, 2, 0, 0, 0, 0, 0, v2.HELLO_NAME.encode().ljust(150))

Frames = Callable[[random.Random], bytes]


def old_frame(rng: random.Random) -> bytes:
    """One request of LMCache's protocol, well-formed."""
    command = rng.choice((1, 1, 2, 2, 2, 3, 5, 5)) if rng.random() < 0.998 else 4
    name = b"fuzz@%d" % rng.randrange(300)
    size = rng.choice((0, 1, 100, 3000)) if rng.random() < 0.97 else rng.randrange(300_000)
    length = size if command == 1 else 0
    fields = [rng.randrange(-(2**31), 2**31) for _ in range(7)]
    return struct.pack("<9i150s", command, length, *fields, name.ljust(150)) + rng.randbytes(length)


def v2_frame(rng: random.Random) -> bytes:
    """One request of version 2, well-formed."""
    op = rng.choice((v2.Op.PUT, v2.Op.PUT, v2.Op.GET, v2.Op.GET, v2.Op.EXISTS, v2.Op.DELETE, v2.Op.PING))
    if rng.random() < 0.002:
        op = rng.choice((v2.Op.STATS, v2.Op.HELLO))
    key, body = b"", b""
    if op in (v2.Op.PUT, v2.Op.GET):
        key = b"k%d" % rng.randrange(300)
    if op == v2.Op.PUT:
        body = rng.randbytes(rng.choice((0, 1, 100, 3000)) if rng.random() < 0.97 else rng.randrange(300_000))
    if op in (v2.Op.EXISTS, v2.Op.DELETE):
        body = v2.encode_keys([b"k%d" % rng.randrange(300) for _ in range(rng.randrange(6))])
    wanted = rng.choice((0, 10, 2**20, 2**63)) if op == v2.Op.GET else 0
    return v2.Request(op, rng.randrange(2**32), key, len(body), wanted).encode() + body


def bent(frame: bytes, rng: random.Random) -> bytes:
    """A frame with bytes changed, cut off, doubled or put in; or no frame at all."""
    at = rng.randrange(len(frame) + 1)
    return rng.choice(
        (
            frame[:at] + rng.randbytes(rng.randrange(1, 9)) + frame[at + 1 :],
            frame[:at],
            frame[:at] + frame,
            rng.randbytes(rng.randrange(1, 600)),
            bytes(rng.randrange(1, 600)),
            frame[: min(at, 24)] + rng.choice((b"\xff" * 8, b"\x7f" * 8, b"\0" * 8)) + frame[min(at, 24) + 8 :],
        )
    )


class Fuzzer:
    """Talks to one server, a connection at a time; what is sent is a function of the seed.

    The frames of a talk are drawn from a pool of well-formed ones that is made anew now and then, since making them
    takes longer than serving them.
    """

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.num_frames = 0
        self.num_talks = 0
        self.endings: Counter[str] = Counter()
        self._server = server
        self._rng = random.Random(seed)

    def talk(self) -> None:
        """A stretch of good frames, then mostly something that is none, then the end of the stream."""
        if self.num_talks % 200 == 0:
            self._pools = {make: [make(self._rng) for _ in range(2000)] for make in (old_frame, v2_frame)}
        rng = self._rng
        make = rng.choice((old_frame, v2_frame))
        frames = rng.choices(self._pools[make], k=rng.randrange(1, FRAMES_PER_TALK))
        if rng.random() < 0.8:
            frames += [bent(rng.choice(frames), rng), *frames[:3]]
        stream = (HELLO if make is v2_frame else b"") + b"".join(frames)
        self.num_frames += len(frames)
        self.num_talks += 1
        self.endings[self._converse(stream)] += 1

    def _converse(self, stream: bytes) -> str:
        """Send and receive at once until the server closes; how it ended."""
        with socket.create_connection(("127.0.0.1", self._server.port), QUIET_S) as sock:
            if self._rng.random() < 0.05:  # go away in the middle, rudely
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                with suppress(OSError):
                    sock.sendall(stream[: self._rng.randrange(len(stream) + 1)][:60_000])
                return "reset"
            sock.setblocking(False)
            try:
                return self._exchange(sock, memoryview(stream))
            except OSError:
                return "reset by the server"

    def _exchange(self, sock: socket.socket, left: memoryview) -> str:
        is_sending = True
        while True:
            readable, writable, _ = select.select([sock], [sock] if is_sending else [], [], QUIET_S)
            if not readable and not writable:
                raise AssertionError(f"the server says nothing for {QUIET_S} s after frame {self.num_frames}")
            if readable and not sock.recv(256 * 1024):
                return "closed"
            if writable:
                step = len(left) if self._rng.random() < 0.8 else self._rng.randrange(1, 400)
                left = left[sock.send(left[:step]) :] if left else left
                if not left:
                    sock.shutdown(socket.SHUT_WR)
                    is_sending = False


def check(server: ServerProcess, fuzzer: Fuzzer, resident_before: int) -> int:
    """The server is whole: it answers, its log has no accident, its memory is bounded; the latter in bytes above."""
    assert server.process.poll() is None, server.log()
    store = server.store()
    store.put(key_of("after all that"), views(b"x" * 100_000))
    assert get(store, key_of("after all that"), 100_000) == b"x" * 100_000
    usage = store.usage()
    assert usage.used_bytes is not None
    assert usage.used_bytes <= MAX_BYTES
    with store._pool.link(5.0) as link:
        assert link.stats()["num_connections"] <= 2, "connections are left over"
    store.close()
    log = server.log()
    assert "Traceback" not in log, log[-3000:]
    assert "ERROR" not in log, log[-3000:]
    grown = server.resident_bytes() - resident_before
    assert grown < MAX_BYTES + 32 * MIB, f"{grown} bytes more than at the start after {fuzzer.num_frames} frames"
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with serving(*OPTIONS) as server:
        before, started_at = server.resident_bytes(), time.monotonic()
        fuzzer = Fuzzer(server, arguments.seed)
        shown = 0
        while fuzzer.num_frames < arguments.frames:
            fuzzer.talk()
            if fuzzer.num_frames >= shown:
                shown += arguments.frames // 10
                grown = check(server, fuzzer, before)
                rate = fuzzer.num_frames / (time.monotonic() - started_at)
                print(f"{fuzzer.num_frames} frames, {rate:.0f}/s, {grown / MIB:.1f} MiB above the start", flush=True)
        print(f"{fuzzer.num_talks} connections, ended: {dict(fuzzer.endings)}")


if __name__ == "__main__":
    main()
