"""Which serde writes to a tier, from its name in the configuration."""

from __future__ import annotations

from vllm.logger import init_logger

from lmcache_ext.errors import ConfigError
from lmcache_ext.ops import lossless
from lmcache_ext.serde.base import Serde
from lmcache_ext.serde.lossless import LosslessSerde
from lmcache_ext.serde.naive import NaiveSerde

logger = init_logger("vllm.lmcache_ext.offload.serdes")

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of KV dtypes; packed and 8-bit ones: 1


def open_serde(name: str, origin: str, *, kv_dtype: str) -> Serde:
    """The serde called `name` by the setting at `origin`, for KV of vLLM's `kv_dtype` (such as "bfloat16").

    Raises ConfigError where it cannot run here. Names of LMCache that this version does not have are
    stored bit for bit, which is larger and never wrong.
    """
    if name == LosslessSerde.name:
        _require_compiled(name, origin)
        return LosslessSerde(_ELEMENT_BYTES.get(kv_dtype, 1))
    if name != NaiveSerde.name:
        logger.warning("%s: %s is not in this version; chunks are stored naive, bit for bit and larger", origin, name)
    return NaiveSerde()


def readable_serdes(serde: Serde) -> tuple[Serde, ...]:
    """Other serdes whose chunks a tier takes: a change of the setting, or another replica's, costs no hit."""
    if not serde.lossless:
        return ()
    return (NaiveSerde(), LosslessSerde(1)) if lossless.available() else (NaiveSerde(),)


def _require_compiled(name: str, origin: str) -> None:
    if not lossless.available():
        raise ConfigError(
            f"{origin}: {name} needs the compiled codecs, and this package was installed without them: install it "
            "with a C++ compiler at hand, or write naive"
        )
