"""The client cache: payloads that this worker has seen lately, as bytes.

It saves the way of a payload that has not changed, and, where an interval allows it, the question
whether it has. It decides nothing else: whoever takes a lock asks the grid, and is told which
version is the newest.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from gridsession.grids.contract import Committed, Snapshot, Version
from gridsession.grids.record import slide_step
from gridsession.settings import ClientCacheType

_MIB = 1 << 20
_DROPPED = 1000  # sessions; for longer than an answer is under way


@dataclass(slots=True, eq=False)
class Kept:
    """What is known of one session. Its version and payload belong together and never change.

    Attributes:
        payload: the stored bytes.
        version: which commit wrote them.
        secret: that the grid let in with it, and no other is let in here; empty for none.
        timeout: seconds of sliding expiry.
        user: whose session it is, or None.
        as_of: when the grid was asked: what it said may be older, in seconds of the steady clock.
        told_at: when its answer came.
        ends_at: when the session expires, as far as it said.
        slide_at: from when on a use is to be told to the grid.
        place: among the keys, where any of them may have to leave.
    """

    payload: bytes
    version: Version
    secret: bytes
    timeout: float
    user: str | None
    as_of: float
    told_at: float
    ends_at: float
    slide_at: float
    place: int = 0


@dataclass(frozen=True)
class CacheCounters:
    """What the client cache of one worker has done.

    Attributes:
        hits: reads whose payload was here, and still the newest or young enough.
        misses: reads whose payload came from the grid.
        evictions: sessions that made room for others.
        sessions: how many are kept now.
        bytes: their stored payloads, now.
    """

    hits: int
    misses: int
    evictions: int
    sessions: int
    bytes: int


class ClientCache:
    """Sessions that one worker keeps, for all of its event loops and threads.

    Args:
        kind: what leaves when it is full, and whether sessions are counted or their bytes.
        capacity: sessions, or 2²⁰ bytes of stored payload.
        interval: seconds for which what is kept is good without asking the grid.
        steady: the time of a clock that neither steps nor stops, in seconds.

    Never holds more than its capacity. What alone is larger is not kept.
    """

    def __init__(
        self,
        kind: ClientCacheType,
        capacity: int,
        interval: float,
        steady: Callable[[], float],
    ) -> None:
        counts_bytes = kind.endswith("-MaxMemory")
        self._most_bytes = capacity * _MIB if counts_bytes else None
        self._most_sessions = None if counts_bytes else capacity
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._keys: list[bytes] | None = [] if kind.startswith("Random") else None
        self._dropped: OrderedDict[bytes, float] = OrderedDict()  # when: answers may be under way
        self._bytes = 0
        self._lock = threading.Lock()
        self._interval = interval
        self.steady = steady
        self._hits = self._misses = self._evictions = 0

    @property
    def counters(self) -> CacheCounters:
        with self._lock:
            counts = self._hits, self._misses, self._evictions
            return CacheCounters(*counts, len(self._kept), self._bytes)

    def get(self, key: bytes) -> Kept | None:
        """What is known of a session, however old: to ask the grid whether it is the newest."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
            return kept

    def fresh(self, key: bytes, secret: bytes) -> tuple[Kept, bool] | None:
        """What is good without asking the grid, and whether this use is to be told to it.

        It is at most the interval older than what the grid has, of a session that had not expired
        then, and given to whom the grid has let in. Counts as a hit.
        """
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or kept.secret != secret:
                return None
            now = self.steady()
            if now - kept.as_of >= self._interval or now >= kept.ends_at:
                return None
            self._kept.move_to_end(key)
            self._hits += 1
            is_due = now >= kept.slide_at
            if is_due:
                kept.slide_at = now + slide_step(kept.timeout)
            return kept, is_due

    def last_known(self, key: bytes, secret: bytes) -> Kept | None:
        """The same where the grid cannot be asked: however old, until the session expires."""
        kept = self.get(key)
        if kept is None or kept.secret != secret or self.steady() >= kept.ends_at:
            return None
        return kept

    def read(
        self, key: bytes, secret: bytes, snapshot: Snapshot, asked: Kept | None, as_of: float
    ) -> bytes:
        """Keep what a read brought, and give its payload.

        Args:
            asked: what the grid was asked whether it is the newest; its payload is given where the
                snapshot has none.
            as_of: when the grid was asked.
        """
        now = self.steady()
        ends_at = as_of + snapshot.expires_in
        step = slide_step(snapshot.timeout)
        slide_at = now + step if snapshot.slide_due else ends_at - snapshot.timeout + step
        # Who came with an id that was replaced is not let in without being looked at.
        known_as = b"" if snapshot.replaced else secret
        payload = snapshot.payload
        with self._lock:
            if payload is None:
                assert asked is not None
                payload = asked.payload
                self._hits += 1
                if self._kept.get(key) is asked:
                    if as_of >= asked.as_of:
                        asked.secret, asked.as_of, asked.told_at = known_as, as_of, now
                        asked.ends_at, asked.slide_at = ends_at, slide_at
                    return payload
            else:
                self._misses += 1
            terms = known_as, snapshot.timeout, snapshot.user
            self._keep(key, Kept(payload, snapshot.version, *terms, as_of, now, ends_at, slide_at))
        return payload

    def committed(
        self,
        key: bytes,
        secret: bytes,
        payload: bytes,
        committed: Committed,
        *,
        timeout: float,
        user: str | None,
        as_of: float,
    ) -> None:
        """Keep what a commit has stored."""
        ends_at = as_of + committed.expires_in
        slide_at = ends_at - timeout + slide_step(timeout)
        times = as_of, self.steady(), ends_at, slide_at
        kept = Kept(payload, committed.version, secret, timeout, user, *times)
        with self._lock:
            self._keep(key, kept)

    def drop(self, key: bytes) -> None:
        """Forget a session: it has ended, or what is stored of it is not known any more."""
        with self._lock:
            self._remove(key)
            self._dropped[key] = self.steady()
            self._dropped.move_to_end(key)
            if len(self._dropped) > _DROPPED:
                self._dropped.popitem(last=False)

    # -- with the lock held ---------------------------------------------------------------

    def _keep(self, key: bytes, kept: Kept) -> None:
        there = self._kept.get(key)
        if there is not None:
            order = _order(kept, there)
            if order < 0:
                return
            self._remove(key)
            if order == 0:
                return
        elif kept.as_of <= self._dropped.get(key, -inf):  # asked for before it was dropped
            return
        size = len(kept.payload)
        if self._most_bytes is not None and size > self._most_bytes:
            return
        if self._most_sessions is not None:
            while len(self._kept) >= self._most_sessions:
                self._evict()
        if self._most_bytes is not None:
            while self._bytes + size > self._most_bytes:
                self._evict()
        self._kept[key] = kept
        self._bytes += size
        if self._keys is not None:
            kept.place = len(self._keys)
            self._keys.append(key)

    def _evict(self) -> None:
        key = next(iter(self._kept)) if self._keys is None else random.choice(self._keys)
        self._remove(key)
        self._evictions += 1

    def _remove(self, key: bytes) -> None:
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        self._bytes -= len(kept.payload)
        if self._keys is not None:
            last = self._keys.pop()
            if last != key:
                self._keys[kept.place] = last
                self._kept[last].place = kept.place


def _order(kept: Kept, there: Kept) -> int:
    """More than 0 where this is the newer of two answers, less where it is the older one, 0 where
    that cannot be known.

    One asked for after the other had come is the newer one. Else their counters tell, which only a
    fail-over makes repeat.
    """
    if kept.version == there.version:
        return 1 if kept.as_of >= there.as_of else -1
    if kept.as_of >= there.told_at:
        return 1
    return kept.version.counter - there.version.counter
