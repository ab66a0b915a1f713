"""Who is welcome where a token is asked for, whatever becomes of its file."""

from __future__ import annotations

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.tokens import Token


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "token"
    found.write_text("secret\n")
    return found


def test_without_a_file_everybody_is_welcome():
    token = Token(None)
    token.read()
    assert not token.is_needed
    assert (token.accepts(b""), token.accepts(b"anything")) == (True, True)


def test_the_file_as_it_is_now_counts(path):
    token = Token(str(path))
    assert token.is_needed
    assert (token.accepts(b"secret"), token.accepts(b"Secret"), token.accepts(b"")) == (True, False, False)
    path.write_text("another")
    assert (token.accepts(b"secret"), token.accepts(b"another")) == (False, True)


@pytest.mark.parametrize("content", ["", " \n", None])
def test_a_start_without_a_token_in_the_file_is_refused(path, content):
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        Token(str(path)).check()


def test_a_start_without_a_file_or_with_a_token_is_not(path):
    Token(None).check()
    Token(str(path)).check()


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_file_lets_nobody_in(path, content):
    path.write_text(content)
    token = Token(str(path))
    assert (token.accepts(b""), token.accepts(content.encode())) == (False, False)


def test_a_file_that_has_gone_leaves_the_token_read_before(path, caplog):
    token = Token(str(path))
    token.read()
    path.unlink()
    assert (token.accepts(b"secret"), token.accepts(b"")) == (True, False)
    assert "still counts" in caplog.text
    with pytest.raises(OSError, match="token"):
        token.read()
