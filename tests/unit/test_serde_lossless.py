"""LosslessSerde, and that tiers of either bit-exact serde read what the other wrote."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_ext import frame
from lmcache_ext.errors import BadPayload
from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.offload.serdes import readable_serdes
from lmcache_ext.ops import lossless
from lmcache_ext.serde.lossless import LosslessSerde
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.disk import DiskStore

if not lossless.available():
    pytest.skip("no compiler was there when the package was installed", allow_module_level=True)

NAMESPACE, KEY = bytes(range(16)), b"a" * 36
ROW_BYTES = 1 << 16


def row() -> memoryview:
    values = np.random.default_rng(0).normal(size=ROW_BYTES // 2).astype("<f4")
    return memoryview((values.view("<u4") >> 16).astype("<u2").tobytes())


@pytest.fixture
def store(tmp_path):
    store = DiskStore([str(tmp_path / "disk")], None)
    yield store
    store.close()


def chunks(store, serde):
    return ChunkIO(store, serde, NAMESPACE, readable_serdes())


def stored_bytes(store) -> bytes:
    buffer = bytearray(2 * ROW_BYTES)
    length = store.get_into(NAMESPACE + KEY, (memoryview(buffer),))
    assert length is not None
    return bytes(buffer[:length])


SERDES = {"naive": NaiveSerde(), "lossless": LosslessSerde(2), "lossless of another dtype": LosslessSerde(4)}


@pytest.mark.parametrize("writer", SERDES)
@pytest.mark.parametrize("reader", SERDES)
def test_what_one_bit_exact_serde_wrote_the_other_reads(store, writer, reader):
    source, target = row(), memoryview(bytearray(ROW_BYTES))
    assert chunks(store, SERDES[writer]).keep([KEY], [source]) == [True]
    assert chunks(store, SERDES[reader]).fetch([KEY], [target]) == [True]
    assert target == source


def test_less_is_stored(store):
    chunks(store, SERDES["lossless"]).keep([KEY], [row()])
    assert len(stored_bytes(store)) < ROW_BYTES / 1.4


@pytest.mark.parametrize("reader", SERDES)
@pytest.mark.parametrize("writer", SERDES)
def test_noise_is_stored_as_it_is_and_read_by_all(store, writer, reader):
    noise, target = memoryview(np.random.default_rng(0).bytes(ROW_BYTES)), memoryview(bytearray(ROW_BYTES))
    assert chunks(store, SERDES[writer]).keep([KEY], [noise]) == [True]
    assert len(stored_bytes(store)) == frame.FRAME_BYTES + ROW_BYTES
    assert chunks(store, SERDES[reader]).fetch([KEY], [target]) == [True]
    assert target == noise


def test_payload_that_lies_under_a_good_checksum_is_a_miss_and_deleted(store):
    io = chunks(store, SERDES["lossless"])
    (part,) = SERDES["lossless"].encode(row())
    lie = bytearray(part)
    lie[-1] ^= 1
    head = frame.encode(
        namespace=NAMESPACE,
        key=NAMESPACE + KEY,
        serde_tag=1,
        raw_length=ROW_BYTES,
        payload_parts=[memoryview(lie)],
    )
    store.put(NAMESPACE + KEY, (memoryview(head), memoryview(lie)))
    assert io.fetch([KEY], [memoryview(bytearray(ROW_BYTES))]) == [False]
    assert io.take_counts()[0] == {BadPayload.__name__: 1}
    assert store.exists([NAMESPACE + KEY]) == [False]


def test_is_lossless_under_the_tag_one():
    assert (SERDES["lossless"].name, SERDES["lossless"].tag, SERDES["lossless"].lossless) == ("lossless", 1, True)
