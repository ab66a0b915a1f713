"""``lmcache-ext``: one program, few verbs. A verb is a function from its arguments to an exit code."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lmcache_ext import __version__
from lmcache_ext.config import load_config
from lmcache_ext.config_diff import is_live
from lmcache_ext.config_keys import KEYS, RENAMED
from lmcache_ext.daemons import controller as controller_daemon
from lmcache_ext.daemons import lmserver
from lmcache_ext.doctor import verb as doctor_verb
from lmcache_ext.errors import ConfigError
from lmcache_ext.manifests import verbs as manifest_verbs

OK = 0
REFUSED = 2


def check_config(arguments: argparse.Namespace) -> int:
    """Print what each file amounts to, here and now; 2 if one of them cannot be honoured."""
    environ = {} if arguments.no_environment else os.environ
    code = OK
    for path in arguments.files:
        try:
            config = load_config(path=path, environ=environ)
        except ConfigError as error:
            print(error, file=sys.stderr)
            code = REFUSED
            continue
        print(f"{path}: ok")
        _print_columns(config.describe())
        for note in config.notes:
            print(f"note: {note}")
    return code


def keys(_: argparse.Namespace) -> int:
    """Print every key that is accepted, and what it does here."""
    live = "live: a running server takes a change"
    rows: list[tuple[str, str, str]] = [
        (key.name, key.use, key.note or (live if is_live(key.name) else "")) for key in KEYS.values()
    ]
    rows += [(old, "old name", f"read as {new}") for old, new in RENAMED.items()]
    rows.append(("local_device", "old name", "read as local_cpu or local_disk"))
    rows.append(("extra_config", "honoured", "options of the stores, one mapping"))
    _print_columns(rows)
    return OK


def server(arguments: argparse.Namespace) -> int:
    """Run the cache server; its own parser reads the arguments."""
    return lmserver.main(arguments.arguments, prog="lmcache-ext server")


def controller(arguments: argparse.Namespace) -> int:
    """Run the controller; its own parser reads the arguments."""
    return controller_daemon.main(arguments.arguments, prog="lmcache-ext controller")


def serde_bench(arguments: argparse.Namespace) -> int:
    """Measure the serdes: what they save, how fast they are, and what the model makes of their loss."""
    program = Path(__file__).resolve().parents[1] / "benchmarks" / "serde.py"
    if not program.exists():
        print(f"{program} is not here: benchmarks come with a checkout of the sources, not a package", file=sys.stderr)
        return REFUSED
    return subprocess.run([sys.executable, program, *arguments.arguments], check=False).returncode


def _print_columns(rows: Sequence[tuple[str, str, str]]) -> None:
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for first, second, third in rows:
        print(f"  {first:<{widths[0]}}  {second:<{widths[1]}}  {third}".rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmcache-ext", description="A KV cache for vLLM that outlives the GPU.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = verbs.add_parser("check-config", help="show the effective settings of LMCache files, with their origins")
    verb.add_argument("files", nargs="+", metavar="FILE")
    verb.add_argument("--no-environment", action="store_true", help="leave out the LMCACHE_* variables")
    verb.set_defaults(run=check_config)

    manifest_verbs.add_to(verbs)

    verb = verbs.add_parser("keys", help="list every setting and what it does here")
    verb.set_defaults(run=keys)

    verb = verbs.add_parser(
        "doctor", help="say why running servers have no hits: their own settings, peers and backends"
    )
    doctor_verb.add_arguments(verb)

    verb = verbs.add_parser("server", help="serve a cache for lm:// clients", add_help=False, prefix_chars="\0")
    verb.add_argument("arguments", nargs="*", metavar="HOST PORT [DEVICE]")
    verb.set_defaults(run=server)

    verb = verbs.add_parser("controller", help="know which engine holds which chunk", add_help=False, prefix_chars="\0")
    verb.add_argument("arguments", nargs="*", metavar="--host HOST --port PORT ...")
    verb.set_defaults(run=controller)

    verb = verbs.add_parser("serde", help="measure how chunks can be written")
    verb = verb.add_subparsers(metavar="bench", required=True).add_parser("bench", add_help=False, prefix_chars="\0")
    verb.add_argument("arguments", nargs="*", help="of benchmarks/serde.py")
    verb.set_defaults(run=serde_bench)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, or 2 for arguments or a configuration that cannot be honoured."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; Python would say so once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
