"""One connection of an engine to the controller: messages in, answers out, in order.

All ports understand all operations: an engine registers, asks and sends its heartbeat on the reply port and tells
what it holds on the pull port, on which it is also told what to do. wire/README.md lists the operations.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from lmcache_ext.daemons.controller_directory import Directory, Engine
from lmcache_ext.daemons.controller_hashing import read_hashing
from lmcache_ext.stores.tokens import Token
from lmcache_ext.wire import controller as wire
from lmcache_ext.wire.stream import WireError
from lmcache_ext.wire.v2 import MAX_BATCH_KEYS, decode_keys

logger = logging.getLogger("lmcache_ext.daemons.controller")

READ_BYTES = 64 * 1024
HELLO_S = 10.0
MAX_KEY_BYTES = 128
MAX_TIERS = 16
MAX_ENGINES = 4096
"""Registered at once: who registers under ever new names is stopped here."""
MAX_PEERS = 16
"""Named in one answer, which must fit a message; chunks of others are left out."""


class Hub(Protocol):
    """What a connection needs of the controller."""

    directory: Directory
    counters: Counter[str]
    token: Token

    def now(self) -> float: ...
    def new_session(self) -> str: ...
    def attached(self, session: str, link: Link) -> None: ...
    def done(self, event: str, num_chunks: int) -> None: ...
    def say_once(self, text: str) -> None: ...

    @property
    def heartbeat_s(self) -> float: ...


class Link:
    """Threads: the event loop's. A request that cannot be understood is answered so; bytes that cannot end the link."""

    def __init__(self, hub: Hub, writer: asyncio.StreamWriter) -> None:
        self._hub = hub
        self._writer = writer
        self._is_welcome = False
        self._decoder = wire.MessageDecoder()
        self.session = ""
        """The one that tells on this link what it holds."""
        peer = writer.get_extra_info("peername")
        self._ip = str(peer[0]) if peer else ""
        self._operations: Mapping[str, Callable[[wire.Message], dict[str, Any]]] = {
            "register": self._register,
            "leave": self._leave,
            "heartbeat": self._heartbeat,
            "locate": self._locate,
            "attach": self._attach,
            "begin_sync": self._begin_sync,
            "keys": self._keys,
            "end_sync": self._end_sync,
            "done": self._done,
        }

    async def run(self, reader: asyncio.StreamReader, idle_s: float) -> None:
        """Answer until the engine goes, is silent for longer than `idle_s`, or talks nonsense.

        One that tells on this link what it holds may be silent here: it lives by its heartbeats.
        """
        with suppress(OSError, TimeoutError):
            while True:
                patience_s = idle_s if self._is_welcome else min(idle_s, HELLO_S)
                async with asyncio.timeout(None if self.session else patience_s):
                    data = await reader.read(READ_BYTES)
                if not data:
                    break
                self._decoder.feed(data)
                if not self._answer_all():
                    break
                async with asyncio.timeout(idle_s):
                    await self._writer.drain()
        if self.session:
            self._hub.directory.detach(self.session)

    def push(self, fields: Mapping[str, Any]) -> None:
        """Tell the engine to do something."""
        self._writer.write(wire.encode(fields))

    def close(self) -> None:
        self._writer.close()

    def _answer_all(self) -> bool:
        """Answer every message that is complete; False where the stream is of no use."""
        try:
            while (message := self._decoder.head()) is not None:
                self._hub.counters["messages"] += 1
                answer = {"re": _id_of(message), **self._answer(message)}
                self._writer.write(wire.encode(answer))
                if answer.get("code") == "token":
                    return False
        except WireError as error:
            self._hub.counters["malformed"] += 1
            self._hub.say_once(f"{self._ip}: closed: {error}")
            self._writer.write(wire.encode({"error": str(error)[:200], "code": "malformed"}))
            return False
        return True

    def _answer(self, message: wire.Message) -> dict[str, Any]:
        try:
            op = message.op
            if op == "hello":
                return self._hello(message)
            if not self._is_welcome:
                return {"error": "hello comes first", "code": "token"}
            if op not in self._operations:
                return {"error": f"{op[:40]!r} is no operation of this controller", "code": "unknown"}
            return self._operations[op](message)
        except WireError as error:
            self._hub.counters["refused"] += 1
            return {"error": str(error)[:200], "code": "refused"}

    # -- operations

    def _hello(self, message: wire.Message) -> dict[str, Any]:
        if not self._hub.token.accepts(message.get("token", str, "").encode()):
            self._hub.counters["unauthorized"] += 1
            logger.warning("%s: the token is missing or wrong", self._ip)
            return {"error": "the token is missing or wrong: set controller_token_file", "code": "token"}
        self._is_welcome = True
        return {"ok": True, "version": wire.VERSION}

    def _register(self, message: wire.Message) -> dict[str, Any]:
        engine, session = _engine(message, self._ip), self._hub.new_session()
        if len(self._hub.directory) >= MAX_ENGINES and not self._hub.directory.knows(engine.name):
            return {"error": f"{MAX_ENGINES} engines have registered, and no more may", "code": "full"}
        if not self._hub.directory.register(engine, session, self._hub.now()):
            text = f"another engine that lives is {engine.instance!r}, worker {engine.worker}: set lmcache_instance_id"
            return {"error": text, "code": "taken"}
        logger.info("%s registered from %s, peer %s", _name(engine), engine.ip, engine.peer_url or "none")
        return {"ok": True, "session": session, "heartbeat_s": self._hub.heartbeat_s, "max_keys": MAX_BATCH_KEYS}

    def _leave(self, message: wire.Message) -> dict[str, Any]:
        session = message.get("session", str)
        holder = self._hub.directory.get(session)
        if holder is not None:
            logger.info("%s left", _name(holder.engine))
        return {"ok": self._hub.directory.withdraw(session)}

    def _heartbeat(self, message: wire.Message) -> dict[str, Any]:
        session = message.get("session", str)
        known = self._hub.directory.seen(session, self._hub.now())
        holder = self._hub.directory.get(session)
        self._hub.counters["heartbeats"] += 1
        in_step = holder is not None and (holder.is_in_step or holder.is_telling)
        return {"ok": known, "sync": known and not in_step}

    def _locate(self, message: wire.Message) -> dict[str, Any]:
        namespace = _namespace(message)
        asking = (message.get("instance", str, ""), message.get("worker", int, 0))
        found = self._hub.directory.locate(namespace, decode_keys(message.body), but=asking)
        self._hub.counters["lookups"] += 1
        named = {holder.engine.name: holder.engine for holder in found if holder is not None}
        engines = dict(list(named.items())[:MAX_PEERS])
        places = {name: index for index, name in enumerate(engines)}
        return {
            "ok": True,
            "peers": [[*name, engine.peer_url, engine.lookup_url] for name, engine in engines.items()],
            "at": [-1 if holder is None else places.get(holder.engine.name, -1) for holder in found],
        }

    def _attach(self, message: wire.Message) -> dict[str, Any]:
        session = message.get("session", str)
        if not self._hub.directory.attach(session, self._hub.now()):
            return {"ok": False}
        self.session = session
        self._hub.attached(session, self)
        return {"ok": True}

    def _begin_sync(self, message: wire.Message) -> dict[str, Any]:
        begun = self._hub.directory.begin_sync(self.session, message.get("number", int), self._hub.now())
        return {"ok": begun}

    def _keys(self, message: wire.Message) -> dict[str, Any]:
        keys, num_added = decode_keys(message.body), message.get("added", int)
        if not 0 <= num_added <= len(keys) or any(len(key) > MAX_KEY_BYTES for key in keys):
            raise WireError(f"{num_added} of {len(keys)} keys are new, or one is longer than {MAX_KEY_BYTES} bytes")
        directory, number = self._hub.directory, message.get("number", int)
        ok = directory.announce(self.session, number, keys[:num_added], keys[num_added:], self._hub.now())
        return {"ok": ok}

    def _end_sync(self, message: wire.Message) -> dict[str, Any]:
        number, total = message.get("number", int), message.get("total", int)
        return {"ok": self._hub.directory.end_sync(self.session, number, total, self._hub.now())}

    def _done(self, message: wire.Message) -> dict[str, Any]:
        self._hub.done(message.get("event", str), message.get("chunks", int, 0))
        return {"ok": True}


def _id_of(message: wire.Message) -> int:
    number = message.fields.get("id", 0)
    return number if isinstance(number, int) and abs(number) < 2**53 else 0


def _engine(message: wire.Message, ip: str) -> Engine:
    tiers, hashing = message.fields.get("tiers", []), message.fields.get("hashing")
    if not isinstance(tiers, list) or len(tiers) > MAX_TIERS or not all(isinstance(tier, str) for tier in tiers):
        raise WireError(f"tiers are not at most {MAX_TIERS} names")
    instance, worker = message.get("instance", str), message.get("worker", int, 0)
    if not instance or not 0 <= worker < 2**16:
        raise WireError(f"instance {instance!r} and worker {worker} are no name")
    addresses = [message.get(name, str, "") for name in ("peer_url", "lookup_url")]
    if not all(address.isascii() and address.isprintable() for address in addresses) or not instance.isprintable():
        raise WireError("a name or an address is not printable")
    peer_url, lookup_url = (_from_outside(address, ip) for address in addresses)
    return Engine(
        instance=instance,
        worker=worker,
        boot=message.get("boot", str),
        namespace=_namespace(message),
        chunk_tokens=message.get("chunk_tokens", int, 0),
        row_bytes=message.get("row_bytes", int, 0),
        num_rows=message.get("num_rows", int, 0),
        tiers=tuple(tier[: wire.MAX_NAME_CHARS] for tier in tiers),
        ip=ip,
        port=message.get("port", int, 0),
        peer_url=peer_url,
        lookup_url=lookup_url,
        hashing=read_hashing(hashing) if isinstance(hashing, dict) else None,
    )


def _from_outside(address: str, ip: str) -> str:
    """An address that listens on all interfaces, as others reach it."""
    for anywhere in ("0.0.0.0:", "[::]:"):
        if address.startswith(anywhere):
            return (f"[{ip}]:" if ":" in ip else f"{ip}:") + address.removeprefix(anywhere)
    return address


def _namespace(message: wire.Message) -> bytes:
    text = message.get("namespace", str)
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise WireError(f"namespace {text[:40]!r} is not hexadecimal") from error


def _name(engine: Engine) -> str:
    return f"{engine.instance} (worker {engine.worker})"
