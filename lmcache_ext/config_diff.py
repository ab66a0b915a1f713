"""What differs between two configurations, and what of a new one a running process can take.

Whether a setting is live is its place: it is read into `Config.live`, or it is an option that only the
stores behind `remote_url` read, which are opened anew.
"""

from __future__ import annotations

from collections.abc import Iterator

from lmcache_ext.config import Config, Frozen, in_words
from lmcache_ext.config_keys import EXTRA, KEYS
from lmcache_ext.config_sources import shown

_EXTRA = "extra_config."


def _by_home() -> dict[str, list[str]]:
    """Place in Config -> the keys that are read into it, of those that have an effect."""
    found: dict[str, list[str]] = {}
    for prefix, table in (("", KEYS), (_EXTRA, EXTRA)):
        for key in table.values():
            if key.home is not None and key.use == "honoured":
                found.setdefault(key.home, []).append(prefix + key.name)
    return found


_BY_HOME = _by_home()


def is_live(key: str) -> bool:
    """Whether a setting, such as "freeze" or "extra_config.valkey_ttl_sec", may change in a running server."""
    table, name = (EXTRA, key.removeprefix(_EXTRA)) if key.startswith(_EXTRA) else (KEYS, key)
    known = table.get(name)
    if known is None:
        return table is EXTRA  # an option of a store, which is opened anew
    return known.home is not None and known.home.startswith("live.")


def differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Settings with another value, as "key: old -> new", secrets masked: (live ones, those that need a restart)."""
    live, fixed = [], []
    for home, names in _BY_HOME.items():
        before, after = old.at(home), new.at(home)
        if before == after:
            continue
        name = next((name for name in names if name in new.origins or name in old.origins), names[0])
        line = f"{name}: {in_words(name, before)} -> {in_words(name, after)}"
        if home.startswith("live."):
            live.append(line)
        else:
            origin = new.origin(name)
            place = "" if origin.kind == "default" else f"{origin.text}: "
            fixed.append(f"{place}{line} needs a restart")
    return live + list(_free_options(old, new)), fixed


def _free_options(old: Config, new: Config) -> Iterator[str]:
    """Options of stores that have no place of their own."""
    before, after = old.live.extra_config, new.live.extra_config
    for name in dict.fromkeys((*before, *after)):
        if name not in EXTRA and before.get(name) != after.get(name):
            key = _EXTRA + name
            yield f"{key}: {shown(key, before.get(name))} -> {shown(key, after.get(name))}"


def merged(running: Config, new: Config) -> Config:
    """`running` with the live part of `new`, less what cannot be had without a restart."""
    kept: dict[str, object] = {}
    if new.disk_paths != running.disk_paths:
        kept["disk_capacity_bytes"] = running.live.disk_capacity_bytes
        if new.live.remote_url is None and new.origin("remote_url").kind != "default":
            kept["remote_url"] = running.live.remote_url  # a directory now, which is a disk_path
    if new.local_cpu != running.local_cpu:
        kept["host_capacity_bytes"] = running.live.host_capacity_bytes
    fixed = {name for name, key in EXTRA.items() if key.home is not None and not is_live(_EXTRA + name)}
    options = {name: value for name, value in new.live.extra_config.items() if name not in fixed}
    options |= {name: value for name, value in running.live.extra_config.items() if name in fixed}
    live = new.live.model_copy(update={**kept, "extra_config": Frozen(options)})
    origins = {key: origin for key, origin in new.origins.items() if _follows(key)}
    origins |= {key: origin for key, origin in running.origins.items() if not _follows(key)}
    return running.model_copy(
        update={
            "live": live,
            "origins": Frozen(origins),
            "not_needed": new.not_needed,
            "notes": new.notes,
        }
    )


def _follows(key: str) -> bool:
    """Whether the origin of a key is that of the new file: it is live, or has no effect."""
    return is_live(key) or (key in KEYS and KEYS[key].home is None)
