"""Which serde writes to a tier, from its name in the configuration and what is known of a row's elements."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_ext.config import Config
from lmcache_ext.errors import ConfigError
from lmcache_ext.ops import cachegen, fixed, lossless
from lmcache_ext.ops.layout import Layout
from lmcache_ext.serde.base import Serde
from lmcache_ext.serde.cachegen import CacheGenSerde
from lmcache_ext.serde.fixed import NAMES, FixedSerde
from lmcache_ext.serde.lossless import LosslessSerde
from lmcache_ext.serde.naive import NaiveSerde

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of KV dtypes; packed and 8-bit ones: 1


def open_serde(
    name: str,
    origin: str,
    *,
    kv_dtype: str,
    layout: Layout | None,
    opaque: str = "",
    key_bins: Sequence[float] = (),
    value_bins: Sequence[float] = (),
) -> Serde:
    """The serde called `name` by the setting at `origin`, for KV of vLLM's `kv_dtype` (such as "bfloat16").

    `layout` None means that a row's elements are unknown, for the reason `opaque`. The bins are those
    of cachegen. Raises ConfigError where the serde cannot run here.
    """
    if name == NaiveSerde.name:
        return NaiveSerde()
    if not all(codec.available() for codec in (lossless, fixed, cachegen)):
        raise ConfigError(
            f"{origin}: {name} needs the compiled codecs, and this package was installed without them: install it "
            "with a C++ compiler at hand, or write naive"
        )
    if name == LosslessSerde.name:
        return LosslessSerde(_ELEMENT_BYTES.get(kv_dtype, 1))
    if layout is None:
        raise ConfigError(
            f"{origin}: {name} must know where keys and values lie, and here {opaque}: write lossless, which needs not"
        )
    if name == CacheGenSerde.name:
        return CacheGenSerde(layout, key_bins, value_bins)
    return FixedSerde(NAMES[name], layout)


def readable_serdes() -> tuple[Serde, ...]:
    """Serdes whose chunks any tier takes besides its own: a change of the setting costs no hit."""
    return (NaiveSerde(), LosslessSerde(1)) if lossless.available() else (NaiveSerde(),)


def loss(config: Config) -> str:
    """The lossy serdes among an engine's tiers, host memory included, a part of its namespace; "" if there are none.

    Not of the one tier alone: what is computed after a prefix that came back with a loss is other KV
    too, wherever it is stored then. Who asked for bit-exact KV never meets either.
    """
    names = {f"host {config.host_kv_dtype}"} - {"host auto"}
    if config.disk_paths:
        names.add(config.local_disk_serde)
    if config.live.remote_url is not None:
        names.add(config.live.remote_serde)
    names -= {NaiveSerde.name, LosslessSerde.name}
    bins = f" {config.cachegen_key_bins} {config.cachegen_value_bins}" if CacheGenSerde.name in names else ""
    return "+".join(sorted(names)) + bins
