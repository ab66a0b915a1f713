"""A ConfigMap volume as kubelet keeps it: the steps of its AtomicWriter, one by one.

directory/
  ..2026_01_31_12_00_00.123456789/lmcache_config.yaml   the files, written into a new directory each time
  ..data -> ..2026_01_31_12_00_00.123456789             swapped by a rename
  lmcache_config.yaml -> ..data/lmcache_config.yaml     what the container is told to open; never touched again
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_NUMBERS = itertools.count(1)


class ConfigMapVolume:
    """One mounted ConfigMap; `write` is what `kubectl apply` causes, up to a minute later on a real node."""

    def __init__(self, directory: Path, data: Mapping[str, str]) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.write(data)

    def write(self, data: Mapping[str, str]) -> None:
        """Replace all content, atomically for whoever opens a file by its visible name."""
        for _ in self.steps(data):
            pass

    def steps(self, data: Mapping[str, str]) -> Iterator[str]:
        """The same, stopping after every system call that somebody could see."""
        data_link = self.directory / "..data"
        old = self.directory / os.readlink(data_link) if data_link.is_symlink() else None
        new = self.directory / f"..{time.strftime('%Y_%m_%d_%H_%M_%S')}.{next(_NUMBERS):09}"
        new.mkdir()
        yield "made the directory"
        for name, text in data.items():
            (new / name).write_text(text)
            yield f"wrote {name}"
        temporary = self.directory / "..data_tmp"
        temporary.symlink_to(new.name)
        yield "linked ..data_tmp"
        temporary.rename(data_link)
        yield "renamed it to ..data"
        self._show(data)
        yield "linked what is visible"
        if old is not None:
            shutil.rmtree(old)
        yield "removed the old directory"

    def _show(self, data: Mapping[str, str]) -> None:
        for name in data:
            if not (self.directory / name).is_symlink():
                (self.directory / name).symlink_to(f"..data/{name}")
        for path in self.directory.iterdir():
            if not path.name.startswith("..") and path.name not in data:
                path.unlink()
