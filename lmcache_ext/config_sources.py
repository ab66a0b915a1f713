"""Where settings come from: the YAML file, the environment, vLLM's connector configuration.

Each source becomes a list of ``Setting``: a key as written, what was written, and the place.
``extra_config`` is flattened on the way (``extra_config.valkey_database``), so that sources
merge key by key there as they do everywhere else.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import yaml

from lmcache_ext.config_quotas import tenant_label
from lmcache_ext.config_urls import masked
from lmcache_ext.config_values import optional, table
from lmcache_ext.errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024
MAX_DEPTH = 32
_SHOWN_CHARS = 100
Kind = Literal["default", "file", "env", "connector"]


class Origin(NamedTuple):
    """Where a value came from; ``text`` is "/lmcache/lmcache_config.yaml:3", "LMCACHE_CHUNK_SIZE", ..."""

    kind: Kind
    text: str


class Setting(NamedTuple):
    """One key as written in one source, not yet judged."""

    key: str
    value: object
    origin: Origin
    legacy: str = ""  # the old name it was written under, if it was


def shown(key: str, value: object) -> str:
    """``value`` for a message: secrets masked, one line, of bounded length."""
    value = masked(key, value)
    line = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return line if len(line) <= _SHOWN_CHARS else line[:_SHOWN_CHARS] + "..."


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)[1:-1]


def refusal(setting: Setting, why: str) -> ConfigError:
    """The error for one setting: place, key, value, what is wrong, and the way out."""
    name = setting.legacy or setting.key
    return ConfigError(f"{setting.origin.text}: {_printable(name)}: {shown(name, setting.value)} {why}")


def unknown(setting: Setting, way_out: str) -> ConfigError:
    """The error for a key that nobody knows."""
    name, value = _printable(setting.key), shown(setting.key, setting.value)
    return ConfigError(f"{setting.origin.text}: {name} (here {value}) is not a known setting: {way_out}")


def flattened(settings: list[Setting]) -> Iterator[Setting]:
    """Replace ``extra_config`` by one setting for each of its keys."""
    for setting in settings:
        if setting.key != "extra_config":
            yield setting
            continue
        try:
            inner = optional(table)(setting.value)
        except ValueError as error:
            raise refusal(setting, str(error)) from None
        for key, value in (inner if isinstance(inner, dict) else {}).items():
            yield Setting(f"extra_config.{key}", value, setting.origin)


# --- the file ---------------------------------------------------------------------------


def read_file(path: str, content: str | None = None) -> list[Setting]:
    """Every key of the LMCache file with its line; ``ConfigError`` for a file that is not one."""
    content = _read_text(path) if content is None else content
    path = _printable(path)
    try:
        return list(_settings_within(_Loader(content), path))
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, content, error)) from None


def _settings_within(loader: yaml.SafeLoader, path: str) -> Iterator[Setting]:
    root = loader.get_single_node()
    if root is None:
        raise ConfigError(f"{path}: the file is empty: write at least one setting, such as chunk_size: 256")
    if not isinstance(root, yaml.MappingNode):
        raise yaml.MarkedYAMLError(problem="not a list of 'key: value' lines", problem_mark=root.start_mark)
    _check_mappings(root, path)
    _check_not_a_manifest(root, path)
    for key, value in root.value:
        yield from _settings(loader, path, "", key, value)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without anchors, aliases and tags, and of bounded depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if getattr(event, "anchor", None) is not None:
            problem = "anchors (&name) and aliases (*name) are not used in this file, write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = "tags (!name) are not used in this file, write the plain value"
        elif self.depth >= MAX_DEPTH:
            problem = f"values nested more than {MAX_DEPTH} deep, write it flatter"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _read_text(path: str) -> str:
    name = _printable(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{name}: is a directory: name the file{_files_within(path)}")
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{name}: is not a regular file: name a YAML file")
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file: mount the ConfigMap there or correct LMCACHE_CONFIG_FILE") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name}: cannot be read ({why}): correct its name or its permissions") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}: is larger than {MAX_FILE_BYTES} bytes: name the LMCache file")
    return _decoded(name, content)


def _decoded(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}): "
            "save the file as UTF-8"
        ) from None


def _files_within(path: str) -> str:
    names = sorted(name for name in os.listdir(path) if name.endswith((".yaml", ".yml")))
    return f", such as {os.path.join(path, names[0])}" if names else " in it"


def _yaml_problem(path: str, content: str, error: yaml.YAMLError) -> str:
    """PyYAML's complaint on one line, without its snippet (it could hold a password)."""
    line, problem = 1, str(error)
    if isinstance(error, yaml.reader.ReaderError):
        line = content.count("\n", 0, error.position) + 1
        problem = f"unprintable character U+{error.character:04X}, remove it"
    elif isinstance(error, yaml.MarkedYAMLError):
        # an unclosed quote is found at the end of the file, and its context is where it opened
        scanning = (error.context or "").startswith(("while scanning a simple key", "while scanning a quoted"))
        mark = (error.context_mark if scanning else None) or error.problem_mark or error.context_mark
        line, problem = mark.line + 1 if mark else 1, error.problem or "syntax error"
    if getattr(error, "context", None) == "while scanning an alias":
        problem = 'a * begins an alias, put it in quotes: "*"'
    elif "'\\t'" in problem:
        problem += ", indent with spaces instead of tabs"
    elif "expected a single document" in (getattr(error, "context", None) or ""):
        problem = "a second document begins here, keep one and remove the '---'"
    problem = " ".join(problem.split())[:200]
    return f"{path}:{line}: not a valid LMCache file: {problem}; it is YAML such as chunk_size: 256"


def _check_mappings(node: yaml.Node, path: str, *, within: str = "") -> None:
    """Refuse keys that are not strings, and keys written twice, at any depth; `within` is the key above."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_mappings(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str" or not key.value or not key.value.isprintable():
            word = shown("", _key_shown(within, key.value) if isinstance(key, yaml.ScalarNode) else "...")
            raise ConfigError(
                f"{path}:{line}: the key {word} is not a name: write 'key: value', such as chunk_size: 256"
            )
        if key.value in lines:
            name = _key_shown(within, key.value)
            raise ConfigError(
                f"{path}:{line}: {name}: written twice, in line {lines[key.value]} too: remove one of them"
            )
        lines[key.value] = line
        _check_mappings(value, path, within=key.value)


def _key_shown(within: str, key: str) -> str:
    """A key as messages name it: one of quotas may be a salt."""
    return tenant_label(key) if within == "quotas" else key


def _check_not_a_manifest(root: yaml.MappingNode, path: str) -> None:
    """Refuse what the LMCache file is often wrapped in, and say how to unwrap it."""
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
    values = {key.value: value for key, value in root.value}
    if "servingEngineSpec" in lines:
        raise ConfigError(
            f"{path}:{lines['servingEngineSpec']}: servingEngineSpec: is a Helm values file, not the LMCache file: "
            "write LMCache's own keys, such as max_local_cpu_size for cpuOffloadingBufferSize"
        )
    if "kind" not in lines or not lines.keys() & {"apiVersion", "metadata"}:
        return
    kind = values["kind"].value if isinstance(values["kind"], yaml.ScalarNode) else "..."
    data = values.get("data")
    inner = data.value[0][0] if isinstance(data, yaml.MappingNode) and data.value else None
    where = f"data.{inner.value} (line {inner.start_mark.line + 1})" if inner is not None else "its data"
    raise ConfigError(
        f"{path}:{lines['kind']}: kind: {shown('kind', kind)} is a Kubernetes manifest, not the LMCache file in it: "
        f"save what stands under {where} as the file, or kubectl apply the manifest and mount it"
    )


def _settings(loader: yaml.SafeLoader, path: str, prefix: str, key: yaml.Node, value: yaml.Node) -> Iterator[Setting]:
    name = prefix + key.value
    origin = Origin("file", f"{path}:{key.start_mark.line + 1}")
    if name == "extra_config" and isinstance(value, yaml.MappingNode):
        for inner_key, inner_value in value.value:
            yield from _settings(loader, path, "extra_config.", inner_key, inner_value)
        return
    try:
        yield Setting(name, loader.construct_object(value, deep=True), origin)
    except ValueError:  # such as the date 2026-99-99
        raw = value.value if isinstance(value, yaml.ScalarNode) else ""
        raise refusal(Setting(name, raw, origin), "is not a valid value: put it in quotes or correct it") from None


# --- the environment ----------------------------------------------------------------------

# What Kubernetes injects for a Service named lmcache-...: not settings, whatever they look like.
_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_[0-9]+_(TCP|UDP|SCTP)(_.*)?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


def read_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Setting]]:
    """Each ``LMCACHE_*`` variable as (its name, setting); the old prefix ``LM_CACHE_`` is one too.

    A variable of Kubernetes for a Service named "lmcache-mp" is left out even where it
    carries the name of a setting (LMCACHE_MP_PORT): its value, tcp://..., tells.
    """
    for name in sorted(environ):
        prefix = next((prefix for prefix in ("LMCACHE_", "LM_CACHE_") if name.startswith(prefix)), None)
        if prefix is None or name == prefix or (is_service_link(name) and _SERVICE_URL.match(environ[name])):
            continue
        key = name.removeprefix(prefix).lower()
        yield name, Setting(key, environ[name], Origin("env", name))


def is_service_link(name: str) -> bool:
    """Whether Kubernetes names its service-link variables so."""
    return _SERVICE_LINK.fullmatch(name) is not None


# --- vLLM's --kv-transfer-config -----------------------------------------------------------


def connector_place(key: str) -> str:
    """How messages name a key of vLLM's connector configuration."""
    return f'kv_connector_extra_config["{_printable(key)}"]'


def read_connector(extra: Mapping[str, object]) -> list[Setting]:
    """Each ``lmcache.<key>`` of ``kv_connector_extra_config``."""
    return [
        Setting(key.removeprefix("lmcache."), value, Origin("connector", connector_place(key)))
        for key, value in extra.items()
        if key.startswith("lmcache.")
    ]
