"""From what the sources say to one value per key: old names mapped, sources ranked, values read.

Rank, lowest first: default, environment, file, connector. Each value that loses to another
leaves a note, as does each key that is accepted without effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcache_ext.config_keys import (
    CONNECTOR_FAMILIES,
    CONNECTOR_NOT_NEEDED,
    EXTRA,
    EXTRA_FAMILIES,
    EXTRA_OF_STORES,
    KEYS,
    OTHER_VARIABLES,
    RENAMED,
    Key,
    nearest,
)
from lmcache_ext.config_sources import (
    Setting,
    connector_place,
    flattened,
    is_service_link,
    read_connector,
    read_environment,
    read_file,
    refusal,
    shown,
    unknown,
)
from lmcache_ext.config_urls import directories, plugin_schemes
from lmcache_ext.config_values import text

Layer = dict[str, Setting]
MAX_KEYS_SHOWN = 20
_EXTRA = "extra_config."


@dataclass
class Draft:
    """What load_config works on: everything read, before the keys are held against each other."""

    settings: Layer = field(default_factory=dict)  # by today's key, the winner of each
    values: dict[str, Any] = field(default_factory=dict)  # by home, such as "live.min_retrieve_tokens"
    not_needed: dict[str, object] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    _notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # keys, by (place, message)
    _places: dict[tuple[str, str], str] = field(default_factory=dict)  # the first place, by (kind, message)

    def say(self, place: str, message: str) -> None:
        """Note ``message`` about a place."""
        self._notes.setdefault((place, message), [])

    def note(self, setting: Setting, message: str) -> None:
        """Note ``message`` about a setting; settings of one source with one message share a line."""
        place = self._places.setdefault((setting.origin.kind, message), setting.origin.text)
        self._notes.setdefault((place, message), []).append(setting.legacy or setting.key)

    def notes(self) -> tuple[str, ...]:
        """One line each, in the order they came up."""
        return tuple(
            ": ".join((place, _few(keys), message) if keys else (place, message))
            for (place, message), keys in self._notes.items()
        )


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - MAX_KEYS_SHOWN} more" if len(keys) > MAX_KEYS_SHOWN else ""
    return ", ".join(keys[:MAX_KEYS_SHOWN]) + more


def read_sources(
    path: str | None, content: str | None, environ: Mapping[str, str], connector_extra: Mapping[str, object]
) -> Draft:
    """Read and merge all sources; ``ConfigError`` at the first setting that cannot be honoured."""
    result = Draft()
    layers = [
        _layer(_environment(environ, result), result),
        _layer(_known(read_file(path, content)) if path else [], result),
        _layer(_known(_connector(connector_extra, result)), result),
    ]
    for layer in layers:
        for key, setting in layer.items():
            if key in result.settings:
                loser = result.settings[key]
                result.note(loser, _shadow(loser, setting))
            result.settings[key] = setting
    for setting in result.settings.values():
        _read(setting, result)
    return result


def is_known(key: str) -> bool:
    """Whether ``key`` is a setting, today's or an old one."""
    return key in KEYS or key in RENAMED or key in ("local_device", "extra_config")


def _known(settings: list[Setting]) -> list[Setting]:
    for setting in settings:
        if not is_known(setting.key) and not setting.key.startswith(_EXTRA):
            near = nearest(setting.key)
            way_out = f"did you mean {near}?" if near else "remove it; 'lmcache-ext keys' lists all settings"
            raise unknown(setting, way_out)
    return settings


def _environment(environ: Mapping[str, str], result: Draft) -> list[Setting]:
    """The settings among the variables; a note for each variable that looks like one and is not."""
    settings: Layer = {}
    for name, setting in read_environment(environ):
        if is_known(setting.key):
            if not environ[name].strip():
                result.say(name, "is empty, which counts as not set")
                continue
            today = "LMCACHE_" + setting.key.upper()
            if name != today:
                result.say(name, f"{name.removesuffix(setting.key.upper())} is an old prefix, write {today}")
            settings.setdefault(setting.key, setting)
        elif not OTHER_VARIABLES.fullmatch(name) and not is_service_link(name):
            near = nearest(setting.key)
            way_out = f"did you mean LMCACHE_{near.upper()}?" if near and is_known(near) else "it has no effect"
            result.say(name, f"is not a setting; {way_out}")
    return list(settings.values())


def _connector(extra: Mapping[str, object], result: Draft) -> list[Setting]:
    """The ``lmcache.*`` keys; a note for each other key of LMCache."""
    settings = []
    for key in extra:
        place = connector_place(key)
        if key in CONNECTOR_NOT_NEEDED:
            result.say(place, f"not needed: {CONNECTOR_NOT_NEEDED[key]}")
        elif CONNECTOR_FAMILIES.fullmatch(key):
            result.say(place, "not needed: there is no multiprocess server to talk to")
        elif key in KEYS:
            result.say(place, f"has no effect; did you mean lmcache.{key}?")
    for setting in read_connector(extra):
        name = "lmcache." + setting.key
        if name not in CONNECTOR_NOT_NEEDED and not CONNECTOR_FAMILIES.fullmatch(name):
            settings.append(setting)
    return settings


def _layer(settings: Iterable[Setting], result: Draft) -> Layer:
    """One source by today's keys; a key under its own name beats the same key under an old name."""
    written = {setting.key: setting for setting in flattened(list(settings))}
    layer = {key: setting for key, setting in written.items() if key != "local_device" and key not in RENAMED}
    for setting in written.values():
        for modern in _modern(setting, written, result):
            if modern.key in layer:
                result.note(modern, f"ignored: {layer[modern.key].origin.text} says {modern.key}, its name of today")
            else:
                layer[modern.key] = modern
    return layer


def _modern(setting: Setting, written: Layer, result: Draft) -> list[Setting]:
    """What an old key means today; nothing for a key of today."""
    if setting.key == "local_device":
        return _modern_device(setting, result)
    if setting.key not in RENAMED:
        return []
    key = RENAMED[setting.key]
    if setting.key == "max_local_cache_size" and "file://" in str(getattr(written.get("local_device"), "value", "")):
        key = "max_local_disk_size"
    result.note(setting, f"is an old name, read as {key}")
    return [Setting(key, setting.value, setting.origin, setting.key)]


def _modern_device(setting: Setting, result: Draft) -> list[Setting]:
    """``local_device``: cpu, cuda, or file:///directory."""
    try:
        device = text(setting.value)
        is_file = device.startswith("file://") or device.startswith("/")
        paths = directories(device) if is_file else ()
        if not is_file and device.partition(":")[0].lower() not in ("cpu", "cuda"):
            raise ValueError("is not a device: write local_cpu: true, or local_disk: /path")
    except ValueError as error:
        raise refusal(setting, str(error)) from None
    if is_file:
        result.note(setting, f"is an old key, read as local_disk: {','.join(paths)}")
        return [Setting("local_disk", device, setting.origin, setting.key)]
    on_gpu = "; KV on the GPU is vLLM's own prefix cache" if device.lower().startswith("cuda") else ""
    result.note(setting, f"is an old key, read as local_cpu: true{on_gpu}")
    return [Setting("local_cpu", True, setting.origin, setting.key)]


def _shadow(loser: Setting, winner: Setting) -> str:
    key = loser.key
    end = "; LMCache itself would take the variable" if winner.origin.kind == "file" else ""
    winning = f"{winner.origin.text} ({key}: {shown(key, winner.value)})"
    return f"{shown(key, loser.value)} is shadowed by {winning}{end}"


def _read(setting: Setting, result: Draft) -> None:
    """Read one value into its home, or among those without one."""
    if setting.key.startswith(_EXTRA):
        key = _extra_key(setting, result)
        result.extra[setting.key.removeprefix(_EXTRA)] = setting.value
    else:
        key = KEYS[setting.key]
    if key is None:
        return
    try:
        value = key.read(setting.value)
    except ValueError as error:
        raise refusal(setting, str(error)) from None
    if key.use != "honoured":
        result.note(setting, f"not needed: {key.note}")
    if key.home is None:
        result.not_needed[setting.key] = value
    elif value is not None:
        result.values[key.home] = value


def _extra_key(setting: Setting, result: Draft) -> Key | None:
    """The typed option of ``extra_config``, if it is one; else a note."""
    name = setting.key.removeprefix(_EXTRA)
    if name in EXTRA:
        return EXTRA[name]
    if EXTRA_OF_STORES.fullmatch(name):
        return None
    if EXTRA_FAMILIES.fullmatch(name):
        result.note(setting, "not needed: nothing here reads this option of LMCache")
        return None
    if name.partition(".")[0] in plugin_schemes():
        return None
    near = nearest(name, EXTRA)
    result.note(setting, "unknown option, without effect" + (f"; did you mean {near}?" if near else ""))
    return None
