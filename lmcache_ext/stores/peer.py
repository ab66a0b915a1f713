"""Chunks in the host memory of other engines: the controller says whose, and they are fetched from there.

Nothing is written. What the controller says is advice: a peer that is gone, that has evicted the chunk meanwhile or
sends something else gives a miss, and is left alone for a while where it does not answer at all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmcache_ext.errors import ConfigError, StoreError, StoreUnavailable
from lmcache_ext.stores.base import NAMESPACE_BYTES, Store, Usage
from lmcache_ext.stores.controller import ControllerLink, Door
from lmcache_ext.stores.lmserver import LMServerStore, Settings, parse_addresses
from lmcache_ext.wire.stream import WireError
from lmcache_ext.wire.v2 import MAX_BATCH_KEYS, encode_keys

logger = logging.getLogger("vllm.lmcache_ext.stores.peer")

MAX_REMEMBERED = 65536
MAX_PEERS = 256
AVOID_S = 5.0
LOCATION = "LocalCPUBackend"
"""What LMCache calls host memory, in the line that people look for."""


class PeerStore(Store):
    """See the module's docstring.

    Threads:  any number; the question to the controller is asked by one at a time.
    Order:    what `exists` has learned of a key is where `get_into` asks for it.
    Owner:    of its connections, until `close`.
    Failure:  StoreTimeout, StoreUnavailable where the controller cannot be asked; a failure of a peer is a miss.
    """

    def __init__(
        self, door: Door, *, instance: str, worker: int, lookup_timeout_s: float, timeout_s: float, name: str = "peer"
    ) -> None:
        """`instance` and `worker` are this engine's, which never asks itself."""
        self.name = name
        self._door = replace(door, timeout_s=lookup_timeout_s)
        self._asking = {"op": "locate", "instance": instance, "worker": worker}
        self._settings = Settings(
            token_file=door.token_file or "", lookup_timeout_s=lookup_timeout_s, timeout_s=timeout_s, num_connections=4
        )
        self._lock = threading.Lock()
        self._link_lock = threading.Lock()
        self._link: ControllerLink | None = None
        self._places: OrderedDict[bytes, str] = OrderedDict()
        self._peers: OrderedDict[str, LMServerStore] = OrderedDict()
        self._avoided: dict[str, float] = {}
        self._lookup_urls: dict[str, str] = {}
        self._met: set[str] = set()

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """One question to the controller, for up to MAX_BATCH_KEYS keys."""
        found: list[bool] = []
        for begin in range(0, len(keys), MAX_BATCH_KEYS):
            found += self._locate(keys[begin : begin + MAX_BATCH_KEYS])
        return found

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        outcome = self.get_many_into([key], [parts])[0]
        if isinstance(outcome, StoreError):
            raise outcome
        return outcome

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        """From each peer its chunks, over one connection; one peer after the other."""
        outcomes: list[int | StoreError | None] = [None] * len(keys)
        with self._lock:
            by_peer: dict[str, list[int]] = {}
            for index, key in enumerate(keys):
                if key in self._places:
                    by_peer.setdefault(self._places[key], []).append(index)
        for url, indexes in by_peer.items():
            wanted, targets = [keys[index] for index in indexes], [parts_per_key[index] for index in indexes]
            for index, outcome in zip(indexes, self._fetch(url, wanted, targets), strict=True):
                outcomes[index] = outcome
                if outcome is None:
                    self._forget(keys[index])
        return outcomes

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        """Never: what this engine holds its peers fetch."""
        raise StoreUnavailable("peers are read, not written")

    def delete(self, keys: Sequence[bytes]) -> None:
        """Do not ask there again until the controller names the place anew."""
        for key in keys:
            self._forget(key)

    def ping(self) -> float:
        started_at = time.monotonic()
        self._ask({**self._asking, "namespace": ""}, b"")
        return time.monotonic() - started_at

    def usage(self) -> Usage:
        """Other engines' memory is theirs to count."""
        return Usage(None, None, None)

    def close(self) -> None:
        with self._link_lock:
            if self._link is not None:
                self._link.close()
                self._link = None
        with self._lock:
            peers, self._peers = list(self._peers.values()), OrderedDict()
        for peer in peers:
            peer.close()

    # -- the controller

    def _locate(self, keys: Sequence[bytes]) -> list[bool]:
        if not keys:
            return []
        namespace = keys[0][:NAMESPACE_BYTES]
        names = [key[NAMESPACE_BYTES:] for key in keys]
        answer = self._ask({**self._asking, "namespace": namespace.hex()}, encode_keys(names))
        peers, at = answer.get("peers"), answer.get("at")
        if not isinstance(peers, list) or not isinstance(at, list) or len(at) != len(keys):
            raise WireError(f"the controller's answer is none for {len(keys)} keys")
        urls = [_url_of(peer) for peer in peers]
        now, found = time.monotonic(), []
        with self._lock:
            for key, index in zip(keys, at, strict=True):
                url = urls[index] if isinstance(index, int) and 0 <= index < len(urls) else None
                found.append(url is not None and self._avoided.get(url, 0.0) <= now)
                if url is not None and found[-1]:
                    self._places[key] = url
                    self._places.move_to_end(key)
            while len(self._places) > MAX_REMEMBERED:
                self._places.popitem(last=False)
        self._tell(peers, urls, at)
        return found

    def _ask(self, fields: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Over the connection that is kept; once more over a new one where that was closed meanwhile."""
        with self._link_lock:
            for is_kept in (True, False):
                link = self._link if is_kept else None
                if is_kept and link is None:
                    continue
                try:
                    if link is None:
                        link = self._link = ControllerLink(self._door).open()
                    return dict(link.ask(fields, body, self._settings.lookup_timeout_s).fields)
                except StoreError:
                    if self._link is not None:
                        self._link.close()
                    self._link = None
                    if not is_kept:
                        raise
        raise AssertionError("unreachable")

    def _tell(self, peers: Sequence[Any], urls: Sequence[str | None], at: Sequence[object]) -> None:
        """Once for each peer, who it is."""
        for index, (peer, url) in enumerate(zip(peers, urls, strict=True)):
            if url is not None and url not in self._lookup_urls and len(self._lookup_urls) < MAX_PEERS:
                self._lookup_urls[url] = str(peer[3])[:256]
                layout = (peer[0], LOCATION, at.count(index), url)
                logger.info("Got layout info from controller: %s", layout)

    # -- peers

    def _fetch(
        self, url: str, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        """A failure of the peer is a miss of all that did not come."""
        peer = self._peer(url)
        if peer is None:
            return [None] * len(keys)
        outcomes = peer.get_many_into(keys, parts_per_key)
        failure = next((outcome for outcome in outcomes if isinstance(outcome, StoreError)), None)
        if failure is not None:
            self._avoid(url, failure)
        elif url not in self._met:
            self._met.add(url)
            lookup_url = self._lookup_urls.get(url, "")
            logger.info("Established connection to peer_init_url %s. The peer_lookup_url: %s", url, lookup_url)
        return [None if isinstance(outcome, StoreError) else outcome for outcome in outcomes]

    def _peer(self, url: str) -> LMServerStore | None:
        with self._lock:
            if self._avoided.get(url, 0.0) > time.monotonic():
                return None
            if url not in self._peers:
                try:
                    (address,) = parse_addresses(f"lm://{url}")
                except (ConfigError, ValueError):
                    return None
                self._peers[url] = LMServerStore(address, self._settings, name=f"peer {url}")
            self._peers.move_to_end(url)
            gone = [self._peers.popitem(last=False)[1] for _ in range(len(self._peers) - MAX_PEERS)]
            peer = self._peers[url]
        for each in gone:
            each.close()
        return peer

    def _avoid(self, url: str, failure: StoreError) -> None:
        with self._lock:
            now = time.monotonic()
            is_new = self._avoided.get(url, 0.0) <= now
            self._avoided = {each: until for each, until in self._avoided.items() if until > now}
            self._avoided[url] = now + AVOID_S
        self._met.discard(url)
        if is_new:
            logger.warning("Peer %s: %s; its chunks are misses for %g s", url, failure, AVOID_S)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._places.pop(key, None)


def _url_of(peer: object) -> str | None:
    """The address of a peer as the controller names it: [instance, worker, address, lookup address]."""
    is_one = isinstance(peer, list) and len(peer) == 4 and isinstance(peer[2], str)
    return peer[2] if is_one and isinstance(peer, list) and len(peer[2]) <= 256 else None
