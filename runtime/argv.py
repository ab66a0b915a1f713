"""The argument vector as people really write it, before any parser sees it. Imports neither kserve nor vLLM.

KServe hands the container `args:` of the ServingRuntime followed by those of the InferenceService,
each YAML list item one element and no shell in between. So quotes arrive literally, a flag and its
value may share one element, flags repeat, and underscores and dashes mix.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lmcache_ext.config_urls import is_secret, mask_url
from lmcache_ext.config_values import MASK
from lmcache_ext.plugin import CONNECTOR_MODULE, CONNECTOR_NAME, CONNECTOR_NAMES, LOAD_FAILURE_POLICY

KV_FLAG = "--kv-transfer-config"
HELP = ("-h", "--help")
# In KVTransferConfig until vLLM 0.31; still in everybody's YAML. None of them ever meant anything to LMCache.
# (kv_port stayed: other connectors use it.)
REMOVED_KV_FIELDS = frozenset({"kv_buffer_size", "kv_rank", "kv_parallel_size", "kv_ip"})

# a key with its value, quoted or not, in what may not be JSON
_PAIR = re.compile(r"""([\w.-]+["']?\s*:\s*)(?:"[^"]*"?|'[^']*'?|[^\s,{}"'\[\]]+)""")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"']+")


class UsageError(Exception):
    """The command line or what it points at is wrong; the message is one line and the exit code 2."""


def one_line(message: object) -> str:
    """A message of pydantic's or argparse's, without line breaks and links to its documentation."""
    lines = (line.strip() for line in str(message).splitlines())
    return " ".join(line for line in lines if line and not line.startswith("For further information"))


@dataclass(frozen=True)
class Token:
    """One flag with its inline value, or one bare word."""

    name: str | None  # "--max-model-len", "--kv-transfer-config.kv_role", "-tp"; None for a bare word
    value: str | None  # what stood after "=", or the bare word itself

    def words(self) -> list[str]:
        if self.name is None:
            return [self.value or ""]
        return [self.name] if self.value is None else [f"{self.name}={self.value}"]

    @property
    def root(self) -> str:
        """The flag without its dotted path: `--kv-transfer-config` of `--kv-transfer-config.kv_role`."""
        return (self.name or "").split(".", 1)[0]


@dataclass
class Notes:
    """What was tolerated; each line is logged once at the start."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


def tokenize(argv: Iterable[str], notes: Notes) -> list[Token]:
    """One Token for each element; names get dashes up to the first dot, values lose literal quotes."""
    tokens: list[Token] = []
    for word in argv:
        word = word.strip() if word.startswith("-") else word
        if not re.match(r"--?[A-Za-z]", word):
            tokens.append(Token(None, _unquote(word, tokens[-1].name if tokens else None, notes)))
            continue
        match = re.fullmatch(r"(--?[^\s=]+)(?:=|\s+)?(.*)", word, re.DOTALL)
        assert match is not None  # the first group takes at least the dash and the letter
        name, value = _dashed(match[1]), match[2]
        if value or "=" in word:
            if word[len(match[1])] != "=":
                notes.add(f"{name}: flag and value came as one argument; split at the space")
            tokens.append(Token(name, _unquote(value, name, notes)))
        else:
            tokens.append(Token(name, None))
    return tokens


def _dashed(name: str) -> str:
    root, dot, path = name.partition(".")
    return root.replace("_", "-") + dot + path


def _unquote(value: str, name: str | None, notes: Notes) -> str:
    """A YAML list item is not a shell word: `--flag='{"a":1}'` arrives with its quotes (KServe's own example)."""
    text = value.strip()
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    if not quoted or (text[0] == '"' and text[1:2] not in ("{", "[")):
        return value
    notes.add(f"{name or 'argument'}: took off literal {text[0]} quotes (YAML lists need none)")
    return text[1:-1]


def expand_config_file(tokens: list[Token], notes: Notes) -> list[Token]:
    """`--config FILE` is vLLM's YAML of flags: its words go first, so that the command line wins."""
    for index, token in enumerate(tokens):
        if token.name != "--config":
            continue
        inline = token.value is not None
        value = token if inline else (tokens[index + 1] if index + 1 < len(tokens) else None)
        if value is None or value.value is None or (value.name is not None and not inline):
            raise UsageError("--config needs a file")
        words = _config_words(Path(value.value))
        return tokenize(words, notes) + tokens[:index] + tokens[index + (1 if inline else 2) :]
    return tokens


def _config_words(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: expected a mapping of flags to values")
    words: list[str] = []
    for key, value in content.items():
        if isinstance(value, bool):
            words.append(f"--{key}={str(value).lower()}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={_yaml_word(value)}")
    return words


def _yaml_word(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def check_known(tokens: Iterable[Token], known: Collection[str]) -> None:
    """Raise UsageError at the first flag no parser has, naming the nearest one."""
    for token in tokens:
        if token.name is None or token.root in known or token.name in HELP:
            continue
        if any(token.name.startswith(short) for short in known if re.fullmatch(r"-[A-Z]", short)):
            continue  # -O3
        near = difflib.get_close_matches(token.root, known, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists all flags"
        raise UsageError(f"unknown flag {token.root}{hint}")


def asks_for_help(tokens: Iterable[Token]) -> bool:
    return any(token.name in HELP for token in tokens)


def take_kv_transfer(tokens: list[Token], notes: Notes) -> tuple[list[Token], dict[str, Any] | None]:
    """Lift every form of --kv-transfer-config out of `tokens`; the last JSON wins, dotted keys go on top."""
    rest: list[Token] = []
    whole: dict[str, Any] | None = None
    dotted: list[tuple[str, str]] = []
    words = iter(tokens)
    for token in words:
        if token.root != KV_FLAG:
            rest.append(token)
            continue
        value = token.value if token.value is not None else _next_value(words, token.root)
        assert token.name is not None
        path = token.name[len(KV_FLAG) + 1 :]
        if path:
            dotted.append((path, value))
        else:
            whole = _json_object(value)
    if whole is None and not dotted:
        return rest, None
    config = whole or {}
    for path, value in dotted:
        _set_dotted(config, path, value)
    gone = sorted(REMOVED_KV_FIELDS & config.keys())
    if gone:
        notes.add(f"{KV_FLAG}: ignored {', '.join(gone)} (not used since vLLM's V1 connectors)")
    return rest, {key: value for key, value in config.items() if key not in REMOVED_KV_FIELDS}


def _next_value(words: Iterator[Token], flag: str) -> str:
    token = next(words, None)
    if token is None or token.name is not None:
        raise UsageError(f"{flag} needs a value")
    return token.value or ""


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{KV_FLAG} is not JSON: {error.msg} at column {error.colno} of {_masked(text)!r}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{KV_FLAG} must be a JSON object, got {_masked(text)!r}")
    return value


def _masked(text: str) -> str:
    """What may be JSON, without the passwords that may be in it: its reader is whoever reads the pod's log."""
    masked = _PAIR.sub(lambda found: f"{found[1]}{MASK}" if is_secret(found[1]) else found[0], text)
    return _URL.sub(lambda found: mask_url(found[0]), masked)


def _set_dotted(config: dict[str, Any], path: str, text: str) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
        if not isinstance(config, dict):
            raise UsageError(f"{KV_FLAG}.{path}: {key} is not an object")
    try:
        config[leaf] = json.loads(text)
    except json.JSONDecodeError:
        config[leaf] = text


def wire_connector(config: dict[str, Any], *, ours: bool) -> dict[str, Any]:
    """Point an LMCache connector name at our class, and make a failed load a recompute unless the user chose."""
    if config.get("kv_connector") not in CONNECTOR_NAMES or config.get("kv_connector_module_path") or not ours:
        return config
    policy = config.get("kv_load_failure_policy", "recompute")
    # The connector cannot tell vLLM's default from a user's choice, so the choice travels beside it.
    extra = {**(config.get("kv_connector_extra_config") or {}), LOAD_FAILURE_POLICY: policy}
    wired = {"kv_role": "kv_both", **config, "kv_load_failure_policy": policy, "kv_connector_extra_config": extra}
    return {**wired, "kv_connector": CONNECTOR_NAME, "kv_connector_module_path": CONNECTOR_MODULE}


def uses_our_cache(config: Mapping[str, Any] | None) -> bool:
    """True after `wire_connector`, and where the user gave our module path himself."""
    return config is not None and config.get("kv_connector_module_path") == CONNECTOR_MODULE
