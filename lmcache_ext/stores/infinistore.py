"""The face of InfiniStore's client: one RDMA connection, its codes as errors.

The client raises bare `Exception` for whatever fails, has no deadlines, and its socket is not for several threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import infinistore
import numpy as np

from lmcache_ext.errors import StoreError, StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.infinistore_options import InfinistoreOptions
from lmcache_ext.stores.registered import address_of

logger = logging.getLogger("vllm.lmcache_ext.stores.infinistore")

OK = 200
TOO_SMALL = 400
NOT_FOUND = 404
OUT_OF_MEMORY = 507
_GIVE_UP_S = 60.0


class Slot:
    """Registered memory for one object at a time. The client cannot unregister, so slots live as long as it does."""

    def __init__(self, num_bytes: int) -> None:
        self._array = np.zeros(num_bytes, np.uint8)
        self.address = address_of(self._array)
        self.data = self._array.data

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


class Client:
    """A connection that is set up.

    Threads:  any number; what goes over the socket goes one call after the other.
    Order:    the server's.
    Owner:    of slots handed out: one belongs to the client again when its transfer has ended, however late.
    Failure:  StoreError. After any but StoreFull the connection is of no use: retire it.
    """

    def __init__(self, options: InfinistoreOptions) -> None:
        self._socket = threading.Lock()
        self._slots_lock = threading.Lock()
        self._free: list[Slot] = []
        self._lost: list[Slot] = []
        with _failures(f"connect to {options.host}:{options.port}"):
            self._connection = infinistore.InfinityConnection(
                infinistore.ClientConfig(
                    host_addr=options.host,
                    service_port=options.port,
                    log_level="error",
                    connection_type=infinistore.TYPE_RDMA,
                    ib_port=options.ib_port,
                    link_type=options.link_type,
                    dev_name=options.device,
                )
            )
            self._connection.connect()

    def exist(self, names: Sequence[str]) -> list[bool]:
        """A round trip each: the protocol has no more."""
        with self._socket, _failures("exists"):
            return [self._connection.check_exist(name) for name in names]

    def remove(self, names: Sequence[str]) -> None:
        with self._socket, _failures("delete"):
            self._connection.delete_keys(list(names))

    def slot(self, num_bytes: int) -> Slot:
        """Registered memory of at least so many bytes."""
        with self._slots_lock:
            fitting = [slot for slot in self._free if slot.num_bytes >= num_bytes]
            if fitting:
                self._free.remove(fitting[0])
                return fitting[0]
        slot = Slot(num_bytes)
        with self._socket, _failures(f"register {num_bytes} bytes"):
            self._connection.register_mr(slot.address, slot.num_bytes)
        return slot

    def give_back(self, slot: Slot) -> None:
        with self._slots_lock:
            self._free.append(slot)

    def write(self, name: str, slot: Slot, num_bytes: int) -> int:
        """Store the first bytes of a slot; the server's code."""
        return self._transfer(self._connection.conn.w_rdma_async, name, slot, num_bytes)

    def read(self, name: str, slot: Slot) -> int:
        """Fill a slot with an object, from its beginning; the server's code: TOO_SMALL where it is longer."""
        return self._transfer(self._connection.conn.r_rdma_async, name, slot, slot.num_bytes)

    def close(self, timeout_s: float) -> None:
        with _ignored():
            self._connection.close()

    def _transfer(self, start: Callable[..., int], name: str, slot: Slot, num_bytes: int) -> int:
        """Begin, and wait for the client's thread to call back. The documented forms of it need an event loop."""
        answer: Future[int] = Future()
        with self._socket, _failures("transfer"):
            code = start([name], [0], num_bytes, slot.address, answer.set_result)
        if code < 0:
            return code
        try:
            return answer.result(_GIVE_UP_S)
        except TimeoutError:
            self._lost.append(slot)  # its bytes may still move, until the connection is closed
            raise StoreTimeout(f"infinistore: no answer within {_GIVE_UP_S} s") from None


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """The client's failures as ours; it raises bare `Exception`s, so nothing narrower catches them."""
    try:
        yield
    except Exception as error:
        raise StoreUnavailable(f"infinistore: {what}: {error}") from error


@contextmanager
def _ignored() -> Iterator[None]:
    """For closing: the connection is given up either way, and the client raises bare `Exception`s."""
    try:
        yield
    except Exception:
        logger.debug("infinistore: closing failed", exc_info=True)


def error_of(code: int, what: str) -> StoreError:
    """The failure behind a code that is neither OK nor a miss."""
    if code == OUT_OF_MEMORY:
        return StoreFull(f"infinistore: {what}: the server has no room ({code})")
    return StoreUnavailable(f"infinistore: {what}: failed ({code})")
