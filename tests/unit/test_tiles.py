"""Tile registers are asked for where there are any."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = "from lmcache_ext.ops.tiles import ask_for_tiles; print(ask_for_tiles(), ask_for_tiles())"


def test_a_process_may_use_tiles_where_its_cpu_has_them():
    has_tiles = " amx_tile" in Path("/proc/cpuinfo").read_text()
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.split() == [str(has_tiles)] * 2
