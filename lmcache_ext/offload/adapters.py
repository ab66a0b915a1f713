"""Which LoRA adapter a request really uses.

vLLM hashes an adapter's name and path. Two servers may hold different weights under the same ones,
so outside the engine the adapter's content is part of every key (`offload.tier`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from lmcache_ext.namespace import adapter_identity
from lmcache_ext.offload.tier import ADAPTER_PARAM

_Stamp = tuple[tuple[str, int, int], ...]


class Adapters:
    """Identities of adapters by path, read again when their files change."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[_Stamp, str]] = {}

    def label(self, request: Any) -> None:  # noqa: ANN401  vLLM's Request
        """Put the identity of the request's adapter where the tiers look for it, whatever a client sent."""
        if request.lora_request is None:
            if request.kv_transfer_params:
                request.kv_transfer_params.pop(ADAPTER_PARAM, None)
            return
        identity = self._identity(request.lora_request)
        request.kv_transfer_params = {**(request.kv_transfer_params or {}), ADAPTER_PARAM: identity}

    def _identity(self, adapter: LoRARequest) -> str:
        path = get_adapter_absolute_path(adapter.lora_path)
        stamp = _stamp(path)
        if stamp is None:
            return ""
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            found = adapter_identity(path)
            known = self._known[path] = (stamp, found.hex() if found else "")
        return known[1]


def _stamp(path: str) -> _Stamp | None:
    try:
        stats = [(file.name, file.stat()) for file in sorted(Path(path).iterdir())]
    except OSError:
        return None
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
