"""What the controller answers over HTTP, under the names that LMCache's controller has.

Questions are anybody's who reaches the port. Verbs that change an engine need the token where there is one, and are
refused where the port is reachable from other machines and there is none. What no engine here can do is 501.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lmcache_ext.daemons.controller_directory import Directory, Holder
from lmcache_ext.daemons.controller_hashing import MAX_TOKEN, Hashing
from lmcache_ext.daemons.controller_http import Handler, Request, Response
from lmcache_ext.daemons.controller_link import Link
from lmcache_ext.errors import RequestRefused
from lmcache_ext.stores.tokens import Token

LOCATION = "LocalCPUBackend"
"""LMCache's name for host memory, the only tier that engines tell of."""
MAX_TOKENS = 2**20
MAX_EVENTS = 1024
CLEAR_WAIT_S = 2.0

_NOT_HERE = {
    "/pin": "chunks cannot be pinned: a pinned row is lost to all other requests until somebody unpins it; raise "
    "max_local_cpu_size, or choose cache_policy",
    "/compress": "chunks in host memory are what the GPU reads; remote_serde says how they are written elsewhere",
    "/decompress": "chunks in host memory are never compressed; remote_serde says how they are written elsewhere",
    "/move": "chunks are not moved: an engine fetches what it needs from local_disk, remote_url or a peer",
}


class Controller(Protocol):
    """What the answers are made of."""

    directory: Directory
    links: dict[str, Link]
    counters: Counter[str]
    token: Token

    def now(self) -> float: ...
    def metrics(self) -> str: ...

    @property
    def is_stopping(self) -> bool: ...
    @property
    def is_local(self) -> bool: ...


class Api:
    """Handlers by (method, path). Threads: the event loop's; long prompts are hashed in one of their own."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._events: OrderedDict[str, _Event] = OrderedDict()
        self._hashing = asyncio.Semaphore(2)

    @property
    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {
            ("GET", "/"): self._index,
            ("GET", "/health"): self._health,
            ("GET", "/healthz"): self._health,
            ("POST", "/health"): self._health_of,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/lookup"): self._lookup,
            ("POST", "/query_instance"): self._query_instance,
            ("POST", "/query_worker_info"): self._query_worker_info,
            ("GET", "/controller/workers"): self._workers,
            ("GET", "/controller/key-stats"): self._key_stats,
            ("POST", "/clear"): self._clear,
            ("POST", "/check_finish"): self._check_finish,
            **{("POST", path): self._not_here for path in _NOT_HERE},
        }

    def done(self, event_id: str, num_chunks: int) -> None:
        """An engine has done what it was told."""
        event = self._events.get(event_id.partition("/")[0])
        if event is not None:
            event.end(event_id, num_chunks)

    # -- how it is

    async def _index(self, _: Request) -> Response:
        return Response({"paths": sorted(f"{method} {path}" for method, path in self.routes)})

    async def _health(self, _: Request) -> Response:
        return Response({"status": "stopping"}, 503) if self._controller.is_stopping else Response({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return Response(self._controller.metrics())

    async def _health_of(self, request: Request) -> Response:
        """0 for each worker of which is known all that it holds, 1 for the others."""
        holders = self._holders(_text(request, "instance_id"))
        codes = {str(holder.engine.worker): 0 if holder.is_in_step else 1 for holder in holders}
        return Response({"event_id": _event_id("Health"), "error_codes": codes})

    # -- who is there

    async def _query_instance(self, request: Request) -> Response:
        ip = _text(request, "ip")
        for holder in self._controller.directory:
            if holder.engine.ip == ip:
                return Response({"event_id": _event_id("QueryInst"), "res": holder.engine.instance})
        raise RequestRefused(404, f"no engine has registered from {ip}")

    async def _query_worker_info(self, request: Request) -> Response:
        wanted = request.body.get("worker_ids") or []
        if not isinstance(wanted, list):
            raise RequestRefused(422, "worker_ids is not a list of numbers")
        holders = self._holders(_text(request, "instance_id"))
        infos = [self._info(holder) for holder in holders if not wanted or holder.engine.worker in wanted]
        return Response({"event_id": _event_id("QueryWorkerInfo"), "worker_infos": infos})

    async def _workers(self, request: Request) -> Response:
        instance, worker = request.query.get("instance_id"), request.query.get("worker_id")
        infos = [
            {**self._info(holder), "key_count": len(holder.keys), "in_step": holder.is_in_step}
            for holder in self._controller.directory
            if instance in (None, holder.engine.instance) and worker in (None, str(holder.engine.worker))
        ]
        return Response({"workers": infos, "total_count": len(infos)})

    async def _key_stats(self, _: Request) -> Response:
        keys: Counter[str] = Counter()
        workers: Counter[str] = Counter()
        for holder in self._controller.directory:
            keys[holder.engine.instance] += len(holder.keys)
            workers[holder.engine.instance] += 1
        instances = [{"instance_id": name, "key_count": keys[name], "worker_count": workers[name]} for name in workers]
        totals = {"total_key_count": keys.total(), "total_instance_count": len(workers)}
        return Response({**totals, "total_worker_count": workers.total(), "instances": instances})

    def _info(self, holder: Holder) -> dict[str, Any]:
        engine, age = holder.engine, time.time() - self._controller.now()
        return {
            "instance_id": engine.instance,
            "worker_id": engine.worker,
            "ip": engine.ip,
            "port": engine.port,
            "peer_init_url": engine.peer_url or None,
            "registration_time": round(holder.registered_at + age, 3),
            "last_heartbeat_time": round(holder.seen_at + age, 3),
            "namespace": engine.namespace.hex(),
            "chunk_tokens": engine.chunk_tokens,
            "tiers": list(engine.tiers),
        }

    def _holders(self, instance: str) -> list[Holder]:
        """Of one instance, or of "all"; RequestRefused where there is none of that name."""
        holders = [one for one in self._controller.directory if instance in ("all", one.engine.instance)]
        if not holders and instance != "all":
            known = ", ".join(sorted({one.engine.instance for one in self._controller.directory})) or "none"
            raise RequestRefused(404, f"no instance {instance[:100]!r} has registered; known are: {known}")
        return holders

    # -- what is where

    async def _lookup(self, request: Request) -> Response:
        """How many of the first tokens each instance holds in host memory, the longest first."""
        self._controller.counters["http_lookups"] += 1
        space = request.body.get("namespace")
        holders = [one for one in self._controller.directory if space in (None, one.engine.namespace.hex())]
        found: Counter[str] = Counter()
        for namespace, keys in await self._keys(request, holders):
            prefixes = self._controller.directory.prefixes(namespace, keys)
            for holder in holders:
                chunks = prefixes.get(holder.engine.name, 0) if holder.engine.namespace == namespace else 0
                tokens = chunks * holder.engine.chunk_tokens
                if tokens > found[holder.engine.instance]:
                    found[holder.engine.instance] = tokens
        layout = {instance: [LOCATION, tokens] for instance, tokens in found.most_common() if tokens}
        return Response({"event_id": _event_id("Lookup"), "layout_info": layout})

    async def _keys(self, request: Request, holders: Sequence[Holder]) -> list[tuple[bytes, list[bytes]]]:
        """The keys of the chunks that are asked for, for each namespace of `holders`."""
        if "chunk_hashes" in request.body:
            keys = _hashes(request.body["chunk_hashes"])
            return [(namespace, keys) for namespace in {one.engine.namespace for one in holders}]
        tokens = _tokens(request.body)
        schemes = {one.engine.namespace: one.engine.hashing for one in holders}
        if holders and not any(schemes.values()):
            raise RequestRefused(
                422,
                "the hashes of these engines cannot be made from tokens here: serve with --prefix-caching-hash-algo "
                "sha256_cbor or sha256 and one KV cache group, or send chunk_hashes",
            )
        async with self._hashing:
            return await asyncio.to_thread(_hash_all, schemes, tokens)

    # -- what engines are told

    async def _clear(self, request: Request) -> Response:
        """Host memory of an instance gives up every chunk that no transfer needs; vLLM's own cache stays."""
        self._admit(request)
        location = request.body.get("location") or LOCATION
        if location != LOCATION:
            raise RequestRefused(
                501, f"location {str(location)[:100]!r} is not cleared from here; {LOCATION} is: host memory"
            )
        holders = self._holders(_text(request, "instance_id"))
        links = self._controller.links
        told = [holder for holder in holders if holder.is_attached and holder.session in links]
        if not told:
            raise RequestRefused(503, "the instance has registered, but is not connected now; try again")
        event_id = _event_id("Clear")
        event = self._remember(event_id, told)
        for holder in told:
            links[holder.session].push({"op": "do", "event": f"{event_id}/{holder.session}", "verb": "clear"})
        await event.wait(CLEAR_WAIT_S)
        return Response({"event_id": event_id, "num_tokens": event.num_tokens, "status": event.status})

    async def _check_finish(self, request: Request) -> Response:
        event_id = _text(request, "event_id")
        if event_id not in self._events:
            raise RequestRefused(404, f"no event {event_id[:100]!r}; the last {MAX_EVENTS} are remembered")
        event = self._events[event_id]
        return Response({"status": event.status, "num_tokens": event.num_tokens})

    async def _not_here(self, request: Request) -> Response:
        raise RequestRefused(501, _NOT_HERE[request.path.rstrip("/")])

    def _admit(self, request: Request) -> None:
        if self._controller.token.is_needed:
            if not self._controller.token.accepts(request.token.encode()):
                self._controller.counters["unauthorized"] += 1
                raise RequestRefused(401, "send Authorization: Bearer and the token of --auth-token-file")
        elif not self._controller.is_local:
            raise RequestRefused(
                403, "this port is reachable from other machines and asks for no token: start with --auth-token-file"
            )

    def _remember(self, event_id: str, told: Sequence[Holder]) -> _Event:
        event = _Event({f"{event_id}/{holder.session}": holder.engine.chunk_tokens for holder in told})
        self._events[event_id] = event
        while len(self._events) > MAX_EVENTS:
            self._events.popitem(last=False)
        return event


class _Event:
    """Something that several engines were told to do; `waiting` maps what each will call it to its chunk's tokens."""

    def __init__(self, waiting: dict[str, int]) -> None:
        self._waiting = waiting
        self._ended = asyncio.Event()
        self.num_tokens = 0

    @property
    def status(self) -> str:
        return "in_progress" if self._waiting else "finished"

    def end(self, name: str, num_chunks: int) -> None:
        if name in self._waiting:
            self.num_tokens += max(num_chunks, 0) * self._waiting.pop(name)
        if not self._waiting:
            self._ended.set()

    async def wait(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return


def _event_id(kind: str) -> str:
    return f"{kind}{uuid.uuid4()}"


def _text(request: Request, name: str) -> str:
    value = request.body.get(name)
    if not isinstance(value, str) or not value:
        raise RequestRefused(422, f"{name} is missing, or no text")
    return value


def _tokens(body: Mapping[str, Any]) -> list[int]:
    tokens = body.get("tokens")
    if tokens is None and ("text" in body or "prompt" in body or "messages" in body):
        raise RequestRefused(
            422, "the controller has no tokenizer: POST the text to /tokenize of a model server, and send tokens"
        )
    if not isinstance(tokens, list):
        raise RequestRefused(422, "tokens is missing, or no list of token ids; chunk_hashes is the other way to ask")
    if len(tokens) > MAX_TOKENS:
        raise RequestRefused(413, f"{len(tokens)} tokens, at most {MAX_TOKENS} are looked up")
    if not all(type(token) is int and 0 <= token <= MAX_TOKEN for token in tokens):
        raise RequestRefused(422, f"tokens are whole numbers from 0 to {MAX_TOKEN}")
    return tokens


def _hashes(texts: object) -> list[bytes]:
    try:
        if not isinstance(texts, list) or len(texts) > MAX_TOKENS:
            raise ValueError("no list, or too long a one")
        return [bytes.fromhex(text) for text in texts]
    except (TypeError, ValueError) as error:
        raise RequestRefused(422, f"chunk_hashes is not a list of keys in hexadecimal: {error}") from error


def _hash_all(schemes: Mapping[bytes, Hashing | None], tokens: Sequence[int]) -> list[tuple[bytes, list[bytes]]]:
    made = {scheme: scheme.keys(tokens) for scheme in set(schemes.values()) if scheme is not None}
    return [(namespace, made[scheme]) for namespace, scheme in schemes.items() if scheme is not None]
