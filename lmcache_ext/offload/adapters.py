"""Which LoRA adapter a request really uses.

vLLM hashes an adapter's name and path. Two servers may hold different weights under the same ones,
so outside the engine the adapter's content is part of every key (`offload.lookups`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from lmcache_ext.namespace import adapter_identity
from lmcache_ext.offload.lookups import ADAPTER_PARAM

_Stamp = tuple[tuple[str, int, int], ...]


class Adapters:
    """Identities of adapters, read when an adapter is first used.

    Files that change afterwards may or may not be what this engine computes with: then the adapter is
    unknown ("") until it is loaded under a new id.
    """

    def __init__(self) -> None:
        self._paths: dict[tuple[str, int], str] = {}  # resolving one may ask the Hub
        self._known: dict[tuple[str, int], tuple[_Stamp, str]] = {}

    def label(self, request: Any) -> bool:  # noqa: ANN401  vLLM's Request
        """Put the identity of the request's adapter where the tiers look for it, whatever a client sent."""
        if request.lora_request is None:
            if request.kv_transfer_params:
                request.kv_transfer_params.pop(ADAPTER_PARAM, None)
            return True
        identity = self._identity(request.lora_request)
        request.kv_transfer_params = {**(request.kv_transfer_params or {}), ADAPTER_PARAM: identity}
        return True

    def _identity(self, adapter: LoRARequest) -> str:
        key = (adapter.lora_path, adapter.lora_int_id)
        if key not in self._paths:
            self._paths[key] = get_adapter_absolute_path(adapter.lora_path)
        path = self._paths[key]
        stamp = _stamp(path)
        if stamp is None:
            return ""
        if key not in self._known:
            found = adapter_identity(path)
            self._known[key] = (stamp, found.hex() if found else "")
        elif self._known[key][0] != stamp:
            self._known[key] = ((), "")
        return self._known[key][1]


def _stamp(path: str) -> _Stamp | None:
    try:
        stats = [(file.name, file.stat()) for file in sorted(Path(path).iterdir())]
    except OSError:
        return None
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
