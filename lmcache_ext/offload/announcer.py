"""Tells the controller who this engine is and what its host memory holds, and hears what it should do.

One thread, which the engine never waits for. A controller that is away costs a reconnect now and then; one that
comes back, or has missed something, is told everything anew.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.logger import init_logger

from lmcache_ext.config import Config, Controller, Peer
from lmcache_ext.errors import ConfigError, StoreError, StoreRefused, StoreUnavailable
from lmcache_ext.frame import FRAME_BYTES
from lmcache_ext.offload.cores import leave_compute_cores
from lmcache_ext.offload.far import of_rank
from lmcache_ext.offload.holdings import Holdings
from lmcache_ext.offload.host import HostTier
from lmcache_ext.offload.identity import hashing
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.offload.peer_rows import PeerRows
from lmcache_ext.offload.settings import Settings
from lmcache_ext.stores.controller import ControllerLink, Door, door
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.stores.peer_server import PeerServer
from lmcache_ext.wire.v2 import MAX_BATCH_KEYS, encode_keys

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

logger = init_logger("vllm.lmcache_ext.offload.announcer")

HEARTBEAT_S = 10.0
MIN_BACKOFF_S = 0.2
MAX_BACKOFF_S = 15.0
LEAVE_S = 1.0
_LINGER_S = 0.005  # of the first change, for others to come along
_MAX_TASKS = 64
_MAX_SYNCS = 3


class Task(NamedTuple):
    """The controller asked to clear host memory; it is done in the scheduler's thread."""

    event: str


class Announcer:
    """See the module's docstring.

    Threads:  `serve`, `open` and `close` in the scheduler's; the rest in its own.
    Order:    changes reach the controller in the order in which they happened.
    Owner:    of its thread and connections, until `close`, which may be called twice.
    Failure:  none gets out; one line in the log per change of state.

    `engine` is what the engine says of itself when it registers.
    """

    def __init__(self, settings: Controller, engine: Mapping[str, Any]) -> None:
        assert settings.pull_url is not None
        assert settings.reply_url is not None
        self.holdings = Holdings(self._wake)
        self._engine = {**engine, "boot": secrets.token_hex(8)}
        self._pull = door(settings.pull_url, settings.token_file)
        self._reply = door(settings.reply_url, settings.token_file)
        self._heartbeat_s = settings.heartbeat_s or HEARTBEAT_S
        self._delay_s = settings.heartbeat_delay_s
        self._tasks: deque[Task] = deque(maxlen=_MAX_TASKS)
        self._done: deque[tuple[Task, int]] = deque(maxlen=_MAX_TASKS)
        self._awake, self._waker = socket.socketpair()
        self._awake.setblocking(False)
        self._waker.setblocking(False)
        self._is_woken = False
        self._is_closed = threading.Event()
        self._was_up: bool | None = None
        self._troubles: set[str] = set()
        self._thread: threading.Thread | None = None
        self.server: PeerServer | None = None
        """Where peers read what is told here; closed first."""

    def open(self) -> Announcer:
        self._thread = threading.Thread(target=self._run, name="lmcache_ext-controller", daemon=True)
        self._thread.start()
        return self

    def serve(self, host: HostTier) -> None:
        """Do what the controller asked for; between two steps, and before a request is looked up."""
        while self._tasks:
            task = self._tasks.popleft()
            num_chunks = host.evict_all()
            logger.info("The controller asked to clear host memory: %d chunks went", num_chunks)
            self._done.append((task, num_chunks))
            self._wake()

    def close(self) -> None:
        """Leave the controller, as far as that goes within LEAVE_S."""
        self._is_closed.set()
        self._wake()
        if self.server is not None:
            self.server.close()
        if self._thread is not None:
            self._thread.join(LEAVE_S)

    # -- in the thread

    def _run(self) -> None:
        leave_compute_cores()
        backoff_s = MIN_BACKOFF_S
        while not self._is_closed.is_set():
            try:
                self._talk()
            except StoreError as error:
                self._tell_trouble(error)
            if self._was_up:
                backoff_s = MIN_BACKOFF_S
            self._was_up = False
            self._is_closed.wait(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        self._awake.close()
        self._waker.close()

    def _talk(self) -> None:
        """Register and tell until the engine stops; raises StoreError where the controller cannot be told."""
        with contextlib.ExitStack() as stack:
            reply, pull = (_opened(stack, each) for each in (self._reply, self._pull))
            answer = reply.ask({**self._engine, "op": "register"})
            session = answer.get("session", str)
            interval_s = min(self._heartbeat_s, answer.get("heartbeat_s", float, self._heartbeat_s))
            pull.ask({"op": "attach", "session": session})
            self._tell_up()
            telling, beats = _Telling(pull, self.holdings), _Beats(reply, session, interval_s, self._delay_s)
            while not self._is_closed.is_set():
                telling.catch_up()
                self._hear(pull)
                if beats.beat():
                    telling.begin_anew()
                    continue
                self._wait(pull, beats.left_s())
            with contextlib.suppress(StoreError):
                reply.ask({"op": "leave", "session": session}, timeout_s=LEAVE_S / 2)

    def _hear(self, pull: ControllerLink) -> None:
        """Take up what the controller wants, and say what has been done."""
        pull.listen()
        while pull.told:
            message = pull.told.popleft()
            if message.op == "do" and message.fields.get("verb") == "clear":
                self._tasks.append(Task(message.get("event", str)))
        while self._done:
            task, num_chunks = self._done.popleft()
            pull.ask({"op": "done", "event": task.event, "chunks": num_chunks})

    def _wait(self, pull: ControllerLink, left_s: float) -> None:
        poll = select.poll()  # no limit of 1024 descriptors, as select has
        for one in (pull, self._awake):
            poll.register(one, select.POLLIN)
        if self._awake.fileno() in dict(poll.poll(max(left_s, 0.0) * 1000)):
            time.sleep(_LINGER_S)
            with contextlib.suppress(BlockingIOError):
                self._awake.recv(4096)
            self._is_woken = False  # last: a change before this is taken up now, one after it wakes again

    def _wake(self) -> None:
        """In any thread."""
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(OSError):  # full, so it is awake; or closed
                self._waker.send(b"x")

    def _tell_up(self) -> None:
        if self._was_up is None or self._troubles:
            logger.info("Registered at the controller %s as %s", self._reply.address, self._engine["instance"])
        self._was_up = True
        self._troubles.clear()

    def _tell_trouble(self, error: StoreError) -> None:
        """Once that it is away, and once each reason it gives for a refusal, until it is there again."""
        trouble = str(error) if isinstance(error, StoreRefused) else "away"
        if trouble not in self._troubles and not self._is_closed.is_set():
            self._troubles.add(trouble)
            logger.warning("%s; the engine goes on without it and tries again", error)


def join_controller(
    vllm_config: VllmConfig, settings: Settings, namespace: str | None, scheduler: OffloadingConnectorScheduler
) -> Announcer | None:
    """Where the configuration names a controller, tell it of this engine from here on."""
    config = settings.config
    if not config.controller.enabled:
        return None
    if namespace is None:
        logger.warning("enable_controller: the controller is told nothing, as no other process has keys like these")
        return None
    manager = scheduler.manager
    assert isinstance(manager, BoundedTieringManager)
    rank = vllm_config.parallel_config.data_parallel_rank
    groups = scheduler.config.kv_group_configs
    sizes = {"tokens_per_hash": scheduler.config.tokens_per_hash, "hashes_per_chunk": groups[0].hashes_per_chunk}
    engine = {
        "instance": config.instance_id,
        "worker": of_rank(config.controller.worker_ids, rank, rank),
        "port": of_rank(config.controller.worker_ports, rank, 0),
        "namespace": namespace,
        "chunk_tokens": settings.tokens_per_chunk,
        "row_bytes": settings.row_bytes,
        "num_rows": manager.host.num_reserved,
        "tiers": ["host", *(tier.tier_type for tier in manager.far_tiers)],
        "hashing": {**hashing(vllm_config), **sizes} if len(groups) == 1 else {},
        **_peer_urls(config.peer, rank),
    }
    announcer = Announcer(config.controller, engine)
    if config.peer.enabled:
        announcer.server = _serve_peers(config, manager.host, announcer.holdings, bytes.fromhex(namespace), rank)
    manager.host.holdings = announcer.holdings
    return announcer.open()


def _peer_urls(peer: Peer, rank: int) -> dict[str, str]:
    """Where other engines reach this one, as they are told."""
    if not peer.enabled:
        return {}
    assert peer.host is not None
    ports = {"peer_url": of_rank(peer.init_ports, rank, 0), "lookup_url": of_rank(peer.lookup_ports, rank, 0)}
    return {name: str(Address(peer.host, port)) for name, port in ports.items() if port}


def _serve_peers(config: Config, host: HostTier, holdings: Holdings, namespace: bytes, rank: int) -> PeerServer:
    """Raises ConfigError where there is no port for this engine, or it is taken."""
    peer = config.peer
    assert peer.host is not None
    if rank >= len(peer.init_ports):
        raise ConfigError(
            f"{config.origin('p2p_init_ports').text}: p2p_init_ports: {len(peer.init_ports)} ports, and this engine "
            f"is number {rank} of its instance: write one for each"
        )
    ports = [peer.init_ports[rank], *peer.lookup_ports[rank : rank + 1]]
    server = PeerServer(
        peer.host,
        ports,
        partial(PeerRows, host.get_kv_memoryview(), holdings, namespace),
        token_file=config.controller.token_file,
        max_bytes=host.row_bytes + FRAME_BYTES,
    ).open()
    places = " and ".join(str(Address(peer.host, port)) for port in ports)
    logger.info("Peers may read host memory at %s, over TCP", places)
    return server


class _Telling:
    """Says on one connection what host memory holds, numbered."""

    def __init__(self, pull: ControllerLink, holdings: Holdings) -> None:
        self._pull = pull
        self._holdings = holdings
        self._number = 0
        self._num_syncs = 0
        self._must_sync = True

    def begin_anew(self) -> None:
        """The controller does not know all, or does not believe what it knows."""
        self._must_sync = True

    def catch_up(self) -> None:
        """Tell everything that is new."""
        self._num_syncs = 0
        while True:
            if self._must_sync:
                self._sync()
            changes = self._holdings.take(MAX_BATCH_KEYS)
            if changes.is_lost:
                self._must_sync = True
            elif changes.added or changes.dropped:
                self._say({"op": "keys", "added": len(changes.added)}, [*changes.added, *changes.dropped])
            elif not self._must_sync:
                return

    def _sync(self) -> None:
        self._num_syncs += 1
        if self._num_syncs > _MAX_SYNCS:
            raise StoreUnavailable(f"the controller asked for everything {_MAX_SYNCS} times in a row")
        self._must_sync = False
        self._say({"op": "begin_sync"})
        keys = self._holdings.snapshot()
        for begin in range(0, len(keys), MAX_BATCH_KEYS):
            part = keys[begin : begin + MAX_BATCH_KEYS]
            self._say({"op": "keys", "added": len(part)}, part)
        self._say({"op": "end_sync", "total": len(keys)})

    def _say(self, fields: Mapping[str, Any], keys: Sequence[bytes] = ()) -> None:
        self._number += 1
        answer = self._pull.ask({**fields, "number": self._number}, encode_keys(keys))
        if not answer.get("ok", bool):
            self._must_sync = True


class _Beats:
    """Heartbeats on one connection."""

    def __init__(self, reply: ControllerLink, session: str, interval_s: float, delay_s: float) -> None:
        self._reply = reply
        self._session = session
        self._interval_s = interval_s
        self._due = time.monotonic() + min(delay_s, interval_s)

    def left_s(self) -> float:
        return self._due - time.monotonic()

    def beat(self) -> bool:
        """Where it is time, say that the engine lives; whether the controller wants to be told everything."""
        if self.left_s() > 0:
            return False
        self._due = time.monotonic() + self._interval_s
        answer = self._reply.ask({"op": "heartbeat", "session": self._session})
        if not answer.get("ok", bool):
            raise StoreUnavailable("the controller does not know this engine any more")
        return answer.get("sync", bool, False)


def _opened(stack: contextlib.ExitStack, place: Door) -> ControllerLink:
    link = ControllerLink(place)
    stack.callback(link.close)
    return link.open()
