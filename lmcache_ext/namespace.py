"""Who may share KV with whom: 16 bytes in front of every key.

A path is never an identity (every KServe model is mounted at ``/mnt/models``) and neither is a name.
What decides is gathered as plain text components by `lmcache_ext.offload.identity` and digested
here; two engines share chunks exactly when every component is equal.

Weights are identified by content without reading all of it: the header of every safetensors file
(names, shapes, dtypes, offsets) plus `_SAMPLES` short samples spread over every tensor. A fine-tune
or a merged adapter changes whole matrices, so each changed tensor differs in its samples. Small
checkpoints are read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

FORMAT_VERSION = 1
NAMESPACE_BYTES = 16

_SAMPLES = 8
_SAMPLE_BYTES = 1024
_WHOLE_BYTES = 64 << 20  # checkpoints up to this size are read whole
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format itself
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def digest(components: Mapping[str, str]) -> bytes:
    """The namespace of an engine: BLAKE2b-128 over the canonical JSON of its components."""
    text = json.dumps({"format": str(FORMAT_VERSION), **components}, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=NAMESPACE_BYTES).digest()


def weights_identity(directory: str | os.PathLike[str]) -> str | None:
    """A hex digest of the weights in `directory`, or None where there are none.

    Independent of the directory's path, of time stamps and of file order. A single file (GGUF) may
    stand in the directory's place. A header that makes no sense is sampled like any other bytes.
    """
    root = Path(directory)
    files = [root] if root.is_file() else sorted(path for path in root.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    if not files:
        return None
    state = hashlib.blake2b(digest_size=32)
    whole = sum(path.stat().st_size for path in files) <= _WHOLE_BYTES
    for path in files:
        state.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for piece in _whole(file) if whole else _samples(file, path):
                state.update(piece)
    return state.hexdigest()


def adapter_identity(path: str) -> bytes | None:
    """16 bytes that identify a LoRA adapter by content, or None where it cannot be read."""
    try:
        identity = weights_identity(path)
        settings = Path(path, "adapter_config.json").read_bytes()
    except OSError:
        return None
    if identity is None:
        return None
    return hashlib.blake2b(identity.encode() + settings, digest_size=16).digest()


def _whole(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        yield piece


def _samples(file: BinaryIO, path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    header = _header(file, size) if path.suffix == ".safetensors" else b""
    tensors = _tensors(header, size)
    yield header
    for begin, end in tensors:
        yield from _spread(file, begin, end, _SAMPLES)
    if not tensors:
        yield from _spread(file, 0, size, 64 * _SAMPLES)


def _header(file: BinaryIO, size: int) -> bytes:
    header_bytes = int.from_bytes(file.read(8), "little")
    return file.read(header_bytes) if header_bytes <= min(size, _MAX_HEADER_BYTES) else b""


def _tensors(header: bytes, size: int) -> list[tuple[int, int]]:
    """The [begin, end) of each tensor in its file, by name; none where the header lies."""
    data = 8 + len(header)
    try:
        entries = [
            entry["data_offsets"] for name, entry in sorted(json.loads(header).items()) if name != "__metadata__"
        ]
        places = [(data + int(begin), data + int(end)) for begin, end in entries]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return []
    return places if all(data <= begin <= end <= size for begin, end in places) else []


def _spread(file: BinaryIO, begin: int, end: int, count: int) -> Iterator[bytes]:
    """`count` samples evenly spread over [begin, end), the first and the last byte included."""
    last = max(begin, end - _SAMPLE_BYTES)
    for i in range(count):
        offset = begin + (last - begin) * i // max(1, count - 1)
        yield os.pread(file.fileno(), min(_SAMPLE_BYTES, end - offset), offset)
