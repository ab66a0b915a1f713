"""The command line of the controller, LMCache's, and what it amounts to."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lmcache_ext.daemons.arguments import Parser, count, port, seconds_above_0
from lmcache_ext.daemons.lm_args import memory_limit
from lmcache_ext.errors import ConfigError

MONITORS = ("pull", "reply", "heartbeat")
DEFAULT_PORTS = {"pull": 8300, "reply": 8400}
KEY_BYTES = 512
"""What a key of one engine takes in memory, generously."""


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The arguments; `monitor_ports` maps pull, reply and perhaps heartbeat to ports. Exits with 2 and one line."""
    parser = _parser(prog)
    try:
        words = [_as_written(word) for word in argv]
        path = _read(parser, words[:]).config
        if path is not None:
            words = [*_from_file(parser, path), *words]
        arguments = _read(parser, words)
        _settle(arguments)
    except ConfigError as error:
        parser.error(str(error))
    return arguments


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description="Knows which engine holds which chunk of KV in its host memory.", allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with these options by name; the command line wins")
    parser.add_argument("--host", default="localhost", help="address to listen on, default localhost")
    parser.add_argument("--port", type=port, default=9000, help="HTTP, default 9000; 0 takes a free one")
    parser.add_argument(
        "--monitor-ports", type=_ports, metavar="JSON", help=f"for engines, default {json.dumps(DEFAULT_PORTS)}"
    )
    parser.add_argument("--monitor-port", type=port, help="one port for all that engines say; an old option")
    parser.add_argument(
        "--health-check-interval",
        type=float,
        default=-1.0,
        metavar="S",
        help="look for silent engines so often; default -1, every second",
    )
    parser.add_argument(
        "--lmcache-worker-timeout",
        type=seconds_above_0,
        default=300.0,
        metavar="S",
        help="an engine silent for so long is gone",
    )
    parser.add_argument("--auth-token-file", metavar="FILE", help="engines and control verbs must send this token")
    parser.add_argument(
        "--max-keys", type=count, help="default what 60%% of the memory limit holds, at most 20 million"
    )
    parser.add_argument("--max-connections", type=count, default=4096)
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    return parser


def _read(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        way_out = f"; did you mean {near[0]}?" if near else "; --help lists all options"
        raise ConfigError(f"{unknown[0]} is not an option{way_out}")
    return arguments


def _as_written(word: str) -> str:
    """`--monitor_ports` and `--host="localhost"` as people write them in YAML lists."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + _unquoted(value)
    return _unquoted(word)


def _unquoted(text: str) -> str:
    text = text.strip()
    while len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return text


def _from_file(parser: Parser, path: str) -> list[str]:
    """The file's options as words of a command line."""
    try:
        options = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(options, Mapping):
        raise ConfigError(f"--config {path}: is no mapping of options, such as port: 9000")
    known = {option for action in parser._actions for option in action.option_strings}
    words = []
    for name, value in options.items():
        flag = f"--{name}".replace("_", "-")
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            raise ConfigError(
                f"--config {path}: {name} is not an option" + (f"; did you mean {near[0]}?" if near else "")
            )
        if value is not None:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return words


def _settle(arguments: argparse.Namespace) -> None:
    if arguments.monitor_ports is None:
        single = arguments.monitor_port
        arguments.monitor_ports = DEFAULT_PORTS if single is None else {"pull": single}
    elif arguments.monitor_port is not None:
        raise ConfigError(
            "--monitor-port and --monitor-ports say the same: leave out the first, which is an old option"
        )
    ports = [arguments.port, *arguments.monitor_ports.values()]
    if len({port for port in ports if port}) != len([port for port in ports if port]):
        raise ConfigError(f"--port {arguments.port} and --monitor-ports {arguments.monitor_ports} share a port")
    if arguments.max_keys is None:
        arguments.max_keys = min(20_000_000, memory_limit() * 6 // 10 // KEY_BYTES)


def _ports(text: str) -> dict[str, int]:
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = _loosely(text)
    if not isinstance(found, dict) or not found or not set(found) <= set(MONITORS):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not JSON such as {{"pull": 8300, "reply": 8400, "heartbeat": 8082}}'
        )
    return {name: port(str(number)) for name, number in found.items()}


def _loosely(text: str) -> object:
    """JSON whose quotes a shell or a template took away: {pull: 8300, reply: 8400}."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None
