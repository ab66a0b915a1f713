"""`lmcache_server HOST PORT [DEVICE]`: a cache server for `lm://`, also called `lmcache_experimental_server`,
`lmcache-ext server` and `python -m lmcache_ext.daemons.lmserver`.

    lmcache_server localhost 65432
    lmcache_server 0.0.0.0 8080 --max-bytes 20Gi --data-dir /data --auth-token-file /secret/token

Exit codes: 0 after SIGTERM or SIGINT, 2 where the arguments cannot be honoured.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Sequence

from lmcache_ext.daemons.lm_args import parse
from lmcache_ext.daemons.lm_cache import Cache
from lmcache_ext.daemons.lm_connection import Limits
from lmcache_ext.daemons.lm_disk import Disk
from lmcache_ext.daemons.lm_http import MAX_REQUEST_BYTES, HttpPort
from lmcache_ext.daemons.lm_memory import Memory
from lmcache_ext.daemons.lm_policy import POLICIES
from lmcache_ext.daemons.lm_server import Server
from lmcache_ext.errors import ConfigError, StoreError
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.stores.sockets import is_loopback

logger = logging.getLogger("lmcache_ext.daemons.lmserver")

REFUSED = 2


def main(argv: Sequence[str | int] | None = None, prog: str | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    prog = prog or os.path.basename(sys.argv[0]).replace("lmserver.py", "lmcache_server")
    arguments = parse(argv, prog)
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format="%(asctime)s %(levelname)s lmcache_server: %(message)s",
        stream=sys.stderr,
    )
    try:
        asyncio.run(_serve(arguments))
    except (ConfigError, StoreError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return REFUSED
    return 0


async def _serve(arguments: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    tls = _tls(arguments)
    sockets = bind(arguments.host, arguments.port)
    http = bind(arguments.http_host or arguments.host, arguments.http_port) if arguments.http_port is not None else []
    server = _open(arguments)
    for sock in sockets:
        await server.listen(sock, tls)
    port = HttpPort({"/healthz": server.healthz, "/metrics": server.metrics})
    watching = [await asyncio.start_server(port.handle, sock=sock, limit=MAX_REQUEST_BYTES) for sock in http]
    _announce(arguments, sockets, http)
    await stopped.wait()
    logger.info("stopping: requests under way have %g s", arguments.grace)
    await server.stop(arguments.grace)
    for listener in watching:
        listener.close()
    logger.info("stopped")


def _open(arguments: argparse.Namespace) -> Server:
    """The server with its cache. Raises ConfigError, StoreError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    max_connections = arguments.max_connections
    if hard != resource.RLIM_INFINITY and max_connections > hard - 128:
        max_connections = max(hard - 128, 1)
        logger.warning("--max-connections is %d: more files may not be open (%d, soft %d)", max_connections, hard, soft)
    disk = None
    if arguments.data_dir is not None:
        disk = Disk(arguments.data_dir, arguments.max_disk_bytes)
        disk.open()
    memory = Memory(arguments.max_bytes, POLICIES[arguments.policy](arguments.max_bytes))
    limits = Limits(
        max_object_bytes=arguments.max_object_bytes,
        max_in_flight=arguments.max_in_flight,
        read_timeout_s=arguments.read_timeout,
        idle_timeout_s=arguments.idle_timeout,
    )
    try:
        return Server(
            Cache(memory, disk), limits, max_connections=max_connections, token_file=arguments.auth_token_file
        )
    except ConfigError as error:
        raise ConfigError(f"--auth-token-file: {error}") from error


def bind(host: str, port: int) -> list[socket.socket]:
    """A listening socket for each address of `host`; port 0 is the same free one for all. Raises ConfigError."""
    host = host.removeprefix("[").removesuffix("]")  # as an address of IPv6 stands in a URL
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"{host}: {error.strerror or error}") from error
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            sockets.append(_bind_one(family, kind, protocol, (address[0], port, *address[2:])))
        except OSError as error:
            failure = error
            continue
        port = sockets[0].getsockname()[1]
    if failure is not None and (not sockets or failure.errno == errno.EADDRINUSE):
        for sock in sockets:
            sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {failure.strerror or failure}")
    return sockets


def _bind_one(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit it
        sock.bind(address)
        sock.listen(1024)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _tls(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    if not arguments.tls_cert:
        return None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(arguments.tls_cert, arguments.tls_key)
        if arguments.tls_client_ca:
            context.load_verify_locations(arguments.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise ConfigError(f"--tls-cert, --tls-key, --tls-client-ca: {error}") from error
    return context


def _announce(arguments: argparse.Namespace, sockets: list[socket.socket], http: list[socket.socket]) -> None:
    if arguments.device != "cpu":
        logger.info("DEVICE %s: objects rest in host memory all the same", arguments.device)
    is_open = not arguments.auth_token_file and not arguments.tls_client_ca
    if is_open and not all(map(is_loopback, sockets)):
        logger.warning(
            "%s is reachable from other machines and asks for no token: whoever reaches it reads and writes KV; "
            "use --auth-token-file or --tls-client-ca",
            arguments.host,
        )
    logger.info(
        "%d bytes of memory (%s), objects up to %d bytes, data directory %s",
        *(arguments.max_bytes, arguments.policy, arguments.max_object_bytes, arguments.data_dir or "none"),
    )
    for sock in http:
        logger.info("metrics on http://%s/metrics", Address(*sock.getsockname()[:2]))
    for sock in sockets:
        logger.info("listening on %s", Address(*sock.getsockname()[:2]))


if __name__ == "__main__":
    sys.exit(main())
