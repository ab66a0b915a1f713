"""The directory never claims what is not there: against a model of what each engine really holds, and case by case."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmcache_ext.daemons.controller_directory import Directory, Engine

SPACE = b"n" * 16
KEYS = [bytes([number]) * 36 for number in range(8)]
TIMEOUT_S = 10.0


def engine(name="one", boot="a", **options):
    options = {"worker": 0, "namespace": SPACE, "chunk_tokens": 256, "peer_url": f"{name}:8200", **options}
    return Engine(instance=name, boot=boot, **options)


class Told:
    """An engine that tells as it should, on a directory."""

    def __init__(self, directory, name="one", session="s1", now=0.0, **options):
        self.directory, self.session, self.number, self.now = directory, session, 0, now
        assert directory.register(engine(name, **options), session, now)
        assert directory.attach(session, now)

    def next(self):
        self.number += 1
        return self.number

    def sync(self, *keys):
        assert self.directory.begin_sync(self.session, self.next(), self.now)
        assert self.announce(*keys)
        return self.directory.end_sync(self.session, self.next(), len(keys), self.now)

    def announce(self, *added, dropped=()):
        return self.directory.announce(self.session, self.next(), added, dropped, self.now)


@pytest.fixture
def directory():
    return Directory(timeout_s=TIMEOUT_S, max_keys=100)


def holders(directory, *keys):
    return [None if one is None else one.engine.instance for one in directory.locate(SPACE, keys)]


def test_keys_are_found_once_announced_and_no_more_once_dropped(directory):
    told = Told(directory)
    assert told.sync(KEYS[0])
    assert told.announce(KEYS[1])
    assert holders(directory, *KEYS[:3]) == ["one", "one", None]
    assert told.announce(dropped=[KEYS[0]])
    assert holders(directory, *KEYS[:3]) == [None, "one", None]


def test_keys_of_another_namespace_are_not_found(directory):
    Told(directory).sync(KEYS[0])
    assert directory.locate(b"m" * 16, [KEYS[0]]) == [None]


def test_an_engine_is_not_sent_to_itself_nor_to_one_that_serves_nobody(directory):
    Told(directory).sync(KEYS[0])
    Told(directory, "silent", "s2", peer_url="").sync(KEYS[0])
    assert directory.locate(SPACE, [KEYS[0]], but=("one", 0)) == [None]
    assert holders(directory, KEYS[0]) == ["one"]


def test_the_engine_of_the_key_before_is_preferred(directory):
    Told(directory, "one", "s1").sync(KEYS[1])
    Told(directory, "two", "s2").sync(*KEYS[:3])
    assert holders(directory, *KEYS[:3]) == ["two", "two", "two"]


def test_nothing_is_believed_behind_a_gap_until_everything_is_told_anew(directory):
    told = Told(directory)
    told.sync(KEYS[0], KEYS[1])
    told.next()  # a message that dropped KEYS[1] is lost
    assert not told.announce(KEYS[2])
    assert holders(directory, *KEYS[:3]) == [None, None, None]
    assert not told.announce(KEYS[3])
    assert told.sync(KEYS[0])
    assert holders(directory, *KEYS[:3]) == ["one", None, None]


def test_a_repeated_message_changes_nothing(directory):
    told = Told(directory)
    told.sync(KEYS[0])
    assert told.announce(KEYS[1])
    assert told.announce(dropped=[KEYS[1]])
    assert directory.announce("s1", told.number - 1, [KEYS[1]], [], 0.0)  # believed still, but not heard twice
    assert holders(directory, KEYS[0], KEYS[1]) == ["one", None]


def test_a_sync_that_is_not_what_it_says_is_not_believed(directory):
    told = Told(directory)
    directory.begin_sync("s1", told.next(), 0.0)
    told.announce(*KEYS[:3])
    assert not directory.end_sync("s1", told.next(), 2, 0.0)
    assert holders(directory, *KEYS[:3]) == [None] * 3


def test_an_engine_whose_connection_is_lost_holds_nothing(directory):
    told = Told(directory)
    told.sync(KEYS[0])
    directory.detach("s1")
    assert holders(directory, KEYS[0]) == [None]
    assert not told.announce(KEYS[1])
    assert directory.attach("s1", 1.0)
    assert not told.announce(KEYS[1])  # not before a sync
    assert told.sync(KEYS[1])
    assert holders(directory, *KEYS[:2]) == [None, "one"]


def test_a_silent_engine_expires_and_one_that_beats_does_not(directory):
    Told(directory, "one", "s1").sync(KEYS[0])
    Told(directory, "two", "s2").sync(KEYS[1])
    assert directory.seen("s2", 9.0)
    assert [holder.engine.instance for holder in directory.expire(TIMEOUT_S + 1)] == ["one"]
    assert holders(directory, *KEYS[:2]) == [None, "two"]
    assert not directory.seen("s1", 12.0)
    assert directory.num_keys == 1


def test_a_living_engine_keeps_its_name_and_a_dead_one_loses_it(directory):
    Told(directory, "one", "s1").sync(KEYS[0])
    assert not directory.register(engine("one", "b"), "s2", 1.0)
    assert directory.register(engine("one", "b", worker=1), "s3", 1.0)
    assert holders(directory, KEYS[0]) == ["one"]
    directory.detach("s1")
    assert directory.register(engine("one", "b"), "s4", 2.0)
    assert not directory.seen("s1", 2.0)


def test_an_engine_that_registers_again_begins_with_nothing(directory):
    Told(directory, "one", "s1").sync(KEYS[0])
    assert directory.register(engine("one", "a"), "s2", 1.0)
    assert holders(directory, KEYS[0]) == [None]


def test_keys_beyond_the_limit_are_left_out_and_counted():
    directory = Directory(timeout_s=TIMEOUT_S, max_keys=2)
    assert Told(directory).sync(*KEYS[:3])
    assert (directory.num_keys, directory.counters["keys_refused"]) == (2, 1)
    assert holders(directory, *KEYS[:3]) == ["one", "one", None]


def test_prefixes_end_at_the_first_gap_of_each_engine(directory):
    Told(directory, "one", "s1").sync(KEYS[0], KEYS[1], KEYS[3])
    Told(directory, "two", "s2").sync(KEYS[0])
    Told(directory, "three", "s3").sync(KEYS[1], KEYS[2])
    assert directory.prefixes(SPACE, KEYS[:4]) == {("one", 0): 2, ("two", 0): 1}


class Engines(RuleBasedStateMachine):
    """Three engines whose messages may be lost or repeated, whose connections break, that restart and fall silent.

    Whatever the directory says is compared with what its last believed message said; that cannot be more than what
    the engine really held when it said it.
    """

    NAMES = ("one", "two", "three")

    @initialize()
    def begin(self):
        self.directory = Directory(timeout_s=TIMEOUT_S, max_keys=1000)
        self.now, self.starts = 0.0, 0
        self.real = {name: set() for name in self.NAMES}  # what its host memory holds
        self.known = {name: set() for name in self.NAMES}  # what it held at its last message that came through
        self.session: dict[str, str] = {}
        self.number = dict.fromkeys(self.NAMES, 0)
        self.last: dict[str, tuple] = {}

    names = st.sampled_from(NAMES)
    subsets = st.sets(st.sampled_from(KEYS))

    @rule(name=names)
    def start(self, name):
        self.starts += 1
        session = f"s{self.starts}"
        if self.directory.register(engine(name, f"boot{self.starts}"), session, self.now):
            self.session[name], self.number[name] = session, 0
            self.real[name], self.known[name] = set(), set()
            self.last.pop(name, None)
            self.directory.attach(session, self.now)

    @rule(name=names)
    def lose_connection(self, name):
        self.directory.detach(self.session.get(name, "?"))

    @rule(name=names)
    def connect(self, name):
        self.directory.attach(self.session.get(name, "?"), self.now)

    @rule(name=names)
    def sync(self, name):
        session = self.session.get(name, "?")
        self.number[name] += 1
        if self.directory.begin_sync(session, self.number[name], self.now):
            self.known[name] = set(self.real[name])
            self.number[name] += 1
            self.directory.announce(session, self.number[name], sorted(self.real[name]), (), self.now)
            self.number[name] += 1
            self.directory.end_sync(session, self.number[name], len(self.real[name]), self.now)

    @rule(name=names, added=subsets, dropped=subsets, fate=st.sampled_from(["arrives", "arrives", "is lost"]))
    def change(self, name, added, dropped, fate):
        added, dropped = added - self.real[name], (dropped - added) & self.real[name]
        self.real[name] = (self.real[name] | added) - dropped
        self.number[name] += 1
        message = (self.session.get(name, "?"), self.number[name], sorted(added), sorted(dropped))
        if fate == "arrives":
            self.last[name] = message
            self.directory.announce(*message, self.now)
            self.known[name] = set(self.real[name])

    @rule(name=names)
    def repeat(self, name):
        if name in self.last:
            self.directory.announce(*self.last[name], self.now)

    @rule(seconds=st.floats(0.1, 15.0))
    def wait(self, seconds):
        self.now += seconds
        self.directory.expire(self.now)

    @invariant()
    def claims_nothing_that_was_not_there(self):
        for holder in self.directory:
            name = holder.engine.instance
            assert holder.keys <= self.known[name]
            if holder.is_in_step:
                assert holder.keys == self.known[name]
            if not holder.is_attached:
                assert not holder.keys

    @invariant()
    def index_and_counts_agree(self):
        everything = [(key, holder) for holder in self.directory for key in holder.keys]
        assert self.directory.num_keys == len(everything)
        for key in KEYS:
            having = [holder for other, holder in everything if other == key]
            (found,) = self.directory.locate(SPACE, [key])
            assert (found in having) if having else found is None
            assert len(self.directory._spaces.get(SPACE, {}).get(key, ())) == len(having)


TestEngines = Engines.TestCase
TestEngines.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
