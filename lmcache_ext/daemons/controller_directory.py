"""Who holds which chunk: pure state, time is an argument.

A directory must not claim what is not there. So each engine counts what it tells: a number that comes twice is
skipped, and behind a gap nothing of that engine is believed until it has told everything anew. An engine whose
connection is lost, or that is silent for too long, holds nothing.

    joined ──begin_sync──► telling ──end_sync──► in step ──gap, wrong total──► joined (keys withdrawn)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from lmcache_ext.daemons.controller_hashing import Hashing


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine says of itself when it registers."""

    instance: str
    worker: int
    boot: str
    """Another one after each start of the process."""
    namespace: bytes
    chunk_tokens: int = 0
    row_bytes: int = 0
    num_rows: int = 0
    tiers: tuple[str, ...] = ()
    ip: str = ""
    port: int = 0
    peer_url: str = ""
    lookup_url: str = ""
    hashing: Hashing | None = None
    """None where keys cannot be made from tokens as it makes them."""

    @property
    def name(self) -> tuple[str, int]:
        return (self.instance, self.worker)


@dataclass(eq=False, slots=True)
class Holder:
    """An engine and what it holds."""

    engine: Engine
    session: str
    registered_at: float
    seen_at: float
    keys: set[bytes] = field(default_factory=set)
    next_number: int = 0
    is_attached: bool = False
    is_telling: bool = False
    is_in_step: bool = False
    """Whether `keys` is all that the engine holds."""
    alone: tuple[Holder, ...] = ()
    """Itself: one tuple for all keys that nobody else holds."""

    def __post_init__(self) -> None:
        self.alone = (self,)


class Directory:
    """Holders by session, and by namespace and key.

    Threads:  one.
    Order:    of one engine, by its own count; none between engines.
    Owner:    of nothing; `session` names are the caller's.
    Failure:  an unknown session is False; keys beyond `max_keys` are not taken in, and counted.
    """

    def __init__(self, *, timeout_s: float, max_keys: int) -> None:
        self.timeout_s = timeout_s
        self.max_keys = max_keys
        self.num_keys = 0
        """Of all holders together."""
        self.counters: Counter[str] = Counter()
        self._holders: dict[str, Holder] = {}
        self._by_name: dict[tuple[str, int], Holder] = {}
        self._spaces: dict[bytes, dict[bytes, tuple[Holder, ...]]] = {}

    def __iter__(self) -> Iterator[Holder]:
        return iter(list(self._holders.values()))

    def __len__(self) -> int:
        return len(self._holders)

    def get(self, session: str) -> Holder | None:
        return self._holders.get(session)

    def knows(self, name: tuple[str, int]) -> bool:
        """Whether an engine of that name has registered."""
        return name in self._by_name

    # -- coming and going

    def register(self, engine: Engine, session: str, now: float) -> bool:
        """Let an engine join under a new session; False where a living engine of another start has its name."""
        before = self._by_name.get(engine.name)
        if before is not None:
            alive = before.is_attached and now - before.seen_at <= self.timeout_s
            if alive and before.engine.boot != engine.boot:
                self.counters["taken"] += 1
                return False
            self.withdraw(before.session)
        holder = Holder(engine, session, now, now)
        self._holders[session] = self._by_name[engine.name] = holder
        self.counters["registered"] += 1
        return True

    def withdraw(self, session: str) -> bool:
        """Forget an engine and all that it holds."""
        holder = self._holders.pop(session, None)
        if holder is None:
            return False
        self._forget_keys(holder)
        del self._by_name[holder.engine.name]
        return True

    def attach(self, session: str, now: float) -> bool:
        """The engine will tell what it holds, beginning with everything."""
        if not self.seen(session, now):
            return False
        holder = self._holders[session]
        self._distrust(holder)
        holder.is_attached = True
        return True

    def detach(self, session: str) -> None:
        """The connection on which it told is lost: what it holds by now nobody knows."""
        holder = self._holders.get(session)
        if holder is not None:
            self._distrust(holder)
            holder.is_attached = False

    def seen(self, session: str, now: float) -> bool:
        """The engine lives; False where the session is unknown, or over."""
        holder = self._holders.get(session)
        if holder is not None:
            holder.seen_at = now
        return holder is not None

    def expire(self, now: float) -> list[Holder]:
        """Withdraw the engines that were silent for longer than `timeout_s`."""
        silent = [holder for holder in self if now - holder.seen_at > self.timeout_s]
        for holder in silent:
            self.withdraw(holder.session)
            self.counters["expired"] += 1
        return silent

    # -- what an engine tells; each answers whether the engine is believed, and must tell everything anew if not

    def begin_sync(self, session: str, number: int, now: float) -> bool:
        """From here on the engine tells all that it holds."""
        holder = self._attached(session, now)
        if holder is None:
            return False
        self._distrust(holder)
        holder.is_telling = True
        holder.next_number = number + 1
        self.counters["syncs"] += 1
        return True

    def announce(
        self, session: str, number: int, added: Sequence[bytes], dropped: Collection[bytes], now: float
    ) -> bool:
        """The engine took in `added`, then dropped `dropped`."""
        holder = self._attached(session, now)
        if holder is None or not self._counts(holder, number):
            return holder is not None and (holder.is_telling or holder.is_in_step)
        for key in added:
            self._add(holder, key)
        for key in dropped:
            self._drop(holder, key)
        return True

    def end_sync(self, session: str, number: int, total: int, now: float) -> bool:
        """The engine has told everything, `total` keys."""
        holder = self._attached(session, now)
        if holder is None or not self._counts(holder, number):
            return holder is not None and (holder.is_telling or holder.is_in_step)
        if holder.is_telling and len(holder.keys) > total:  # fewer: there was no room for all of them
            self._distrust(holder)
            self.counters["distrusted"] += 1
            return False
        holder.is_telling, holder.is_in_step = False, True
        return True

    # -- questions

    def locate(
        self, namespace: bytes, keys: Sequence[bytes], *, but: tuple[str, int] | None = None
    ) -> list[Holder | None]:
        """For each key an engine that other engines can fetch it from, the same as for the key before if possible."""
        space = self._spaces.get(namespace, {})
        found: list[Holder | None] = []
        last: Holder | None = None
        for key in keys:
            holders = [one for one in space.get(key, ()) if one.engine.peer_url and one.engine.name != but]
            last = last if last in holders else next(iter(holders), None)
            found.append(last)
        return found

    def prefixes(self, namespace: bytes, keys: Sequence[bytes]) -> dict[tuple[str, int], int]:
        """How many of the first keys each engine holds, without a gap; those with none are left out."""
        space = self._spaces.get(namespace, {})
        lengths: dict[tuple[str, int], int] = {}
        for index, key in enumerate(keys):
            going_on = [one for one in space.get(key, ()) if lengths.get(one.engine.name, 0) == index]
            if not going_on:
                break
            lengths.update((one.engine.name, index + 1) for one in going_on)
        return lengths

    # -- inside

    def _attached(self, session: str, now: float) -> Holder | None:
        return self._holders[session] if self.seen(session, now) and self._holders[session].is_attached else None

    def _counts(self, holder: Holder, number: int) -> bool:
        """Whether the message with that number is the next; a gap ends the trust in the engine."""
        if not (holder.is_telling or holder.is_in_step):
            return False
        if number < holder.next_number:
            self.counters["repeated"] += 1
            return False
        if number > holder.next_number:
            self._distrust(holder)
            self.counters["gaps"] += 1
            return False
        holder.next_number += 1
        return True

    def _distrust(self, holder: Holder) -> None:
        self._forget_keys(holder)
        holder.is_telling = holder.is_in_step = False

    def _forget_keys(self, holder: Holder) -> None:
        for key in list(holder.keys):
            self._drop(holder, key)

    def _add(self, holder: Holder, key: bytes) -> None:
        if key in holder.keys:
            return
        if self.num_keys >= self.max_keys:
            self.counters["keys_refused"] += 1
            return
        space = self._spaces.setdefault(holder.engine.namespace, {})
        others = space.get(key)
        space[key] = holder.alone if others is None else (*others, holder)
        holder.keys.add(key)
        self.num_keys += 1

    def _drop(self, holder: Holder, key: bytes) -> None:
        if key not in holder.keys:
            return
        holder.keys.remove(key)
        self.num_keys -= 1
        space = self._spaces[holder.engine.namespace]
        others = tuple(one for one in space[key] if one is not holder)
        if len(others) > 1:
            space[key] = others
        elif others:
            space[key] = others[0].alone
        else:
            del space[key]
            if not space:
                del self._spaces[holder.engine.namespace]
