"""The cache server under hostile conversations: it answers or closes, serves others, and its memory is bounded."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import lm_fuzz
from tests.lm_fuzz import HELLO, Fuzzer, check
from tests.lm_servers import ServerProcess, serving

LONG_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(*lm_fuzz.OPTIONS) as server:
        yield server


pieces = st.lists(
    st.one_of(
        st.binary(max_size=400),
        st.randoms(use_true_random=False).map(lm_fuzz.old_frame),
        st.randoms(use_true_random=False).map(lm_fuzz.v2_frame),
        st.randoms(use_true_random=False).map(lambda rng: lm_fuzz.bent(lm_fuzz.v2_frame(rng), rng)),
        st.just(HELLO),
    ),
    max_size=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces)
def test_any_conversation_ends_when_its_sender_ends_it(server: ServerProcess, stream: Sequence[bytes]) -> None:
    with socket.create_connection(("127.0.0.1", server.port), lm_fuzz.QUIET_S) as sock:
        try:
            for piece in stream:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except TimeoutError:
            pytest.fail("the server neither answers nor closes")
        except OSError:
            return  # closed by the server before all was said: it had said why


def test_hostile_conversations_leave_the_server_whole(server: ServerProcess) -> None:
    before, fuzzer = server.resident_bytes(), Fuzzer(server, seed=7)
    while fuzzer.num_frames < 20_000:
        fuzzer.talk()
    check(server, fuzzer, before)
    assert fuzzer.endings["closed"] > 10


@pytest.mark.e2e
def test_a_minute_of_them_does_not_make_it_grow() -> None:
    with serving(*lm_fuzz.OPTIONS) as server:
        before, fuzzer = server.resident_bytes(), Fuzzer(server, seed=time.time_ns())
        end = time.monotonic() + LONG_S
        settled = 0
        while time.monotonic() < end:
            fuzzer.talk()
            if not settled and time.monotonic() > end - LONG_S / 2:
                settled = check(server, fuzzer, before)
        assert check(server, fuzzer, before) < settled + 8 * lm_fuzz.MIB, "what it needs is settled after half of them"
        print(f"{fuzzer.num_frames} frames in {fuzzer.num_talks} connections: {dict(fuzzer.endings)}")
