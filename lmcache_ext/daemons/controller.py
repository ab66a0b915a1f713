"""`lmcache_controller`: knows which engine holds which chunk in its host memory; also `lmcache-ext controller` and
`python -m lmcache_ext.daemons.controller`.

    lmcache_controller --host localhost --port 9000 --monitor-ports '{"pull": 8300, "reply": 8400}'
    lmcache_controller --host 0.0.0.0 --auth-token-file /secret/token

Nothing is kept: engines tell a controller that has started anew all that they hold. Exit codes: 0 after SIGTERM or
SIGINT, 2 where the arguments cannot be honoured.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lmcache_ext.daemons.controller_api import Api
from lmcache_ext.daemons.controller_args import parse
from lmcache_ext.daemons.controller_directory import Directory
from lmcache_ext.daemons.controller_http import MAX_HEAD_BYTES, HttpServer
from lmcache_ext.daemons.controller_link import Link
from lmcache_ext.daemons.lm_http import prometheus
from lmcache_ext.daemons.lmserver import bind
from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.stores.sockets import is_loopback
from lmcache_ext.stores.tokens import Token

logger = logging.getLogger("lmcache_ext.daemons.controller")

REFUSED = 2
HEARTBEAT_S = 10.0
SWEEP_S = 1.0
MAX_SAID = 256


class Controller:
    """The directory, the connections of engines, and the numbers.

    Threads:  the event loop's.
    Owner:    of the listeners and the connections; `stop` closes both.
    Failure:  a connection too many is closed; an engine that is silent too long is withdrawn.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        token_file: str | None,
        max_connections: int,
        sweep_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.now = now
        self.counters: Counter[str] = Counter()
        self.links: dict[str, Link] = {}
        """By session, the connection on which an engine tells what it holds."""
        self.is_stopping = False
        self.is_local = True
        self.token = Token(token_file)
        self.token.check()
        self._max_connections = max_connections
        self._sweep_s = sweep_s
        self._api = Api(self)
        self._open: set[Link] = set()
        self._said: set[str] = set()
        self._listeners: list[asyncio.Server] = []
        self._sweeper: asyncio.Task[None] | None = None
        self._started_at = now()

    async def listen(self, http: Sequence[socket.socket], monitors: Sequence[socket.socket]) -> None:
        """Serve bound sockets."""
        self.is_local = all(map(is_loopback, (*http, *monitors)))
        server = HttpServer(self._api.routes)
        for sock in http:
            self._listeners.append(await asyncio.start_server(server.handle, sock=sock, limit=MAX_HEAD_BYTES))
        for sock in monitors:
            self._listeners.append(await asyncio.start_server(self._serve, sock=sock))
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def stop(self) -> None:
        """Accept nothing more and close everything."""
        self.is_stopping = True
        for listener in self._listeners:
            listener.close()
        for link in list(self._open):
            link.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.sleep(0)

    # -- what links and answers ask

    def new_session(self) -> str:
        return secrets.token_hex(8)

    @property
    def heartbeat_s(self) -> float:
        """So often an engine should be heard: three may be lost before it counts as gone."""
        return min(HEARTBEAT_S, self.directory.timeout_s / 4)

    def attached(self, session: str, link: Link) -> None:
        self.links[session] = link

    def done(self, event: str, num_chunks: int) -> None:
        self._api.done(event, num_chunks)

    def say_once(self, text: str) -> None:
        """A warning in the log, and not again: who speaks another protocol comes ten times a second."""
        if text in self._said:
            return
        if len(self._said) >= MAX_SAID:
            self._said.clear()
        self._said.add(text)
        logger.warning("%s", text)

    def metrics(self) -> str:
        """All numbers in Prometheus' text format."""
        holders, counts = list(self.directory), {**self.directory.counters, **self.counters}
        gauges = {
            "registered_workers": ("engines that have registered", len(holders)),
            "workers_in_step": ("engines of which is known all that they hold", sum(one.is_in_step for one in holders)),
            "keys": ("chunks that engines hold, each once per engine", self.directory.num_keys),
            "max_keys": ("the limit of keys", self.directory.max_keys),
            "connections": ("open connections of engines", len(self._open)),
            "uptime_seconds": ("since the start", self.now() - self._started_at),
        }
        totals = {
            "registrations": ("of engines", "registered"),
            "expired_workers": ("withdrawn after --lmcache-worker-timeout", "expired"),
            "name_conflicts": ("registrations refused: a living engine has the name", "taken"),
            "sequence_gaps": ("lost messages, each followed by a full sync", "gaps"),
            "repeated_messages": ("skipped", "repeated"),
            "distrusted_syncs": ("held more than the engine then said it had told", "distrusted"),
            "full_syncs": ("begun", "syncs"),
            "refused_keys": ("beyond --max-keys", "keys_refused"),
            "messages": ("from engines", "messages"),
            "heartbeats": ("from engines", "heartbeats"),
            "peer_lookups": ("by engines", "lookups"),
            "http_lookups": ("by tokens or hashes", "http_lookups"),
            "malformed_streams": ("connections closed", "malformed"),
            "refused_requests": ("by engines", "refused"),
            "unauthorized_requests": ("no token, or a wrong one", "unauthorized"),
            "refused_connections": ("over --max-connections", "connections_refused"),
        }
        families: dict[str, tuple[str, str, Mapping[str, float]]] = {
            **{f"lmcache_controller_{name}": ("gauge", text, {"": float(n)}) for name, (text, n) in gauges.items()},
            **{
                f"lmcache_controller_{name}_total": ("counter", text, {"": float(counts.get(key, 0))})
                for name, (text, key) in totals.items()
            },
        }
        return prometheus(families)

    # -- inside

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Callback of `asyncio.start_server` for the ports of engines."""
        if self.is_stopping or len(self._open) >= self._max_connections:
            self.counters["connections_refused"] += 1
            writer.close()
            return
        link = Link(self, writer)
        self._open.add(link)
        try:
            await link.run(reader, self.directory.timeout_s)
        finally:
            self._open.discard(link)
            if self.links.get(link.session) is link:
                del self.links[link.session]
            writer.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_s)
            for holder in self.directory.expire(self.now()):
                engine = holder.engine
                logger.warning("%s (worker %d) was silent for too long: withdrawn", engine.instance, engine.worker)
                if (link := self.links.get(holder.session)) is not None:
                    link.close()


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    prog = prog or os.path.basename(sys.argv[0]).replace("controller.py", "lmcache_controller")
    arguments = parse(sys.argv[1:] if argv is None else argv, prog)
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format="%(asctime)s %(levelname)s lmcache_controller: %(message)s",
        stream=sys.stderr,
    )
    try:
        asyncio.run(_run(arguments))
    except (ConfigError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return REFUSED
    return 0


async def _run(arguments: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    http = bind(arguments.host, arguments.port)
    monitors = {name: bind(arguments.host, port) for name, port in arguments.monitor_ports.items()}
    controller = _open(arguments)
    await controller.listen(http, [sock for sockets in monitors.values() for sock in sockets])
    _announce(arguments, controller, http, monitors)
    await stopped.wait()
    logger.info("stopping")
    await controller.stop()
    logger.info("stopped")


def _open(arguments: argparse.Namespace) -> Controller:
    """Raises ConfigError where there is to be a token and is none."""
    interval_s = arguments.health_check_interval
    directory = Directory(timeout_s=arguments.lmcache_worker_timeout, max_keys=arguments.max_keys)
    try:
        return Controller(
            directory,
            token_file=arguments.auth_token_file,
            max_connections=arguments.max_connections,
            sweep_s=interval_s if interval_s > 0 else SWEEP_S,
        )
    except ConfigError as error:
        raise ConfigError(f"--auth-token-file: {error}") from error


def _announce(
    arguments: argparse.Namespace,
    controller: Controller,
    http: Sequence[socket.socket],
    monitors: Mapping[str, Sequence[socket.socket]],
) -> None:
    if not controller.is_local and not controller.token.is_needed:
        logger.warning(
            "%s is reachable from other machines and asks for no token: whoever reaches it can pose as an engine, and "
            "control verbs are refused; use --auth-token-file",
            arguments.host,
        )
    for name, sockets in monitors.items():
        for sock in sockets:
            logger.info("%s port: listening on %s", name, Address(*sock.getsockname()[:2]))
    for sock in http:
        logger.info("HTTP: listening on %s", Address(*sock.getsockname()[:2]))


if __name__ == "__main__":
    sys.exit(main())
