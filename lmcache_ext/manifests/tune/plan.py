"""From facts to sizes. Each change says why, in numbers, so that a reader can disagree.

The model is one sentence: a tier should hold what was newly computed within the time that a prompt is
expected to come back. New KV arrives at (tokens looked up - tokens hit) / uptime, times bytes per token; host
memory keeps ``retention_s`` of it, the disk ``disk_retention_s``. Memory of the pod and /dev/shm follow from the
first. Without traffic to speak of, only what cannot work is changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_ext.manifests.nodes import Edits, Node, add_item, insert, put, replace
from lmcache_ext.manifests.quantities import GIB, read_bytes, shown, write_gib
from lmcache_ext.manifests.tune.facts import Facts
from lmcache_ext.manifests.tune.target import Target

MIB = 2**20
MIN_PROMPTS = 100
MIN_UPTIME_S = 600.0
WORTH_IT = 0.25  # smaller changes are noise
ENGINE_BYTES = 4 * GIB  # of a pod besides the cache, where nothing says more
SHM_SLACK_BYTES = GIB  # vLLM's own queues
ROW_BYTES = MIB  # below it the cost of an object outweighs its bytes (as chunk_size: auto)
SHM = "/dev/shm"


@dataclass(frozen=True)
class Wishes:
    """How long prompts should be kept, and how much that may cost."""

    retention_s: float = 3600.0
    disk_retention_s: float = 86400.0
    max_host_bytes: int = 64 * GIB
    max_disk_bytes: int = 1024 * GIB


class Change(NamedTuple):
    """One value that should be another, and the edits that write it."""

    what: str
    old: str
    new: str
    why: str
    edits: Edits


@dataclass
class Plan:
    changes: list[Change] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def edits(self) -> Edits:
        return tuple(edit for change in self.changes for edit in change.edits)


def propose(target: Target, facts: Facts, wishes: Wishes) -> Plan:
    """What to change, and what could not be said."""
    plan = Plan()
    host_bytes = target.config.live.host_capacity_bytes if target.config.local_cpu else 0
    if _enough_traffic(facts, plan):
        _chunk(target, facts, plan)
        host_bytes = _host(target, facts, wishes, plan) if target.config.local_cpu else 0
        _disk(target, facts, wishes, plan)
    if target.cache is None:
        plan.remarks.append("no InferenceService reads this ConfigMap: its memory and /dev/shm are not looked at")
    elif host_bytes:
        _memory(target, host_bytes, plan)
        _shm(target, host_bytes, plan)
    return plan


def _enough_traffic(facts: Facts, plan: Plan) -> bool:
    if facts.prompts < MIN_PROMPTS or (facts.uptime_s or 0.0) < MIN_UPTIME_S:
        plan.remarks.append(
            f"{facts.prompts} prompts in {(facts.uptime_s or 0) / 60:.0f} min are too few to size a cache by "
            f"(at least {MIN_PROMPTS} in {MIN_UPTIME_S / 60:.0f} min)"
        )
        return False
    if facts.new_tokens_per_s is None:
        plan.remarks.append("the server counts no lookups (vllm:external_prefix_cache_queries): is its cache on?")
        return False
    if facts.kv_bytes_per_token is None:
        plan.remarks.append("bytes per token are not known: give --model-config or --kv-bytes-per-token")
        return False
    return True


# --- the LMCache file ---------------------------------------------------------------------


def _setting(target: Target, name: str, value: object) -> Edits:
    return put(target.settings.node, name, value)


def _chunk(target: Target, facts: Facts, plan: Plan) -> None:
    """Longer where a row is far from 1 MiB, shorter where a quarter of the prompts do not fill two chunks."""
    block, now, short = facts.block_tokens, target.config.chunk_size, facts.prompt_tokens_p25
    if block is None or now == "auto" or facts.kv_bytes_per_token is None or short is None:
        return
    tokens = _chunk_tokens(now, block, facts.kv_bytes_per_token, short)
    if tokens == now:
        return
    row_kib = tokens * facts.kv_bytes_per_token / 1024
    why = (
        f"a chunk of {tokens} tokens is {row_kib:.4g} KiB, and a quarter of the prompts have at most {short:.0f} tokens"
    )
    plan.changes.append(Change("chunk_size", str(now), str(tokens), why, _setting(target, "chunk_size", tokens)))
    plan.remarks.append("chunk_size takes effect with a restart, and what is stored in other chunks is not found again")


def _chunk_tokens(now: int, block: int, bytes_per_token: float, short: float) -> int:
    """``short`` is the length that a quarter of the prompts stay below."""
    a_row = math.ceil(ROW_BYTES / (bytes_per_token * block)) * block
    half, quarter = (max(block, int(short / part) // block * block) for part in (2, 4))
    if now * bytes_per_token < ROW_BYTES / 2:
        return max(now, min(a_row, half))
    return max(quarter, min(a_row, half)) if now > short / 2 else now


def _wanted_bytes(facts: Facts, seconds: float) -> float:
    return (facts.new_tokens_per_s or 0.0) * (facts.kv_bytes_per_token or 0.0) * seconds


def _host(target: Target, facts: Facts, wishes: Wishes, plan: Plan) -> int:
    """The bytes of host memory from now on."""
    now = target.config.live.host_capacity_bytes
    wanted = _wanted_bytes(facts, wishes.retention_s)
    better = _whole_gib(wanted, wishes.max_host_bytes)
    if wanted > wishes.max_host_bytes:
        plan.remarks.append(
            f"{shown(int(wanted))} of host memory would keep {wishes.retention_s / 60:.0f} min, more than "
            f"--max-host {shown(wishes.max_host_bytes)}: the rest is for a disk or a remote store"
        )
    if abs(better - now) < WORTH_IT * now:
        return now
    why = _why(facts, wishes.retention_s, "host", facts.capacity_bytes)
    size = better // GIB
    edits = _setting(target, "max_local_cpu_size", size)
    plan.changes.append(Change("max_local_cpu_size", shown(now), f"{size} GiB", why, edits))
    return better


def _disk(target: Target, facts: Facts, wishes: Wishes, plan: Plan) -> None:
    now = target.config.live.disk_capacity_bytes
    if not target.config.disk_paths or now is None:
        return
    better = _whole_gib(_wanted_bytes(facts, wishes.disk_retention_s), wishes.max_disk_bytes)
    if abs(better - now) < WORTH_IT * now:
        return
    why = _why(facts, wishes.disk_retention_s, "disk", facts.capacity_bytes)
    size = better // GIB
    edits = _setting(target, "max_local_disk_size", size)
    plan.changes.append(Change("max_local_disk_size", shown(now), f"{size} GiB", why, edits))
    plan.remarks.append("the volume of local_disk is not looked at: 'lmcache-ext check' says whether it holds that")


def _why(facts: Facts, seconds: float, tier: str, capacities: dict[str, float] | None) -> str:
    rate = (facts.new_tokens_per_s or 0.0) * (facts.kv_bytes_per_token or 0.0)
    used, capacity = (facts.used_bytes or {}).get(tier), (capacities or {}).get(tier)
    full = f"; the tier is {used / capacity:.0%} full" if used is not None and capacity else ""
    return (
        f"{facts.new_tokens_per_s or 0:.4g} new tokens/s are {rate / MIB:.4g} MiB/s, "
        f"and prompts are to be kept for {seconds / 60:.0f} min{full}"
    )


def _whole_gib(wanted: float, limit: int) -> int:
    return min(max(1, math.ceil(wanted / GIB)), max(1, limit // GIB)) * GIB


# --- the InferenceService -----------------------------------------------------------------


def _memory(target: Target, host_bytes: int, plan: Plan) -> None:
    """What the pod has besides the cache stays, the cache's part becomes what it now is."""
    if target.cache is None or target.model is None:
        return
    limit = target.cache.container.resource("limits", "memory")
    have = read_bytes(limit.text) if limit is not None else None
    if limit is None or have is None:
        plan.remarks.append("no memory limit is in sight: give the serving runtime's manifest too, or write one")
        return
    rest = max(have - target.config.live.host_capacity_bytes, ENGINE_BYTES)
    better = write_gib(host_bytes + rest)
    if abs((read_bytes(better) or 0) - have) < GIB:
        return
    why = f"{shown(host_bytes)} for the cache and {shown(rest)} for all else"
    edits = (*_resource(target.model, "limits", better), *_resource(target.model, "requests", better))
    plan.changes.append(Change("memory", limit.text, better, why, edits))


def _resource(model: Node, part: str, size: str) -> Edits:
    """Write ``resources.<part>.memory``, whatever of it is there."""
    resources = model.at("resources")
    if resources is None:
        # both parts at once: two insertions of the same key would be one too many
        return (
            insert(model, "resources", {"requests": {"memory": size}, "limits": {"memory": size}})
            if part == "limits"
            else ()
        )
    there = resources.at(part)
    return insert(resources, part, {"memory": size}) if there is None else put(there, "memory", size)


def _shm(target: Target, host_bytes: int, plan: Plan) -> None:
    cache, model = target.cache, target.model
    if cache is None or model is None:
        return
    mount = next((each for each in cache.container.mounts if each.path == SHM), None)
    better = write_gib(host_bytes + SHM_SLACK_BYTES)
    why = f"host memory of {shown(host_bytes)} is a file there, and vLLM's queues are too"
    if mount is None and not cache.pod.complete:
        plan.remarks.append("the serving runtime is not in sight: whether it mounts /dev/shm is not known")
        return
    name = mount.volume if mount is not None else "dshm"
    volume = {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": better}}
    if mount is None:
        edits = (
            *add_item(model, "volumeMounts", {"name": name, "mountPath": SHM}),
            *_add_volume(cache.pod.spec, volume),
        )
        plan.changes.append(Change(SHM, "64Mi, of the container runtime", better, why, edits))
        return
    there = cache.pod.volumes.get(name)
    limit = there.at("emptyDir", "sizeLimit") if there is not None else None
    have = read_bytes(limit.text) if limit is not None else None
    if there is None or have is None or host_bytes <= have <= 2 * (read_bytes(better) or 0):
        return
    own = any(item.text_at("name") == name for item in cache.pod.spec.items_at("volumes"))
    edits = replace(limit, better) if own and limit is not None else _add_volume(cache.pod.spec, volume)
    plan.changes.append(Change(SHM, limit.text if limit is not None else "", better, why, edits))


def _add_volume(spec: Node, volume: Mapping[str, object]) -> Edits:
    """A volume of the InferenceService; by its name it takes the place of the runtime's."""
    return add_item(spec, "volumes", dict(volume))
