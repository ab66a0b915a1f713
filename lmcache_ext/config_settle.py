"""The keys held against each other, once all have been read: what one makes of another."""

from __future__ import annotations

from collections.abc import Mapping

from lmcache_ext.config_keys import BIT_EXACT_SERDES, LEGACY_SERDES
from lmcache_ext.config_merge import Draft
from lmcache_ext.config_quotas import OTHERS, Quota
from lmcache_ext.config_sources import Origin, Setting, refusal, shown
from lmcache_ext.config_urls import directories, split_url
from lmcache_ext.config_values import GIB, boolean, in_gib, seconds

DEFAULT_HOST_BYTES = 5 * GIB
DEFAULT_DISK_BYTES = 10 * GIB  # LMCache's own default is 0: a disk that stores nothing
_SKIP_SAVE = "LMCACHE_FORCE_SKIP_SAVE"
_PEER_ADDRESS = (
    "write where other engines reach this one; on Kubernetes the host is a variable, LMCACHE_P2P_HOST from status.podIP"
)


def settle(draft: Draft, environ: Mapping[str, str]) -> None:
    """Complete ``draft.values`` and ``draft.notes``; ``ConfigError`` for keys that contradict each other."""
    _settle_serdes(draft)
    _settle_disk(draft)
    _settle_loss(draft)
    _settle_copier(draft)
    _settle_host(draft)
    _settle_quotas(draft)
    _settle_fixed(draft)
    _settle_controller(draft)
    _settle_peer(draft)
    _add_variables_of_others(draft, environ)
    _settle_skip_save(draft, environ)


def _settle_serdes(draft: Draft) -> None:
    for key, home in (("remote_serde", "live.remote_serde"), ("local_disk_serde", "local_disk_serde")):
        value = draft.values.get(home)
        if value in LEGACY_SERDES:
            draft.note(draft.settings[key], f"{value} is an old name for plain bytes, read as naive")
            draft.values[home] = "naive"


def _settle_disk(draft: Draft) -> None:
    """One directory store for local_disk, file:// and fs://, always with a limit."""
    url, limit = draft.settings.get("remote_url"), draft.settings.get("max_local_disk_size")
    remote = split_url(draft.values["live.remote_url"]) if "live.remote_url" in draft.values else None
    if url and remote and remote.scheme in ("fs", "file") and "disk_paths" not in draft.values:
        del draft.values["live.remote_url"]
        paths = directories(remote.path)
        draft.values["disk_paths"] = paths
        draft.note(url, f"is a directory, read as local_disk: {','.join(paths)}")
    disk = draft.settings.get("local_disk") or url
    if disk is None or "disk_paths" not in draft.values:
        if limit is not None and draft.values.pop("live.disk_capacity_bytes"):
            draft.note(limit, "without effect: no local_disk names a directory")
    elif limit is None:
        draft.values["live.disk_capacity_bytes"] = DEFAULT_DISK_BYTES
        draft.note(disk, "no max_local_disk_size is given: limited to 10 GiB (LMCache would store nothing)")
    elif not draft.values["live.disk_capacity_bytes"]:
        where = ",".join(draft.values["disk_paths"])
        raise refusal(limit, f"lets nothing be stored in {where}: write a size such as 20, or remove local_disk")


def _settle_loss(draft: Draft) -> None:
    """Rows that are fp8 already go to the tiers behind them bit for bit."""
    if draft.values.get("host_kv_dtype") != "fp8":
        return
    tiers = (("local_disk_serde", "", "disk_paths"), ("remote_serde", "live.", "live.remote_url"))
    for key, part, tier in tiers:
        if tier in draft.values and draft.values.get(part + key, "naive") not in BIT_EXACT_SERDES:
            raise refusal(
                draft.settings[key],
                "needs keys and values in 16 or 32 bits, and extra_config.host_kv_dtype: fp8 has left 8 of them: write "
                f"{' or '.join(BIT_EXACT_SERDES)}, which write those 8, or remove host_kv_dtype",
            )


def _settle_copier(draft: Draft) -> None:
    """On a GPU rows in eight bits are for our kernels to write, which nobody needs to say twice."""
    if draft.values.get("host_kv_dtype") == "fp8" and draft.values.get("cuda_page_copier") == "vllm":
        raise refusal(
            draft.settings["extra_config.cuda_page_copier"],
            "leaves pages as they are, and extra_config.host_kv_dtype: fp8 needs the kernels: remove one of them",
        )


def _settle_host(draft: Draft) -> None:
    size = draft.settings.get("max_local_cpu_size")
    if size is None:
        return
    capacity_bytes = draft.values["live.host_capacity_bytes"]
    if not capacity_bytes and draft.values.get("local_cpu", True):
        raise refusal(size, "lets nothing be stored in host memory: write a size such as 5, or local_cpu: false")
    if capacity_bytes:
        draft.note(size, f"{in_gib(capacity_bytes)} for the whole engine (LMCache: for each rank)")


def _settle_quotas(draft: Draft) -> None:
    """A quota is an upper limit and no reservation: say where it limits nothing, or promises too much."""
    quotas: tuple[Quota, ...] = draft.values.get("live.quotas", ())
    capacity_bytes = draft.values.get("live.host_capacity_bytes", DEFAULT_HOST_BYTES)
    if not quotas or not capacity_bytes:
        return
    setting, whole = draft.settings["extra_config.quotas"], f"max_local_cpu_size of {in_gib(capacity_bytes)}"
    for quota in quotas:
        if quota.host_bytes >= capacity_bytes:
            draft.note(setting, f"{quota} limits nothing: it is not less than {whole}")
    total_bytes = sum(quota.host_bytes for quota in quotas if quota.tenant != OTHERS)
    if total_bytes > capacity_bytes:
        draft.note(
            setting, f"{in_gib(total_bytes)} for all named tenants is more than {whole}: they may evict each other"
        )


def _settle_fixed(draft: Draft) -> None:
    """Keys of which only one value can be honoured here."""
    if draft.values.get("enable_async_loading") is False:
        draft.note(draft.settings["enable_async_loading"], "loading is always asynchronous here")
        draft.values["enable_async_loading"] = True
    if draft.values.get("save_unfull_chunk") is True:
        draft.note(draft.settings["save_unfull_chunk"], "the smallest unit stored is a block of vLLM")


def _settle_controller(draft: Draft) -> None:
    """Two addresses, or one for both: every port of the controller understands everything."""
    if not draft.values.get("controller.enabled"):
        return
    urls = {home: draft.values.get(home) for home in ("controller.pull_url", "controller.reply_url")}
    one = next(filter(None, urls.values()), None)
    if one is None:
        setting = draft.settings["enable_controller"]
        raise refusal(setting, "needs controller_pull_url and controller_reply_url: write host:port for each")
    draft.values.update({home: url or one for home, url in urls.items()})


def _settle_peer(draft: Draft) -> None:
    if not draft.values.get("peer.enabled"):
        return
    setting = draft.settings["enable_p2p"]
    if not draft.values.get("controller.enabled"):
        raise refusal(setting, "needs enable_controller: true: the controller says which peer has a chunk")
    if not draft.values.get("peer.host") or not draft.values.get("peer.init_ports"):
        raise refusal(setting, "needs p2p_host and p2p_init_ports: " + _PEER_ADDRESS)
    if draft.values.get("peer.transfer_channel") not in (None, "tcp"):
        channel = draft.settings["transfer_channel"]
        draft.note(channel, f"{channel.value}: TCP stands in, from host memory to host memory")


def _add_variables_of_others(draft: Draft, environ: Mapping[str, str]) -> None:
    """Variables that LMCache reads under names of their own, and the pod's name as instance id."""
    scheme = split_url(draft.values["live.remote_url"]).scheme if "live.remote_url" in draft.values else ""
    names = [("POD_NAME", "instance_id"), ("HOSTNAME", "instance_id")]
    if scheme == "resp":
        names += [("LMCACHE_RESP_USERNAME", "live.remote.username"), ("LMCACHE_RESP_PASSWORD", "live.remote.password")]
    if scheme == "redis-sentinel":
        names += [
            ("REDIS_SERVICE_NAME", "live.remote.sentinel_service"),
            ("REDIS_TIMEOUT", "live.remote.sentinel_timeout_s"),
        ]
    if "mooncakestore" in (scheme, _audited(draft)):
        names.append(("MOONCAKE_CONFIG_PATH", "live.mooncake.config_path"))
    for name, home in names:
        value = environ.get(name, "").strip()
        if value and home not in draft.values:
            draft.values[home] = _timeout(name, value) if name == "REDIS_TIMEOUT" else value


def _settle_skip_save(draft: Draft, environ: Mapping[str, str]) -> None:
    """LMCACHE_FORCE_SKIP_SAVE, which LMCache reads beside its settings, is freeze by another name."""
    value = environ.get(_SKIP_SAVE, "").strip()
    if not value:
        return
    setting = Setting("freeze", value, Origin("env", _SKIP_SAVE))
    try:
        skips = boolean(value)
    except ValueError as error:
        raise refusal(setting, str(error)) from None
    if (written := draft.settings.get("freeze")) is not None:
        draft.say(_SKIP_SAVE, f"is shadowed by {written.origin.text} (freeze: {shown('freeze', written.value)})")
    elif skips:
        draft.say(_SKIP_SAVE, "is read as freeze: true")
        draft.settings["freeze"] = setting
        draft.values["live.freeze"] = True


def _audited(draft: Draft) -> str:
    url = draft.values.get("live.audit_actual_remote_url")
    return split_url(url).scheme if url else ""


def _timeout(name: str, value: str) -> float:
    try:
        return seconds(value)
    except ValueError as error:
        raise refusal(Setting(name, value, Origin("env", "environment")), str(error)) from None
