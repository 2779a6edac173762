"""What a grid does, in the simplest way: the model that real grids are compared with.

Written from the prose of `gridsession.grids.contract` and from nothing else, so that it can
disagree with `grids.record`. Plain lists, no care for speed; every method is one moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass

from gridsession.grids.contract import (
    HAND_OFF_SECONDS,
    MAX_REPLACED,
    REMEMBERED_COMMITS,
    REPLACED_SECONDS,
    SAFETY_POLL_SECONDS,
    TICKET_SECONDS,
    Busy,
    Change,
    Claim,
    Committed,
    Conflict,
    Exists,
    Found,
    Gone,
    Granted,
    Locked,
    LockLost,
    Missing,
    NewRecord,
    QueueFull,
    Released,
    Removed,
    Replaced,
    Snapshot,
    Version,
)
from gridsession.testing import ManualClock


@dataclass
class Lock:
    token: bytes
    holder: str
    since: float
    until: float


@dataclass
class Place:
    """In the queue."""

    token: bytes
    holder: str
    watches: bool
    heard: float
    counts: bool  # among those that a limit of the queue bounds


@dataclass
class Former:
    """A secret that was replaced."""

    secret: bytes
    until: float
    shut_out: bool


@dataclass
class Entry:
    secret: bytes
    payload: bytes
    user: str | None
    created: float
    timeout: float
    latest: float  # the absolute timeout's end
    deadline: float
    history: list[Version]
    lock: Lock | None = None
    queue: list[Place] = field(default_factory=list)
    former: list[Former] = field(default_factory=list)

    def place_of(self, token: bytes) -> Place | None:
        return next((place for place in self.queue if place.token == token), None)

    def is_held_by(self, token: bytes) -> bool:
        return self.lock is not None and self.lock.token == token


class Model:
    """A grid's state after the calls made so far.

    Attributes:
        rung: (key, token) of those whose bell was rung since they were last told `Busy`.
    """

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.entries: dict[bytes, Entry] = {}
        self.rung: set[tuple[bytes, bytes]] = set()
        self._listening: set[tuple[bytes, bytes]] = set()

    # -- the calls ------------------------------------------------------------------------

    def create(self, key: bytes, new: NewRecord, claim: Claim | None) -> Committed | Exists:
        there = self.living(key)
        if there is not None:
            for version in there.history:
                if version.token == new.commit_token:
                    return self._committed(version, there)
            return Exists()
        if key in self.entries:  # expired, but still there
            self._ring_all(key, self.entries[key])
        now = self._clock.wall()
        latest = float("inf") if new.absolute_timeout is None else now + new.absolute_timeout
        entry = self.entries[key] = Entry(
            secret=new.secret,
            payload=new.payload,
            user=new.user,
            created=now,
            timeout=new.timeout,
            latest=latest,
            deadline=min(now + new.timeout, latest),
            history=[Version(1, new.commit_token)],
        )
        if claim is not None:
            self._lock(entry, claim.token, claim.holder, claim.lease)
        return self._committed(entry.history[-1], entry)

    def acquire(
        self, key: bytes, secret: bytes, claim: Claim, known: Version | None = None
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        self._listens_no_more(key, claim.token)
        entry = self.living(key)
        if entry is None:
            return Missing()
        if entry.is_held_by(claim.token):
            return self._granted(entry, secret, claim, known)
        place = entry.place_of(claim.token)
        if place is not None:
            place.heard = self._clock.steady()
        elif (refusal := self._refusal(entry, secret)) is not None:
            return refusal
        if not self._is_locked(entry):
            self._drop_the_unheard(entry)
            if any(not other.watches for other in entry.queue):
                self._hand_on(key, entry)
            else:
                self._lock(entry, claim.token, claim.holder, claim.lease)
            if entry.is_held_by(claim.token):
                return self._granted(entry, secret, claim, known)
        return self._queued(key, entry, claim, watches=False)

    def read(
        self,
        key: bytes,
        secret: bytes,
        watch: Claim | None = None,
        seen: bytes | None = None,
        known: Version | None = None,
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        if watch is not None:
            self._listens_no_more(key, watch.token)
        entry = self.living(key)
        if entry is None:
            return Missing()
        place = None if watch is None else entry.place_of(watch.token)
        if place is None and (refusal := self._refusal(entry, secret)) is not None:
            return refusal
        if watch is not None:
            lock = entry.lock
            if lock is not None and self._is_locked(entry) and seen in (None, lock.token):
                if place is not None:
                    place.heard = self._clock.steady()
                return self._queued(key, entry, watch, watches=True)
            if place is not None:
                entry.queue.remove(place)
        return Found(self._snapshot(entry, secret, known))

    def commit(
        self, key: bytes, token: bytes, change: Change, release: bool
    ) -> Committed | LockLost | Gone:
        entry = self.living(key)
        if entry is None:
            return Gone()
        version = self._version_of(entry, change.commit_token)
        if version is None:
            if not entry.is_held_by(token):
                return LockLost()
            version = self._write(key, entry, change)
        if release and entry.is_held_by(token):
            self._hand_on(key, entry)
        return self._committed(version, entry)

    def commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        entry = self.living(key)
        if entry is None:
            return Gone()
        version = self._version_of(entry, change.commit_token)
        if version is not None:
            return self._committed(version, entry)
        refusal = self._refusal(entry, secret)
        if refusal is not None:
            return refusal if isinstance(refusal, Replaced) else Gone()
        if not self._is_locked(entry):
            self._hand_on(key, entry)  # what is left of a lock that has run out
        if self._is_locked(entry):
            return Locked()
        if entry.history[-1] != base:
            return Conflict(self._snapshot(entry, secret))
        return self._committed(self._write(key, entry, change), entry)

    def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        answers = []
        for key, token in leases:
            entry = self.living(key)
            answers.append(entry is not None and entry.is_held_by(token))
            if answers[-1] and entry is not None and entry.lock is not None:
                entry.lock.until = self._clock.steady() + lease
        return answers

    def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        self._listens_no_more(key, token)
        entry = self.living(key)
        if entry is None:
            return Gone()
        if entry.is_held_by(token):
            self._slide(entry)
            self._hand_on(key, entry)
            return Released()
        if (place := entry.place_of(token)) is not None:
            entry.queue.remove(place)
            return Released()
        return LockLost()

    def touch(self, key: bytes) -> bool:
        entry = self.living(key)
        if entry is not None:
            self._slide(entry)
        return entry is not None

    def remove(self, key: bytes, token: bytes | None) -> Removed | LockLost | Gone:
        entry = self.living(key)
        if entry is None:
            return Gone()
        if token is not None and not entry.is_held_by(token):
            return LockLost()
        self._ring_all(key, entry)
        del self.entries[key]
        return Removed()

    def expired(self) -> set[bytes]:
        """Keys of records that a sweep has to remove."""
        return {key for key in self.entries if self.living(key) is None}

    def swept(self) -> None:
        for key in self.expired():
            self._ring_all(key, self.entries.pop(key))

    # -- the rules ------------------------------------------------------------------------

    def living(self, key: bytes) -> Entry | None:
        entry = self.entries.get(key)
        if entry is None:
            return None
        return entry if entry.deadline > self._clock.wall() or self._is_locked(entry) else None

    def _is_locked(self, entry: Entry) -> bool:
        return entry.lock is not None and entry.lock.until > self._clock.steady()

    def _lock(self, entry: Entry, token: bytes, holder: str, lease: float) -> None:
        now = self._clock.steady()
        entry.lock = Lock(token, holder, now, now + lease)
        entry.queue = [place for place in entry.queue if place.token != token]

    def _version_of(self, entry: Entry, commit_token: int) -> Version | None:
        return next((v for v in entry.history if v.token == commit_token), None)

    def _write(self, key: bytes, entry: Entry, change: Change) -> Version:
        version = Version(entry.history[-1].counter + 1, change.commit_token)
        entry.history = [*entry.history, version][-REMEMBERED_COMMITS:]
        entry.payload = entry.payload if change.payload is None else change.payload
        entry.user, entry.timeout = change.user, change.timeout
        entry.deadline = min(self._clock.wall() + entry.timeout, entry.latest)
        if change.rotation is not None:
            self._rotate(key, entry, change.rotation.secret, change.rotation.user_changed)
        return version

    def _committed(self, version: Version, entry: Entry) -> Committed:
        return Committed(version, entry.deadline, entry.deadline - self._clock.wall())

    def _granted(self, entry: Entry, secret: bytes, claim: Claim, known: Version | None) -> Granted:
        assert entry.lock is not None
        entry.lock.until = self._clock.steady() + claim.lease
        self._slide(entry)
        return Granted(self._snapshot(entry, secret, known))

    def _queued(self, key: bytes, entry: Entry, claim: Claim, *, watches: bool) -> Busy | QueueFull:
        """Somebody holds the lock: wait for it."""
        now, lock = self._clock.steady(), entry.lock
        assert lock is not None
        if watches or entry.place_of(claim.token) is None:
            self._drop_the_unheard(entry)
        if entry.place_of(claim.token) is None:
            counts = claim.queue_limit is not None
            places = [place for place in entry.queue if place.counts]
            if claim.queue_limit is not None and len(places) >= claim.queue_limit:
                return QueueFull(lock.holder, now - lock.since)
            entry.queue.append(Place(claim.token, claim.holder, watches, now, counts))
        self._listening.add((key, claim.token))
        tokens = [place.token for place in entry.queue]
        before = entry.queue[: tokens.index(claim.token)]
        return Busy(
            holder=lock.holder,
            held_for=now - lock.since,
            ahead=len([place for place in before if not place.watches]),
            retry_in=min(SAFETY_POLL_SECONDS, lock.until - now),
            lock=lock.token,
        )

    def _drop_the_unheard(self, entry: Entry) -> None:
        now = self._clock.steady()
        entry.queue = [place for place in entry.queue if now - place.heard <= TICKET_SECONDS]

    def _hand_on(self, key: bytes, entry: Entry) -> None:
        """A holding is over: watchers go, the first in line is next."""
        self._drop_the_unheard(entry)
        entry.lock = None
        line = [place for place in entry.queue if not place.watches]
        self._ring(key, [place for place in entry.queue if place.watches] + line[:1])
        entry.queue = line
        if line:
            self._lock(entry, line[0].token, line[0].holder, HAND_OFF_SECONDS)

    def _ring_all(self, key: bytes, entry: Entry) -> None:
        self._ring(key, entry.queue)
        entry.queue = []

    def _ring(self, key: bytes, places: list[Place]) -> None:
        self.rung |= {(key, place.token) for place in places} & self._listening

    def _listens_no_more(self, key: bytes, token: bytes) -> None:
        self.rung.discard((key, token))
        self._listening.discard((key, token))

    def _refusal(self, entry: Entry, secret: bytes) -> Replaced | Missing | None:
        if secret == entry.secret:
            return None
        for former in entry.former:
            if former.secret == secret and former.until > self._clock.steady():
                return Replaced() if former.shut_out else None
        return Missing()

    def _rotate(self, key: bytes, entry: Entry, secret: bytes, user_changed: bool) -> None:
        now = self._clock.steady()
        entry.former = [former for former in entry.former if former.until > now]
        entry.former.append(Former(entry.secret, now + REPLACED_SECONDS, False))
        entry.former = entry.former[-MAX_REPLACED:]
        entry.secret = secret
        if user_changed:
            self._ring_all(key, entry)
            for former in entry.former:
                former.shut_out = True

    def _slide(self, entry: Entry) -> None:
        until = min(self._clock.wall() + entry.timeout, entry.latest)
        entry.deadline = max(entry.deadline, until)  # never shortened by a clock set back

    def _snapshot(self, entry: Entry, secret: bytes, known: Version | None = None) -> Snapshot:
        moved = min(self._clock.wall() + entry.timeout, entry.latest) - entry.deadline
        return Snapshot(
            payload=None if entry.history[-1] == known else entry.payload,
            version=entry.history[-1],
            created=entry.created,
            timeout=entry.timeout,
            deadline=entry.deadline,
            expires_in=entry.deadline - self._clock.wall(),
            user=entry.user,
            replaced=secret != entry.secret,
            # A hundredth, but between a second and a minute.
            slide_due=moved > sorted((1.0, entry.timeout / 100, 60.0))[1],
        )


def difference(expected: object, actual: object, where: str = "outcome") -> str | None:
    """How an outcome differs from the model's; None when it does not.

    Times may differ by a few microseconds, of which a Redis counts whole ones. `Busy.lock` is the
    grid's own name for a holding, and a `retry_in` of less than 10 ms may be rounded up.
    """
    if type(expected) is not type(actual):
        return f"{where}: {expected!r} was due, got {actual!r}"
    if is_dataclass(expected):
        for attribute in fields(expected):
            name = attribute.name
            if isinstance(expected, Busy) and name == "lock":
                continue
            mine, other = getattr(expected, name), getattr(actual, name)
            if name == "retry_in":
                mine, other = max(mine, 0.01), max(other, 0.01)
            if (found := difference(mine, other, f"{where}.{name}")) is not None:
                return found
        return None
    if isinstance(expected, float) and isinstance(actual, float):
        equal = abs(expected - actual) < 5e-6
    else:
        equal = expected == actual or isinstance(expected, (Missing, Replaced, Exists, Released))
        equal = equal or isinstance(expected, (Removed, LockLost, Gone, Locked))
    return None if equal else f"{where}: {expected!r} was due, got {actual!r}"
