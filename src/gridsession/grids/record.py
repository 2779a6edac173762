"""A record and the rules of its changes, for grids that run in this process.

Pure: the time is an argument, nothing is awaited, a method decides at once. A grid loads a
record, calls one of these methods, stores the record where `dirty` says so, and then rings the
bells in `rung`. Payloads lie beside the records: a method never looks into them. (A grid that
runs elsewhere carries the same rules in its own scripts; the contract suite holds both to them.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from gridsession.grids.contract import (
    GONE,
    HAND_OFF_SECONDS,
    LOCK_LOST,
    LOCKED,
    MAX_REPLACED,
    MISSING,
    RELEASED,
    REMEMBERED_COMMITS,
    REPLACED,
    REPLACED_SECONDS,
    SAFETY_POLL_SECONDS,
    TICKET_SECONDS,
    Busy,
    Change,
    Claim,
    Committed,
    Conflict,
    Found,
    Gone,
    Granted,
    Locked,
    LockLost,
    Missing,
    NewRecord,
    Now,
    QueueFull,
    Released,
    Replaced,
    Snapshot,
    Version,
)

_new_tuple = tuple.__new__  # a named tuple's own constructor is a Python function
_MIN_SLIDE, _MAX_SLIDE = 1.0, 60.0  # seconds: a deadline is written at most this often, at least
_OLDEST_COMMIT = -2 * (REMEMBERED_COMMITS - 1)  # where the commits begin that stay remembered
_SLIDE_SHARE = 0.01  # once per hundredth of the timeout lies between
_MIN_RETRY = 0.005  # seconds; a waiter whose holder's lease ends this instant does not spin


class Ticket(NamedTuple):
    """A place in a record's queue.

    `bell` is the address that the grid rings; `heard` the steady second of the last heartbeat;
    a `watch` is rung at the next release and is never given the lock; an `uncounted` one, a
    commit's, takes nobody's place within a limit of the queue.
    """

    token: bytes
    holder: str
    bell: bytes
    heard: float
    watch: bool
    uncounted: bool = False

    def __repr__(self) -> str:
        return f"Ticket({self.holder!r}, heard={self.heard}, watch={self.watch})"


class ReplacedSecret(NamedTuple):
    """A secret that was rotated away, remembered until a steady second."""

    secret: bytes
    until: float
    user_changed: bool

    def __repr__(self) -> str:
        return f"ReplacedSecret(until={self.until}, user_changed={self.user_changed})"


def slide_step(timeout: float) -> float:
    """By how many seconds a deadline has to be put off for a use to be told to the grid."""
    return min(max(timeout * _SLIDE_SHARE, _MIN_SLIDE), _MAX_SLIDE)


@dataclass(slots=True, repr=False)
class Record:
    """All that a grid keeps under a key, but for the payload. The order of fields is stored."""

    boot_id: int
    counter: int
    version_token: int
    created: float
    timeout: float
    absolute_deadline: float | None
    deadline: float
    indexed: float
    secret: bytes
    user: str | None
    size: int  # bytes of the payload
    lock_token: bytes | None
    lock_holder: str
    lock_since: float
    lock_until: float
    tickets: list[Ticket]
    commits: list[int]  # the last commits, oldest first: token, counter, token, counter, …
    replaced: list[ReplacedSecret]
    dirty: bool = field(default=False, compare=False)
    rung: list[tuple[bytes, bytes]] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        held_by = self.lock_holder if self.lock_token is not None else None
        return f"Record({self.version}, held_by={held_by!r}, tickets={self.tickets!r})"

    @property
    def version(self) -> Version:
        return _new_tuple(Version, (self.counter, self.version_token))

    # -- birth, age -----------------------------------------------------------------------

    @classmethod
    def new(cls, new: NewRecord, now: Now, claim: Claim | None) -> Record:
        wall = now.wall
        absolute = None if new.absolute_timeout is None else wall + new.absolute_timeout
        deadline = wall + new.timeout if absolute is None else min(wall + new.timeout, absolute)
        record = cls(
            now.boot_id, 1, new.commit_token, wall, new.timeout, absolute, deadline, deadline,
            new.secret, new.user, len(new.payload),
            None, "", 0.0, 0.0, [], [new.commit_token, 1], [], True,
        )  # fmt: skip
        if claim is not None:
            record._lock(claim.token, claim.holder, now.steady, claim.lease)
        return record

    def enter_boot(self, boot_id: int) -> None:
        """Drop what counts the steady clock of another boot: lock, tickets, replaced secrets."""
        self.boot_id = boot_id
        self.lock_token = None
        self.tickets = []
        self.replaced = []

    def is_contended(self, token: bytes) -> bool:
        """Somebody else holds the lock or waits: this token may have to wait."""
        return (self.lock_token is not None and self.lock_token != token) or bool(self.tickets)

    def is_live(self, now: Now) -> bool:
        """No session expires while its lock lives."""
        return self.deadline > now.wall or self._is_locked(now.steady)

    def due(self, now: Now) -> float:
        """The wall-clock second at which the record is to be looked at for expiry again."""
        if self._is_locked(now.steady):
            return max(self.deadline, now.wall + self.lock_until - now.steady)
        return self.deadline

    def touch(self, now: Now) -> None:
        self._slide(now.wall)

    # -- the lock -------------------------------------------------------------------------

    def acquire(
        self, now: Now, secret: bytes, claim: Claim, bell: bytes
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        if not self.is_live(now):
            return MISSING
        token, steady = claim.token, now.steady
        if self.lock_token != token:
            mine = self._ticket_of(token) if self.tickets else None
            # A ticket was entered with a secret that was good then. It outlasts the few seconds
            # for which a replaced secret is remembered: waiting may take longer.
            if mine is None and secret != self.secret:
                refused = self._refusal(secret, steady)
                if refused is not None:
                    return refused
            if self.tickets or self.lock_token is not None:
                turned_away = self._queue(mine, claim, bell, now)
                if turned_away is not None:
                    return turned_away
            if self.lock_token != token:  # nobody has handed it over: it was free
                self.lock_token = token
                self.lock_holder = claim.holder
                self.lock_since = steady
        self.lock_until = steady + claim.lease
        self.dirty = True
        self._slide(now.wall)
        return Granted(self._snapshot(secret, now, slide_due=False))

    def _queue(
        self, mine: Ticket | None, claim: Claim, bell: bytes, now: Now
    ) -> Busy | QueueFull | None:
        """Enter or refresh a ticket. None when it turns out to be this claim's turn."""
        steady, token = now.steady, claim.token
        if mine is not None:  # before anything is handed over, or we might be passed over as stale
            self._hear(mine, bell, steady)
        if not self._is_locked(steady):  # never held, or its holder died, or did not confirm
            self._drop_stale(steady)
            if mine is None and self._first_in_line() is None:
                return None
            self._hand_over(steady)
            if self.lock_token == token:
                return None
        return self._stay(mine, claim, bell, steady, watch=False)

    def renew(self, now: Now, token: bytes, lease: float) -> bool:
        if self.lock_token != token or not self.is_live(now):
            return False
        self.lock_until = now.steady + lease
        self.dirty = True
        return True

    def release(self, now: Now, token: bytes) -> Released | LockLost:
        if self.lock_token == token:
            self._slide(now.wall)
            self._hand_over(now.steady)
            return RELEASED
        mine = self._ticket_of(token)
        if mine is None:
            return LOCK_LOST
        self.tickets.remove(mine)
        self.dirty = True
        return RELEASED

    def end(self) -> None:
        """The record is about to be removed: everybody who waits is to find that out."""
        self._ring(self.tickets)

    # -- reading and writing --------------------------------------------------------------

    def read(
        self, now: Now, secret: bytes, watch: Claim | None, seen: bytes | None, bell: bytes
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        if not self.is_live(now):
            return MISSING
        steady = now.steady
        mine = None if watch is None else self._ticket_of(watch.token)
        if mine is None and (refused := self._refusal(secret, steady)) is not None:
            return refused
        if watch is not None:
            if self._is_locked(steady) and seen in (None, self.lock_token):
                return self._watch(mine, watch, bell, steady)
            if mine is not None:
                self.tickets.remove(mine)
                self.dirty = True
        return Found(self._snapshot(secret, now, slide_due=self._slide_is_due(now.wall)))

    def _watch(
        self, mine: Ticket | None, watch: Claim, bell: bytes, steady: float
    ) -> Busy | QueueFull:
        if mine is not None:
            self._hear(mine, bell, steady)
        self._drop_stale(steady)
        return self._stay(mine, watch, bell, steady, watch=True)

    def commit(
        self, now: Now, token: bytes, change: Change, release: bool
    ) -> Committed | LockLost | Gone:
        if not self.is_live(now):
            return GONE
        if (repeated := self.committed_by(change.commit_token, now)) is not None:
            if release and self.lock_token == token:
                self._hand_over(now.steady)
            return repeated
        if self.lock_token != token:
            return LOCK_LOST
        done = self._apply(change, now)
        if release:
            self.lock_token = None
            if self.tickets:
                self._hand_over(now.steady)
        return done

    def commit_if(
        self, now: Now, secret: bytes, base: Version, change: Change
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        if not self.is_live(now):
            return GONE
        if (repeated := self.committed_by(change.commit_token, now)) is not None:
            return repeated
        if (refused := self._refusal(secret, now.steady)) is not None:
            return refused if refused is REPLACED else GONE
        if self._is_locked(now.steady):
            return LOCKED
        if self.lock_token is not None or self.tickets:
            self._hand_over(now.steady)
            if self.lock_token is not None:
                return LOCKED
        if self.version != base:
            slide_due = self._slide_is_due(now.wall)
            return Conflict(self._snapshot(secret, now, slide_due=slide_due))
        return self._apply(change, now)

    def committed_by(self, commit_token: int, now: Now) -> Committed | None:
        """What to answer to a repeated `commit` or `create`; None when it is none."""
        commits = self.commits
        if commit_token in commits:  # ahead of the rest: it is among counters, too
            for i in range(len(commits) - 2, -1, -2):
                if commits[i] == commit_token:
                    version = Version(commits[i + 1], commit_token)
                    return Committed(version, self.deadline, self.deadline - now.wall)
        return None

    def _apply(self, change: Change, now: Now) -> Committed:
        commit_token = change.commit_token
        self.counter += 1
        self.version_token = commit_token
        if change.payload is not None:
            self.size = len(change.payload)
        self.commits = [*self.commits[_OLDEST_COMMIT:], commit_token, self.counter]
        self.timeout = change.timeout
        self.user = change.user
        self.deadline = deadline = self._deadline_from(now.wall)
        self.dirty = True
        if change.rotation is not None:
            self._rotate(change.rotation.secret, change.rotation.user_changed, now.steady)
        version = _new_tuple(Version, (self.counter, commit_token))
        return Committed(version, deadline, deadline - now.wall)

    # -- parts ----------------------------------------------------------------------------

    def _is_locked(self, steady: float) -> bool:
        return self.lock_token is not None and self.lock_until > steady

    def _lock(self, token: bytes, holder: str, steady: float, lease: float) -> None:
        self.lock_token = token
        self.lock_holder = holder
        self.lock_since = steady
        self.lock_until = steady + lease
        self.dirty = True

    def _hand_over(self, steady: float) -> None:
        """Give the lock to the first in line, or to nobody; watchers are all let go."""
        self.lock_token = None
        self.dirty = True
        if not self.tickets:
            return
        self._drop_stale(steady)
        self._ring([t for t in self.tickets if t.watch])
        self.tickets = [t for t in self.tickets if not t.watch]
        if self.tickets:
            first = self.tickets.pop(0)
            self._lock(first.token, first.holder, steady, HAND_OFF_SECONDS)
            self._ring([first])

    def _first_in_line(self) -> Ticket | None:
        return next((t for t in self.tickets if not t.watch), None)

    def _ticket_of(self, token: bytes) -> Ticket | None:
        return next((t for t in self.tickets if t.token == token), None)

    def _drop_stale(self, steady: float) -> None:
        oldest = steady - TICKET_SECONDS
        if any(t.heard < oldest for t in self.tickets):
            self.tickets = [t for t in self.tickets if t.heard >= oldest]
            self.dirty = True

    def _hear(self, ticket: Ticket, bell: bytes, steady: float) -> None:
        """A heartbeat, from wherever its owner can be rung now."""
        self.tickets[self.tickets.index(ticket)] = ticket._replace(bell=bell, heard=steady)

    def _stay(
        self, mine: Ticket | None, claim: Claim, bell: bytes, steady: float, *, watch: bool
    ) -> Busy | QueueFull:
        """Keep the ticket that is there, or enter one."""
        if mine is None:
            self._drop_stale(steady)
            limit = claim.queue_limit
            if limit is not None and sum(not t.uncounted for t in self.tickets) >= limit:
                return QueueFull(self.lock_holder, steady - self.lock_since)
            ticket = Ticket(claim.token, claim.holder, bell, steady, watch, limit is None)
            self.tickets.append(ticket)
        self.dirty = True
        return self._busy(claim.token, steady)

    def _ring(self, tickets: list[Ticket]) -> None:
        if tickets:
            self.rung = (self.rung or []) + [(t.bell, t.token) for t in tickets]

    def _busy(self, token: bytes, steady: float) -> Busy:
        ahead = 0
        for ticket in self.tickets:
            if ticket.token == token:
                break
            ahead += not ticket.watch
        retry_in = max(min(SAFETY_POLL_SECONDS, self.lock_until - steady), _MIN_RETRY)
        held_for = steady - self.lock_since
        return Busy(self.lock_holder, held_for, ahead, retry_in, self.lock_token or b"")

    def _refusal(self, secret: bytes, steady: float) -> Replaced | Missing | None:
        """None when the secret gives access."""
        # Both sides are SHA-256 digests of 256 random bits: a comparison's timing tells nothing
        # that helps to find a preimage.
        if secret == self.secret:
            return None
        for old in self.replaced:
            if old.secret == secret and old.until > steady:
                return REPLACED if old.user_changed else None
        return MISSING

    def _rotate(self, secret: bytes, user_changed: bool, steady: float) -> None:
        if user_changed:
            # Whoever came with an older id is not let in any more, also from the queue.
            self.replaced = [old._replace(user_changed=True) for old in self.replaced]
            self._ring(self.tickets)
            self.tickets = []
        live = [old for old in self.replaced if old.until > steady]
        just_now = ReplacedSecret(self.secret, steady + REPLACED_SECONDS, user_changed)
        self.replaced = [*live, just_now][-MAX_REPLACED:]
        self.secret = secret

    def _deadline_from(self, wall: float) -> float:
        deadline = wall + self.timeout
        absolute = self.absolute_deadline
        return deadline if absolute is None or deadline < absolute else absolute

    def _slide(self, wall: float) -> None:
        deadline = self._deadline_from(wall)
        if deadline > self.deadline:  # a wall clock set back shortens nobody's session
            self.deadline = deadline
            self.dirty = True

    def _slide_is_due(self, wall: float) -> bool:
        return self._deadline_from(wall) - self.deadline > slide_step(self.timeout)

    def _snapshot(self, secret: bytes, now: Now, *, slide_due: bool) -> Snapshot:
        """The payload is filled in by the grid."""
        version = _new_tuple(Version, (self.counter, self.version_token))
        return Snapshot(
            None, version, self.created, self.timeout, self.deadline, self.deadline - now.wall,
            self.user, secret != self.secret, slide_due,
        )  # fmt: skip
