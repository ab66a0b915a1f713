"""The row as it is."""

from __future__ import annotations

import pytest

from lmcache_ext.errors import LengthMismatch
from lmcache_ext.serde.naive import NaiveSerde

SERDE = NaiveSerde()


def test_what_is_stored_is_the_row_itself():
    row = memoryview(bytearray(b"kv" * 50))
    (part,) = SERDE.encode(row)
    assert part is row
    (landing,) = SERDE.receive(row)
    assert landing is row


def test_decoding_leaves_the_row_as_it_was_received():
    row = memoryview(bytearray(b"kv" * 50))
    SERDE.decode(SERDE.receive(row), row.nbytes, row)
    assert bytes(row) == b"kv" * 50


@pytest.mark.parametrize("stored", [0, 99, 101])
def test_another_length_is_refused_with_both_numbers(stored):
    row = memoryview(bytearray(100))
    with pytest.raises(LengthMismatch, match=f"stored {stored} bytes, expected 100"):
        SERDE.decode(SERDE.receive(row), stored, row)


def test_is_lossless_under_the_tag_zero():
    assert (SERDE.name, SERDE.tag, SERDE.lossless) == ("naive", 0, True)
