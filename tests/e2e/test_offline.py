"""Without a server: a script that makes its engine itself, one process after the other, as LMCache's examples do.

The second has nothing to compute but one token, with which vLLM's attention dies on a CPU with AMX that nobody
asked for.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.e2e.cache import CHUNK, chunk_files, model
from tests.e2e.server import ROOT, _base_env

pytestmark = pytest.mark.e2e


def test_a_script_hits_what_the_one_before_it_computed(tmp_path):
    settings = {"LMCACHE_USE_EXPERIMENTAL": "True", "LMCACHE_CHUNK_SIZE": str(CHUNK), "LMCACHE_LOCAL_CPU": "True"}
    settings |= {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5", "LMCACHE_LOCAL_DISK": f"file://{tmp_path}/kv"}
    said = []
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, ROOT / "examples" / "offline.py", model(), "What comes next?"],
            env={**_base_env(kv_space_gib=1, cores=None), **settings, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
            process_group=0,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        said += re.findall(r"(\d+) prompt tokens, (\d+) from the cache", ended.stdout)
    (total, cold), (_, reused) = [tuple(map(int, numbers)) for numbers in said]
    assert (cold, reused) == (0, total // CHUNK * CHUNK)
    assert len(chunk_files(tmp_path / "kv")) == total // CHUNK
