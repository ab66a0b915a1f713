"""The face of Mooncake's native client: its codes as errors, and no call into it after its end.

Imported by `mooncake_store.open_mooncake` alone, once the environment says what the client reads from it.
"""

from __future__ import annotations

import atexit
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mooncake.store import MooncakeDistributedStore, ReplicateConfig

from lmcache_ext.errors import StoreError, StoreFull, StoreStalled, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.mooncake_options import MooncakeOptions

OBJECT_NOT_FOUND = -704
_NOT_READY = -703  # being put by somebody: not there yet
_TRANSFER_FAILED = -800
_FULL = {-200: "no segment has room", -1700: "the tenant's quota is used up"}
_TIMEOUT = {-901: "the master did not answer in time"}
_UNAVAILABLE = {
    -1: "internal error",
    -101: "no segment",
    -600: "the client refused the parameters",
    -707: "the lease expired during the transfer",
    _TRANSFER_FAILED: "the transfer failed: is the engine that holds the segment alive?",
    -900: "the master does not answer",
}
_PROBE_S = 10.0
_CERTAIN_S = 55.0  # the client gives a transfer up after 60 s, wherever it is
_LEAVE_AGAIN_S = 2.0


class Client:
    """One native client, set up. Names are text; memory is (address, bytes) and must be registered.

    Threads:  any number; called after its close the native client would end the process, so calls are counted, new
              ones are refused from `close` on, and it waits for the others.
    Order:    the client's.
    Owner:    of nothing in memory; registered memory must stay mapped until `close`.
    Failure:  StoreError, for whatever the client answers.
    """

    def __init__(
        self, options: MooncakeOptions, memory: Sequence[tuple[int, int]], *, certain_s: float = _CERTAIN_S
    ) -> None:
        own_address = options.own_address()
        _probe(options, own_address)
        self._native = MooncakeDistributedStore()
        self._certain_s = certain_s
        self._stall_timeout_s = options.stall_timeout_s
        self._changed = threading.Condition()
        self._num_calls = 0
        self._closed = False
        self.may_still_write = False
        """A read was given up while its bytes were under way: memory it was to fill is safe after `close`."""
        self.has_left = threading.Event()
        self._must_leave = threading.Event()
        with self._calling("set up"):
            code = self._native.setup(
                own_address,
                options.metadata_server,
                options.global_segment_bytes,
                options.local_buffer_bytes,
                options.protocol,
                options.device_name,
                options.master_server_address,
                enable_ssd_offload=options.enable_ssd_offload,
                ssd_offload_path=options.ssd_offload_path,
                tenant_id=options.tenant_id,
                enable_client_http_server=options.enable_client_http_server,
                client_http_port=options.client_http_port,
            )
            _check(code, f"could not join the store of {options.master_server_address}")
            for address, num_bytes in memory:
                code = self._native.register_buffer(address, num_bytes)
                _check(code, f"could not register {num_bytes} bytes (for RDMA, is `ulimit -l` large enough?)")
            self._placement = ReplicateConfig()
            self._placement.replica_num = options.num_replicas
            if options.prefer_local_alloc:
                self._placement.preferred_segment = self._native.get_hostname()

    def exist(self, names: Sequence[str]) -> list[bool]:
        """One round trip to the master."""
        with self._calling("exists"):
            codes = self._native.batch_is_exist(list(names))
        return [_checked(code, "exists") == 1 for code in codes]

    def length(self, name: str) -> int | None:
        """Bytes of an object, None where it is not there. One round trip; the object stays for a lease (5 s)."""
        with self._calling("look up"):
            code: int = self._native.get_size(name)
        return None if code in (OBJECT_NOT_FOUND, _NOT_READY) else _checked(code, "look up")

    def read(
        self, names: Sequence[str], addresses: Sequence[list[int]], sizes: Sequence[list[int]]
    ) -> list[int | StoreError | None]:
        """Scatter each object over its pieces, which must sum up to its length exactly. No copy is made."""
        started_at = time.monotonic()
        with self._calling("get"):
            codes = self._native.batch_get_into_multi_buffers(list(names), list(addresses), list(sizes))
        took_s = time.monotonic() - started_at
        if min(codes) < 0 and took_s > self._certain_s:
            self.may_still_write = True
        if _TRANSFER_FAILED in codes and took_s > self._stall_timeout_s:  # the client does not tell this apart
            stalled = StoreStalled(
                f"mooncake: get: the engine that holds the segment stopped sending for {took_s:.1f} s"
            )
            return [stalled if code == _TRANSFER_FAILED else _read_outcome(code) for code in codes]
        return [_read_outcome(code) for code in codes]

    def write(
        self, names: Sequence[str], addresses: Sequence[list[int]], sizes: Sequence[list[int]]
    ) -> list[StoreError | None]:
        """Gather each object from its pieces. One that is there already is left as it is. No copy is made."""
        with self._calling("put"):
            codes = self._native.batch_put_from_multi_buffers(
                list(names), list(addresses), list(sizes), self._placement
            )
        return [None if code == 0 else _error(code, "put") for code in codes]

    def read_copy(self, name: str) -> memoryview:
        """An object in memory of the client's own, for as long as the view lives. One that is gone is a failure too."""
        with self._calling("get"):
            handle = self._native.get_buffer(name)
        if handle is None:
            raise StoreUnavailable("mooncake: get: no copy: the transfer failed, or local_buffer_size is too small")
        return memoryview(handle).cast("B")

    def write_copy(self, name: str, data: bytes) -> None:
        """Store `data` by way of memory of the client's own. An object that is there already is left as it is."""
        with self._calling("put"):
            _check(self._native.put(name, data, self._placement), "put")

    def remove(self, names: Sequence[str]) -> None:
        """Remove what is there, whether or not somebody is reading it."""
        with self._calling("delete"):
            codes = self._native.batch_remove(list(names), True)
        for code in codes:
            if code not in (OBJECT_NOT_FOUND, _NOT_READY):
                _check(code, "delete")

    def close(self, timeout_s: float) -> None:
        """Leave the store with this engine's segment. Where calls are stuck in the client, it is left to them.

        Waits for it for `timeout_s`; `_leave` goes on by itself where the master is silent.
        """
        with self._changed:
            was_closed, self._closed = self._closed, True
            is_idle = self._changed.wait_for(lambda: self._num_calls == 0, timeout_s)
        if is_idle and not was_closed:
            leaving = threading.Thread(target=self._leave, name="mooncake-leave", daemon=True)
            leaving.start()
            if not self.has_left.wait(timeout_s):
                atexit.register(self._leave_now, leaving)  # a client that is left open ends the process with an abort

    def _leave_now(self, leaving: threading.Thread) -> None:
        """At the end of the process."""
        self._must_leave.set()
        leaving.join()

    def _leave(self) -> None:
        """Top of a thread. Leaving holds Python's lock: for 1 to 2 s, and where the master is silent for as long as the
        client's own timeouts allow (12 to 28 s with 10 s each), in which an engine would stand still. So it waits for
        the master, unless memory is at stake.
        """
        while not self.may_still_write and self._native.batch_is_exist(["leave"])[0] < 0:
            if self._must_leave.wait(_LEAVE_AGAIN_S):
                break
        self._native.close()
        self.has_left.set()

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise StoreUnavailable(f"mooncake: {what}: the connection is closed")
            self._num_calls += 1
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # what a C++ exception becomes
            raise StoreUnavailable(f"mooncake: {what}: {error}") from error
        finally:
            with self._changed:
                self._num_calls -= 1
                self._changed.notify_all()


def _probe(options: MooncakeOptions, own_address: str) -> None:
    """Join and leave in another process (`mooncake_probe` says why). Raises StoreUnavailable, StoreTimeout."""
    host = re.sub(r":[0-9]+$", "", own_address)  # its port is for the client proper
    arguments = [host, options.metadata_server, options.protocol, options.device_name, options.master_server_address]
    command = [sys.executable, "-m", "lmcache_ext.stores.mooncake_probe", *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise StoreTimeout(f"mooncake: could not join within {_PROBE_S} s: {' '.join(arguments)}") from None
    if done.returncode != 0:
        said = done.stderr.strip().rpartition("\n")[2][-200:]
        raise StoreUnavailable(f"mooncake: could not join: {' '.join(arguments)}: {said}")


def _read_outcome(code: int) -> int | StoreError | None:
    if code in (OBJECT_NOT_FOUND, _NOT_READY):
        return None
    return code if code >= 0 else _error(code, "get")


def _error(code: int, what: str) -> StoreError:
    if code in _FULL:
        return StoreFull(f"mooncake: {what}: {_FULL[code]} ({code})")
    if code in _TIMEOUT:
        return StoreTimeout(f"mooncake: {what}: {_TIMEOUT[code]} ({code})")
    return StoreUnavailable(f"mooncake: {what}: {_UNAVAILABLE.get(code, 'failed')} ({code})")


def _checked(code: int, what: str) -> int:
    if code < 0:
        raise _error(code, what)
    return code


def _check(code: int, what: str) -> None:
    """`code` is 0, or an error."""
    if code != 0:
        raise _error(code, what)
