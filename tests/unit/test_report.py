"""What a user reads of each request in the log."""

from __future__ import annotations

import pytest

from lmcache_ext.offload.report import HitReport, logger


@pytest.fixture
def lines(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *values: told.append(text % values))
    return told


@pytest.mark.parametrize("total_tokens", [256, 257])
def test_a_prompt_of_a_chunk_is_told_in_lmcaches_words(lines, total_tokens):
    HitReport(256).tell("r", total_tokens, 256, 256)
    assert lines == [f"Reqid: r, Total tokens {total_tokens}, LMCache hit tokens: 256, need to load: 256"]


@pytest.mark.parametrize("total_tokens", [11, 255])
def test_a_prompt_that_no_second_time_finds_says_why(lines, total_tokens):
    HitReport(256).tell("r", total_tokens, 0, 0)
    assert "reused in whole chunks" in lines[0]
    assert "256" in lines[0]
