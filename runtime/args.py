"""The command line: KServe's flags, huggingfaceserver's and vLLM's, side by side.

Two parsers, one after the other: kserve's and vLLM's flags share names (`--grpc-port`,
`--ssl-certfile`, ...) and would overwrite each other in one namespace. What is cheap to find wrong
(the cache file, the model directory) is looked at before vLLM is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lmcache_ext.config import Config, load_config
from lmcache_ext.errors import ConfigError
from lmcache_ext.host_memory import check_host_bytes, read_host_memory
from lmcache_ext.plugin import EXPLAIN, takes_over
from runtime.argv import (
    KV_FLAG,
    Notes,
    Token,
    UsageError,
    asks_for_help,
    check_known,
    expand_config_file,
    one_line,
    take_kv_transfer,
    tokenize,
    uses_our_cache,
    wire_connector,
)

MODEL_MOUNT = "/mnt/models"  # where KServe's storage initializer puts storageUri
ENGINE_DEFAULTS = (
    "--prefix-caching-hash-algo=sha256_cbor",  # the same keys in every process, without PYTHONHASHSEED
    "--enable-prompt-tokens-details",  # usage shows cached_tokens
    "--shutdown-timeout=30",  # seconds; vLLM's default 0 kills the engine in the middle of a flush
)
# vLLM's spelling (or an older one) -> the flag that means the same here
ALIASES = {
    "--port": "--http-port",
    "--model": "--model-id",
    "--revision": "--model-revision",
    "--max-length": "--max-model-len",
}
REFUSED = {
    "--uds": "the server listens on TCP; use --http_port",
    "--headless": "one container is one server here",
    "--grpc": "there is no gRPC OpenAI protocol; use HTTP",
    "--data-parallel-multi-port-external-lb": "scale with replicas of the InferenceService",
    "--ssl-ca-certs": "client certificates are the mesh's or the gateway's to check",
    "--ssl-cert-reqs": "client certificates are the mesh's or the gateway's to check",
}
# flags of vLLM's own HTTP server that this one has no use for
WITHOUT_EFFECT = frozenset(
    {
        "--root-path",
        "--ssl-ciphers",
        "--enable-ssl-refresh",  # certificates are always refreshed
        "--disable-fastapi-docs",
        "--enable-offline-docs",
        "--h11-max-incomplete-event-size",
        "--h11-max-header-count",
        "--enable-server-load-tracking",
        "--enable-scale-out",
        "--tokens-only",
        "--api-server-count",
    }
)
PARALLEL = frozenset(
    {"-tp", "--tensor-parallel-size", "-pp", "--pipeline-parallel-size", "-dp", "--data-parallel-size"}
)
# huggingfaceserver's flags for its own transformers backend: no meaning in front of vLLM
IGNORED_SWITCHES = (
    "--disable_lower_case",
    "--disable_special_tokens",
    "--return_token_type_ids",
    "--return_probabilities",
    "--return_raw_logits",
    "--disable_log_requests",
)
TASKS: dict[str, tuple[str, ...]] = {
    "text_generation": (),
    "text2text_generation": (),
    "text_embedding": ("--runner=pooling", "--convert=embed"),
    "sequence_classification": ("--runner=pooling", "--convert=classify"),
}


@dataclass(frozen=True)
class Settings:
    """All the command line said, checked."""

    model_names: tuple[str, ...]  # the first is KServe's model name, the rest are aliases
    model: str  # a directory or a Hub id
    http_host: str
    http_port: int
    kserve: Namespace  # kserve's own flags
    engine: Namespace  # vLLM's flags
    cache: Config | None  # our cache's settings; None when it is off
    tokenize_endpoint: bool
    lmcache_endpoints: bool  # /lmcache/ answers anybody where there is no API key
    openai_prefix: str
    notes: tuple[str, ...]

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    @property
    def our_cache(self) -> bool:
        return self.cache is not None

    @property
    def cache_source(self) -> str | None:
        """Where our cache's settings come from."""
        return None if self.cache is None else self.cache.path or "LMCACHE_* variables"

    @property
    def shutdown_timeout_s(self) -> int:
        return int(self.engine.shutdown_timeout)


class _Parser(argparse.ArgumentParser):
    """argparse without the page of usage: an error is one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(one_line(message).replace("invalid <lambda> value", "not a boolean"))


def parse(argv: Iterable[str]) -> Settings:
    """Read the command line. Raises UsageError with one line; SystemExit(0) after --help."""
    notes = Notes()
    tokens = expand_config_file(tokenize(argv, notes), notes)
    if tokens and tokens[0] == Token(None, "serve"):
        tokens = tokens[1:]
    tokens = [Token(ALIASES.get(token.name or "", token.name), token.value) for token in tokens]
    tokens, kv_config = take_kv_transfer(tokens, notes)
    kv_config = wire_connector(kv_config, ours=takes_over()) if kv_config is not None else None
    cache = _check_cache(kv_config) if kv_config is not None and uses_our_cache(kv_config) else None
    own_parser = _own_parser()
    own, rest = _parse_own(own_parser, tokens)
    _check_own(own, notes)
    model = "" if asks_for_help(rest) else _model(own, rest)
    if cache is not None and kv_config is not None and own.enable_lmcache_endpoints:
        kv_config["kv_connector_extra_config"] = {**(kv_config.get("kv_connector_extra_config") or {}), EXPLAIN: True}
    engine = _parse_engine(rest, own, own_parser, kv_config, model, notes)
    names = _model_names(own, engine, model)
    engine.served_model_name = list(names)
    return Settings(
        model_names=names,
        model=model,
        http_host=engine.host or "0.0.0.0",
        http_port=own.http_port,
        kserve=own,
        engine=engine,
        cache=cache,
        tokenize_endpoint=own.enable_tokenize_endpoint,
        lmcache_endpoints=own.enable_lmcache_endpoints,
        openai_prefix=os.environ.get("KSERVE_OPENAI_ROUTE_PREFIX", "/openai").rstrip("/"),
        notes=tuple(notes.lines),
    )


def set_engine_environment(settings: Settings) -> None:
    """Set the variables vLLM's processes read, where the user left them unset. Call before the engine starts."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # workers get this long to flush; vLLM's default of 5 s would cut a flush short (vllm.envs)
    os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", str(settings.shutdown_timeout_s))


def _check_cache(kv_config: Mapping[str, Any]) -> Config:
    """Read the cache's settings as the engine will, so that a bad one ends the start here."""
    try:
        config = load_config(connector_extra=kv_config.get("kv_connector_extra_config"))
        asked = config.origin("max_local_cpu_size")
        if config.local_cpu and asked.kind != "default":  # a default is fitted to what is there
            check_host_bytes(config.live.host_capacity_bytes, read_host_memory(), origin=asked.text)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return config


def _own_parser() -> argparse.ArgumentParser:
    from kserve.model_server import parser as kserve_parser

    parser = _Parser(prog="python -m runtime", parents=[kserve_parser], add_help=False, allow_abbrev=False)
    parser.add_argument("--model_dir", default=MODEL_MOUNT, help="directory with the model's files")
    parser.add_argument("--model_id", help="Huggingface Hub id (or a directory); HF_TOKEN opens gated ones")
    parser.add_argument("--model_revision", help="revision of the Hub repository")
    parser.add_argument("--backend", default="auto", help="auto or vllm")
    parser.add_argument("--task", help=f"one of {', '.join(TASKS)}; told from the model when left out")
    parser.add_argument("--enable_tokenize_endpoint", action="store_true", help="serve /tokenize and /detokenize")
    parser.add_argument(
        "--enable_lmcache_endpoints",
        action="store_true",
        help="serve /lmcache/v1/explain, and answer /lmcache/ to anybody where there is no API key",
    )
    for switch in IGNORED_SWITCHES:
        parser.add_argument(switch, action="store_true", help="accepted; has no effect with vLLM")
    parser.add_argument("--tensor_input_names", help="accepted; has no effect with vLLM")
    parser.set_defaults(enable_grpc=False, enable_latency_logging=False)
    return parser


def _spellings(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Dashed spelling -> action."""
    return {option.replace("_", "-"): action for action in parser._actions for option in action.option_strings}


def _parse_own(parser: argparse.ArgumentParser, tokens: list[Token]) -> tuple[Namespace, list[Token]]:
    """Our and kserve's flags, and what is left for vLLM."""
    actions = _spellings(parser)
    words: list[str] = []
    rest: list[Token] = []
    pending = False  # the next bare word is the value of one of ours
    for token in tokens:
        action = actions.get(token.name or "")
        if action is not None:
            switch = action.nargs == 0
            words += [action.option_strings[0]] if switch and token.value is None else _switch(action, token)
            pending = not switch and token.value is None
        elif token.name is None and pending:
            words[-1] += f"={token.value}"
            pending = False
        else:
            rest.append(token)
            pending = False
    return parser.parse_args(words), rest


def _switch(action: argparse.Action, token: Token) -> list[str]:
    """`--flag=value`; for a flag without value `--flag=true` and `=false` mean what they say."""
    option = action.option_strings[0]
    if action.nargs != 0:
        return [option if token.value is None else f"{option}={token.value}"]
    state = _boolean(token)
    return [option] if state else []


def _boolean(token: Token) -> bool:
    states = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return states[(token.value or "").lower()]
    except KeyError:
        raise UsageError(f"{token.name} takes no value, or true or false; got {token.value!r}") from None


def _check_own(own: Namespace, notes: Notes) -> None:
    if own.workers != 1:
        raise UsageError(f"--workers={own.workers}: one engine serves one process; scale with replicas (minReplicas)")
    if own.enable_grpc:
        raise UsageError("--enable_grpc=true: there is no gRPC OpenAI protocol; leave it out and use HTTP")
    if own.backend not in ("auto", "vllm"):
        raise UsageError(f"--backend={own.backend}: this runtime serves with vLLM only (auto or vllm)")
    if own.task is not None and own.task not in TASKS:
        raise UsageError(f"--task={own.task}: expected one of {', '.join(TASKS)}")
    for switch in (*IGNORED_SWITCHES, "--tensor_input_names"):
        if getattr(own, switch[2:]):
            notes.add(f"{switch}: ignored, it has no effect with vLLM")
    if own.predictor_host is not None:
        notes.add("--predictor_host: ignored, this server calls no other predictor")
    _check_certificate(own.ssl_certfile, own.ssl_keyfile)


def _check_certificate(certificate: str | None, key: str | None) -> None:
    """Read them as the HTTP server will, which says so only once weights are loading, and then to nobody."""
    if certificate is None and key is None:
        return
    if certificate is None:
        raise UsageError(f"--ssl_keyfile={key} needs --ssl_certfile")
    try:
        no_passphrase = ""  # or OpenSSL would ask the terminal for one
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, no_passphrase)
    except OSError as error:
        files = f"--ssl_certfile={certificate}" + (f" --ssl_keyfile={key}" if key is not None else "")
        raise UsageError(f"{files}: {error.strerror or error}: give a certificate and its key in PEM") from None


def _model(own: Namespace, rest: list[Token]) -> str:
    """The model's Hub id or directory; a positional MODEL as in `vllm serve MODEL` counts as --model_id."""
    if rest and rest[0].name is None:
        own.model_id = own.model_id or rest[0].value
        del rest[0]
    if own.model_id:
        path = Path(own.model_id)
        if path.is_dir():
            return _checked_directory(path)
        if path.is_absolute():
            raise UsageError(f"model directory {path} does not exist")
        return str(own.model_id)
    if "://" in own.model_dir:
        raise UsageError(f"--model_dir={own.model_dir}: give the URL as storageUri, KServe mounts it at {MODEL_MOUNT}")
    path = Path(own.model_dir)
    if not path.is_dir():
        raise UsageError(f"model directory {path} does not exist; set storageUri, --model_dir or --model_id")
    return _checked_directory(path)


def _checked_directory(path: Path) -> str:
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise UsageError(f"model directory {path} cannot be read: {error.strerror}") from None
    if not names & {"config.json", "params.json"}:
        below = sorted(str(found.parent) for found in path.glob("*/config.json"))
        hint = f"; did you mean --model_dir={below[0]}?" if below else ""
        raise UsageError(f"no config.json in model directory {path}{hint}")
    return str(path)


def _parse_engine(
    rest: list[Token],
    own: Namespace,
    own_parser: argparse.ArgumentParser,
    kv_config: dict[str, Any] | None,
    model: str,
    notes: Notes,
) -> Namespace:
    """vLLM's flags, through vLLM's own parser; ours go in front so that the user's win."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class EngineParser(_Parser, FlexibleArgumentParser):
        """vLLM's parser with one-line errors."""

    parser = make_arg_parser(EngineParser(prog="python -m runtime"))
    actions = {option: action for action in parser._actions for option in action.option_strings}
    check_known(rest, {*actions, *_spellings(own_parser), *ALIASES})
    if asks_for_help(rest):
        own_parser.print_help()
        parser.parse_args(["--help"])
    given = {token.root for token in rest}
    for flag in sorted(WITHOUT_EFFECT & given):
        notes.add(f"{flag}: ignored, it has no effect in this server")
    defaults = [*ENGINE_DEFAULTS, *TASKS.get(own.task or "", ()), *([] if PARALLEL & given else _all_gpus(notes))]
    defaults = [word for word in defaults if word.split("=")[0] not in given]
    words = [word for token in rest for word in _engine_words(token, actions)]
    fixed = [f"--model={model}"]
    fixed += [f"--revision={own.model_revision}"] if own.model_revision else []
    fixed += [f"{KV_FLAG}={json.dumps(kv_config)}"] if kv_config is not None else []
    args = parser.parse_args([*defaults, *words, *fixed])
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from None
    if args.model_tag is not None:
        raise UsageError(f"unexpected argument {args.model_tag!r}")
    return args  # type: ignore[no-any-return]


def _all_gpus(notes: Notes) -> list[str]:
    """Use every GPU the pod was given, as huggingfaceserver does."""
    from vllm.platforms import current_platform

    count = current_platform.device_count() if current_platform.is_cuda_alike() else 1
    if count <= 1:
        return []
    notes.add(f"--tensor-parallel-size={count}: one rank for each GPU; set it to use fewer")
    return [f"--tensor-parallel-size={count}"]


def _engine_words(token: Token, actions: Mapping[str, argparse.Action]) -> list[str]:
    if token.root in REFUSED:
        raise UsageError(f"{token.root}: {REFUSED[token.root]}")
    action = actions.get(token.name or "")
    if action is None or action.nargs != 0 or token.value is None or token.name is None:
        return token.words()
    if _boolean(token):
        return [token.name]
    negation = f"--no-{token.name[2:]}"
    return [negation] if negation in actions else []


def _model_names(own: Namespace, engine: Namespace, model: str) -> tuple[str, ...]:
    served: list[str] = engine.served_model_name or []
    names = [*served, own.model_name] if served and own.model_name == "model" else [own.model_name, *served]
    if not served and own.model_name == "model" and own.model_id:
        names.append(model)  # `vllm serve MODEL` answers to MODEL
    return tuple(dict.fromkeys(names))
