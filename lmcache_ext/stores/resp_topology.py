"""Which server has a key: one server, the master that sentinels name, or the nodes of a cluster.

The two questions, `SENTINEL GET-MASTER-ADDR-BY-NAME` and `CLUSTER SLOTS`, are asked through our own wire, so that the
deadline of the call bounds them, whatever the sentinels and nodes do.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from lmcache_ext.errors import StoreError, StoreFull, StoreUnavailable
from lmcache_ext.stores.redis_options import Address, RespOptions
from lmcache_ext.stores.resp import ErrorReply, Reply, encode
from lmcache_ext.stores.resp_parts import NUM_SLOTS, slot_of
from lmcache_ext.stores.resp_pool import Pool
from lmcache_ext.stores.resp_wire import Deadline, Wire

REFRESH_S = 1.0
"""After a failure the slots are asked for at most this often; after MOVED at once."""

Connect = Callable[[Address, Deadline], Wire]
"""Connects, and says who we are (AUTH, TLS, SELECT). Raises StoreError."""


class Moved(StoreUnavailable):
    """The key lives elsewhere now; `RespStore` looks again once, then it is what it inherits."""


def error_of(reply: ErrorReply, label: str) -> StoreError:
    """What the refusal of the server called `label` means for the caller."""
    text = f"{label}: {reply.text[:200]}"
    match reply.code:
        case "OOM":
            return StoreFull(text)
        case "MOVED":
            return Moved(text)
        case "NOAUTH" | "WRONGPASS" | "NOPERM":
            return StoreUnavailable(f"{label}: access denied, check username and password: {reply.text[:200]}")
    return StoreUnavailable(text)


def ask(wire: Wire, deadline: Deadline, *arguments: bytes) -> Reply:
    """One small command and its reply; an error reply is raised."""
    wire.send(encode(arguments), 1, deadline)
    reply = wire.reply(deadline)
    if isinstance(reply, ErrorReply):
        raise error_of(reply, wire.label)
    return reply


def share(deadline: Deadline, num_left: int, limit_s: float) -> Deadline:
    """A fair share of the time for one of `num_left` servers: one that hangs leaves time for the others."""
    return deadline.within(min(limit_s, deadline.left_s() / num_left))


class Topology(ABC):
    """Where keys live.

    Threads:  any number.
    Order:    what `refresh` learnt holds for calls that start afterwards.
    Owner:    of the pools.
    Failure:  StoreError; nothing is connected before it is needed.
    """

    @abstractmethod
    def pool_of(self, key: bytes, deadline: Deadline) -> Pool:
        """The server that has this key."""

    @abstractmethod
    def pools(self, deadline: Deadline) -> list[Pool]:
        """Every server that has keys."""

    @abstractmethod
    def refresh(self, *, moved: bool) -> None:
        """Look again at the next call: a server said that a key moved, or failed, and may have been replaced."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections. May be called twice."""


class Single(Topology):
    """One server."""

    def __init__(self, options: RespOptions, connect: Connect) -> None:
        address = options.addresses[0]
        self._pool = Pool(
            f"{options.name} {address}", lambda deadline: connect(address, deadline), options.num_connections
        )

    def pool_of(self, key: bytes, deadline: Deadline) -> Pool:
        return self._pool

    def pools(self, deadline: Deadline) -> list[Pool]:
        return [self._pool]

    def refresh(self, *, moved: bool) -> None:
        """It is where it is."""

    def close(self) -> None:
        self._pool.close()


class Sentinels(Topology):
    """The master of a service. The sentinels are asked for every new connection, so a failover needs no event."""

    def __init__(self, options: RespOptions, connect: Connect, connect_sentinel: Connect) -> None:
        self._options = options
        self._connect = connect
        self._connect_sentinel = connect_sentinel
        self._sentinels = list(options.addresses)
        self._pool = Pool(f"{options.name} {options.sentinel_service}", self._dial, options.num_connections)

    def pool_of(self, key: bytes, deadline: Deadline) -> Pool:
        return self._pool

    def pools(self, deadline: Deadline) -> list[Pool]:
        return [self._pool]

    def refresh(self, *, moved: bool) -> None:
        self._pool.close_idle()

    def close(self) -> None:
        self._pool.close()

    def _dial(self, deadline: Deadline) -> Wire:
        return self._connect(self._master(deadline), deadline)

    def _master(self, deadline: Deadline) -> Address:
        """Where the master is, by the first sentinel that knows; that one is asked first next time."""
        causes = []
        sentinels = self._sentinels
        for index, sentinel in enumerate(sentinels):
            try:
                short = share(deadline, len(sentinels) - index + 1, self._options.sentinel_timeout_s)
                master = self._ask(sentinel, short)
            except StoreError as error:
                causes.append(str(error))
                continue
            if master is not None:
                self._sentinels = [sentinel, *(other for other in self._sentinels if other != sentinel)]
                return master
            causes.append(f"{sentinel}: does not know it")
        raise StoreUnavailable(f"no sentinel names a master ({'; '.join(causes)})"[:400])

    def _ask(self, sentinel: Address, deadline: Deadline) -> Address | None:
        wire = self._connect_sentinel(sentinel, deadline)
        try:
            service = self._options.sentinel_service.encode()
            reply = ask(wire, deadline, b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", service)
        finally:
            wire.close()
        match reply:
            case [bytes(host), bytes(port)] if port.isdigit():
                return Address(host.decode("ascii", "replace"), int(port))
        return None


class Cluster(Topology):
    """The nodes of a cluster, by slot."""

    def __init__(self, options: RespOptions, connect: Connect, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._connect = connect
        self._clock = clock
        self._learnt_at = 0.0
        self._lock = threading.Lock()
        self._pools: dict[Address, Pool] = {}
        self._owners: list[Pool | None] = []
        self._closed = False

    def pool_of(self, key: bytes, deadline: Deadline) -> Pool:
        owner = self._slots(deadline)[slot_of(key)]
        if owner is None:
            self.refresh(moved=False)
            raise StoreUnavailable(f"{self._options.name} cluster: no node serves slot {slot_of(key)}")
        return owner

    def pools(self, deadline: Deadline) -> list[Pool]:
        found = {id(pool): pool for pool in self._slots(deadline) if pool is not None}
        return sorted(found.values(), key=lambda pool: pool.label)

    def refresh(self, *, moved: bool) -> None:
        with self._lock:
            if moved or self._clock() - self._learnt_at > REFRESH_S:
                self._owners = []

    def close(self) -> None:
        with self._lock:
            self._closed = True
            pools, self._pools, self._owners = list(self._pools.values()), {}, []
        for pool in pools:
            pool.close()

    def _slots(self, deadline: Deadline) -> list[Pool | None]:
        """For each slot its master; asked of any node where it is not known."""
        with self._lock:
            owners = self._owners
            known = list(self._pools)
        if owners:
            return owners
        addresses = dict.fromkeys([*known, *self._options.addresses])
        ranges = self._ask_any(list(addresses), deadline)
        with self._lock:
            return self._learn(ranges)

    def _learn(self, ranges: list[tuple[int, int, Address]]) -> list[Pool | None]:
        owners: list[Pool | None] = [None] * NUM_SLOTS
        if self._closed:
            return owners
        for first, last, address in ranges:
            if address not in self._pools:
                self._pools[address] = self._new_pool(address)
            owners[first : last + 1] = [self._pools[address]] * (last - first + 1)
        for address in set(self._pools) - {address for _, _, address in ranges}:
            self._pools.pop(address).close()
        self._owners = owners
        self._learnt_at = self._clock()
        return owners

    def _new_pool(self, address: Address) -> Pool:
        label = f"{self._options.name} {address}"
        return Pool(label, lambda deadline: self._connect(address, deadline), self._options.num_connections)

    def _ask_any(self, addresses: list[Address], deadline: Deadline) -> list[tuple[int, int, Address]]:
        causes = []
        for index, address in enumerate(addresses):
            try:
                short = share(deadline, len(addresses) - index, self._options.connect_timeout_s)
                return _slot_ranges(self._ask(address, short), address)
            except StoreError as error:
                causes.append(str(error))
        raise StoreUnavailable(f"{self._options.name} cluster: no node tells its slots ({'; '.join(causes)})"[:400])

    def _ask(self, address: Address, deadline: Deadline) -> Reply:
        wire = self._connect(address, deadline)
        try:
            return ask(wire, deadline, b"CLUSTER", b"SLOTS")
        finally:
            wire.close()


def _slot_ranges(reply: Reply, asked: Address) -> list[tuple[int, int, Address]]:
    """`[first, last, [host, port, ...], replicas...]` as (first, last, master); an empty host is the one asked."""
    ranges = []
    for item in reply if isinstance(reply, list) else [reply]:
        match item:
            case [int(first), int(last), [bytes() | None as host, int(port), *_], *_] if (
                0 <= first <= last < NUM_SLOTS and 0 < port < 65536
            ):
                name = host.decode("ascii", "replace") if host and host != b"?" else asked.host
                ranges.append((first, last, Address(name, port)))
            case _:
                raise StoreUnavailable("CLUSTER SLOTS was answered with something else")
    return ranges
