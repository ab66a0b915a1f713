"""What a Redis or Valkey server says of itself, for people: how far, how full, whose chunks. Reads, writes nothing.

Which keys there are is learnt by SCAN, which blocks the server for a batch at a time and for no longer. It goes through
the server's hash table, so that what it comes upon first is a fair sample of the whole.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable

from lmcache_ext.errors import StoreTimeout
from lmcache_ext.stores.base import Survey, Usage
from lmcache_ext.stores.resp import ErrorReply, Reply, encode
from lmcache_ext.stores.resp_pool import Pool
from lmcache_ext.stores.resp_topology import ask
from lmcache_ext.stores.resp_wire import Deadline, Wire

SCAN_S = 3.0
BATCH_KEYS = 1000
MAX_SCANNED = 1_000_000

_OBJECT = re.compile(rb"kv:([0-9a-f]{32}):[0-9a-f]+")


def survey_of(pool: Pool, deadline: Deadline, clock: Callable[[], float] = time.monotonic) -> Survey:
    """What the server of `pool` says. What its user may not ask stays unknown. Raises StoreError."""
    with pool.connection(deadline) as wire:
        started_at = clock()
        ask(wire, deadline, b"PING")
        ping_s = clock() - started_at
        info = _asked(wire, deadline, b"INFO", b"memory")
        used, limit, policy = (info_field(info, name) for name in (b"used_memory", b"maxmemory", b"maxmemory_policy"))
        objects, is_whole = _scan(wire, deadline.within(SCAN_S))
    usage = Usage(number(used), number(limit), None)
    return Survey(pool.label, "", ping_s, usage, policy.decode("ascii", "replace"), objects, is_whole)


def info_field(reply: Reply, name: bytes) -> bytes:
    """One field of INFO's answer; empty where it has none."""
    for line in reply.splitlines() if isinstance(reply, bytes) else []:
        key, _, value = line.partition(b":")
        if key == name:
            return value
    return b""


def number(text: bytes) -> int | None:
    """A field that is a number."""
    return int(text) if text.isdigit() else None


def _scan(wire: Wire, deadline: Deadline) -> tuple[Counter[str] | None, bool]:
    """How many objects of each namespace it came upon, and whether these are all; None where SCAN is not allowed."""
    counts: Counter[str] = Counter()
    cursor, num_scanned = b"0", 0
    while num_scanned < MAX_SCANNED:
        match _asked(wire, deadline, b"SCAN", cursor, b"COUNT", b"%d" % BATCH_KEYS):
            case [bytes(cursor), list(names)]:
                found = (_OBJECT.fullmatch(name) for name in names if isinstance(name, bytes))
                counts.update(match[1].decode() for match in found if match)
                num_scanned += max(len(names), 1)
            case _:
                return None, False
        if cursor == b"0":
            return counts, True
        if _is_over(deadline):
            break
    return counts, False


def _is_over(deadline: Deadline) -> bool:
    try:
        return deadline.left_s() < deadline.timeout_s / 4  # what is left is for one more batch from a slow server
    except StoreTimeout:
        return True


def _asked(wire: Wire, deadline: Deadline, *command: bytes) -> Reply:
    """The reply; None where the server refuses the command, as an ACL may."""
    wire.send(encode(command), 1, deadline)
    reply = wire.reply(deadline)
    return None if isinstance(reply, ErrorReply) else reply
