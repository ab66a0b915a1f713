"""A serde named in the configuration runs in the real engine: smaller chunks, and the KV they promise."""

from __future__ import annotations

import pytest

from tests.e2e.cache import CHUNK, ROW_BYTES, ask, cache_server, cached_tokens, chunk_files, logprobs, prompt

pytestmark = pytest.mark.e2e

TOKENS = 6 * CHUNK + 100
REUSED = 6 * CHUNK


def test_lossless_chunks_are_smaller_and_come_back_bit_for_bit(tmp_path):
    with cache_server(tmp_path, cache={"LMCACHE_LOCAL_DISK_SERDE": "lossless"}) as writer:
        assert cached_tokens(ask(writer, prompt(1, TOKENS))) == 0
        twin = ask(writer, prompt(1, TOKENS))  # vLLM's own prefix cache, to the same token
        assert cached_tokens(twin) == REUSED
        writer.wait_for(lambda: len(chunk_files(tmp_path)) == 6, 30, "write the chunks")
    sizes = [path.stat().st_size for path in chunk_files(tmp_path)]
    assert max(sizes) < 0.9 * ROW_BYTES  # float32: one byte of four is an exponent
    # a replica that was not told of lossless reads it all the same
    with cache_server(tmp_path) as reader:
        answer = ask(reader, prompt(1, TOKENS))
        assert cached_tokens(answer) == REUSED
        assert logprobs(answer) == logprobs(twin)
        assert reader.metrics().get("lmcache_ext:corrupt_chunks_total", 0) == 0
