"""What every grid promises: the protocol, its values and its outcomes.

A grid keeps *records*, each under a *key* (32 bytes; it never learns a session id). A record is
a payload (opaque bytes), a version, times, at most one lock and a queue of tickets. Absence and
refusal are values; an exception means failure only:

`GridUnavailable`
    Nothing is known: the call may have been carried out or not. Callers repeat it (every call
    here may be repeated with the same tokens) or withdraw its token. Where its `never_asked` is
    true the call was certainly not carried out.
`GridFull`
    The call was not carried out, for want of room. `release`, `remove`, `renew` and `sweep`
    find room when others do not.

Promises, numbered as in the project's design; `gridsession.testing.GridContract` proves them:

1. *One exclusive holder.* A commit is kept only under the token that the record's lock bears,
   or (`commit_if`) where no lock lives and the record is what the caller last saw.
2. *The removed stay removed.* `commit`, `commit_if`, `touch`, `renew`, `release` and `acquire`
   never create.
3. *`create` never overwrites.*
4. *Every refusal is an outcome*, never silence.
5. *No update is lost*: versions are handed out one after the other; a commit repeated with its
   `commit_token` is told the version that it already has and is not applied again.
7. *Cancelled or killed anywhere*, a call has happened whole or not at all, and its lock ends
   with its lease.
9. No key, token, payload or secret appears in an exception, a log record or a repr.
10. Storage of a newer layout is `GridUnavailable`, is never read as missing, never overwritten.

Time is the grid's own. Leases count a clock that neither steps nor stops while a machine sleeps,
deadlines are wall-clock seconds since the epoch. Seconds are floats throughout.

**The lock.** `acquire` grants it, or enters a ticket; tickets are served in the order in which
they were entered. Who releases hands the lock to the first ticket, under a lease of
`HAND_OFF_SECONDS`, and rings that ticket's bell. The bell carries nothing: the woken waiter calls
`acquire` again with its token, which confirms the lock (or finds that there is none). A waiter
calls again at least each `SAFETY_POLL_SECONDS` in any case; that is its heartbeat, and re-enters
it where its ticket was lost. A ticket not heard of for `TICKET_SECONDS` is dropped; a lock handed
over and not confirmed in time goes to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

HAND_OFF_SECONDS = 2.0  # a granted waiter that does not confirm by then is passed over
SAFETY_POLL_SECONDS = 1.0  # a lost bell costs this much; the reference polls each 0.5 s instead
TICKET_SECONDS = 3.0  # three polls missed: the waiter is gone
REPLACED_SECONDS = 10.0  # how long a replaced secret is remembered; covers requests in flight
MAX_REPLACED = 4  # replaced secrets remembered at once
REMEMBERED_COMMITS = 8  # commit tokens kept, so that a repeated commit is known as such


class Version(NamedTuple):
    """Which commit wrote a payload. Compared whole: a counter alone repeats after a fail-over."""

    counter: int
    token: int  # the 64-bit token of that commit

    def __repr__(self) -> str:
        return f"Version({self.counter})"


class Now(NamedTuple):
    """One reading of a grid's clocks.

    Attributes:
        wall: seconds since the epoch.
        steady: seconds of a clock that neither steps nor stops.
        boot_id: which boot of the system `steady` counts from.
    """

    wall: float
    steady: float
    boot_id: int


class Clock(Protocol):
    """The clocks that a grid in this process reads."""

    def now(self) -> Now: ...


@dataclass(slots=True)
class Claim:
    """One caller's wish for the lock, the same object at each repetition.

    Attributes:
        token: 16 bytes that no other claim has; the lock's fence and the ticket's name.
        holder: who it is, in words; shown to those who wait.
        lease: seconds that the lock lives when granted, from the grid's now.
        queue_limit: tickets that the record may hold already for a new one to be entered. None
            is for a commit, whose handler has run: its ticket is always entered, and is not
            counted among those of others.
    """

    token: bytes = field(repr=False)
    holder: str
    lease: float
    queue_limit: int | None


@dataclass(slots=True)
class Rotation:
    """A new secret for a record.

    Attributes:
        secret: SHA-256 of the new secret.
        user_changed: the replaced secrets stop giving access (they answer `Replaced`) instead of
            giving it for `REPLACED_SECONDS` more.
    """

    secret: bytes = field(repr=False)
    user_changed: bool


@dataclass(slots=True)
class Change:
    """What a commit writes.

    Attributes:
        commit_token: 64 bits that no other commit has, the same at each repetition of this one.
        payload: the stored bytes; None leaves them.
        timeout: seconds of sliding expiry from now on.
        user: whose session it is, or None.
        rotation: the new secret, or None.
    """

    commit_token: int = field(repr=False)
    payload: bytes | None = field(repr=False)
    timeout: float
    user: str | None = field(repr=False)
    rotation: Rotation | None = None


@dataclass(slots=True)
class NewRecord:
    """What `create` writes.

    Attributes:
        commit_token: as in `Change`.
        secret: SHA-256 of the session id's secret.
        payload: the stored bytes.
        timeout: seconds of sliding expiry.
        absolute_timeout: seconds after which the record expires however much it is used, or None.
        user: whose session it is, or None.
    """

    commit_token: int = field(repr=False)
    secret: bytes = field(repr=False)
    payload: bytes = field(repr=False)
    timeout: float
    absolute_timeout: float | None
    user: str | None = field(repr=False)


@dataclass(slots=True)
class Snapshot:
    """A record as its last commit left it.

    Attributes:
        payload: the stored bytes; None when the caller has said that it knows this version.
        version: which commit wrote them.
        created: when, in wall-clock seconds.
        timeout: seconds of sliding expiry.
        deadline: when the record expires unless it is used, in wall-clock seconds.
        expires_in: seconds until then by the grid's clock, which the caller's may differ from;
            below 0 where only its lock keeps the record. No part of what is compared by `==`.
        user: whose session it is, or None.
        replaced: the caller's secret is one that was replaced lately; it still gives access.
        slide_due: using the record now would put its deadline off by more than a hundredth of
            the timeout (at least 1 s, at most 60): the caller should `touch`. An exclusive
            access has done so already.
    """

    payload: bytes | None = field(repr=False)
    version: Version
    created: float
    timeout: float
    deadline: float
    expires_in: float = field(compare=False)
    user: str | None = field(repr=False)
    replaced: bool
    slide_due: bool


# -- outcomes ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Granted:
    """The lock is the caller's until its lease ends."""

    snapshot: Snapshot


@dataclass(slots=True)
class Found:
    """A record was read, without a lock."""

    snapshot: Snapshot


@dataclass(slots=True)
class Busy:
    """Another holds the lock; the caller's ticket is entered.

    Attributes:
        holder: who holds it.
        held_for: for how many seconds already.
        ahead: tickets before the caller's that wait for the lock.
        retry_in: seconds after which the caller must call again if its bell has not rung.
        lock: which holding of the lock this is (for `read`: see there).
    """

    holder: str
    held_for: float
    ahead: int
    retry_in: float
    lock: bytes = field(repr=False)


@dataclass(slots=True)
class QueueFull:
    """`queue_limit` others wait already; no ticket was entered."""

    holder: str
    held_for: float


class Missing:
    """No such record, or expired, or the secret is not its secret: not told apart."""

    __slots__ = ()


class Replaced:
    """The secret was replaced by a change of user; it gives no access. Its ticket is gone."""

    __slots__ = ()


@dataclass(slots=True)
class Committed:
    """Stored. `version` is what the record has now (or had, when the commit was a repetition).

    `deadline` and `expires_in` are as in `Snapshot`.
    """

    version: Version
    deadline: float
    expires_in: float = field(compare=False)


@dataclass(slots=True)
class Conflict:
    """The record is not what the commit was based on; nothing was stored. It is this now."""

    snapshot: Snapshot


class Exists:
    """There is a record under this key; nothing was written."""

    __slots__ = ()


class Released:
    """The token's lock or ticket is gone."""

    __slots__ = ()


class Removed:
    """The record is gone, with its lock and its tickets."""

    __slots__ = ()


class LockLost:
    """The lock is not (or no more) this token's; nothing was changed."""

    __slots__ = ()


class Locked:
    """Another's lock lives; nothing was stored, and no ticket was entered."""

    __slots__ = ()


class Gone:
    """There is no such record (any more); nothing was changed."""

    __slots__ = ()


MISSING, REPLACED, EXISTS = Missing(), Replaced(), Exists()
RELEASED, REMOVED, LOCK_LOST, GONE = Released(), Removed(), LockLost(), Gone()
LOCKED = Locked()


class Grid(Protocol):
    """Where records live. All methods may raise `GridUnavailable`; see the module's promises.

    No record expires while its lock lives.

    An instance may be used from several event loops of one process, one after the other or at
    once. A method that is cancelled has happened whole or not at all; the caller cannot know
    which, and withdraws its token with `release`. (Where a call goes on elsewhere, on a thread or
    on a wire, it may happen after the cancelled await has returned; what is asked after it on the
    same grid comes after it.)
    """

    @property
    def where(self) -> str:
        """The grid in words, for logs: scheme and place, without password."""
        ...

    @property
    def is_local(self) -> bool:
        """Reading from it costs less than looking into a client cache, and needs none."""
        ...

    async def open(self) -> None:
        """Make ready; a second call does nothing. Opening does not scan what is stored.

        Raises:
            GridUnavailable: it cannot be reached, or holds a newer layout.
            SettingsError: it cannot be used as the connection string says, and never will.
        """
        ...

    async def close(self) -> None:
        """Give back what `open` took. Closing twice: no error."""
        ...

    async def create(
        self, key: bytes, new: NewRecord, claim: Claim | None = None
    ) -> Committed | Exists:
        """Write a new record, locked by `claim` where one is given.

        Repeated with the same `commit_token`, it answers `Committed` again. An expired record
        that is still there counts as absent.
        """
        ...

    async def acquire(
        self, key: bytes, secret: bytes, claim: Claim, known: Version | None = None
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        """Take the lock and read; slides the deadline.

        While the record is of the version that is `known`, its payload is not sent: None.

        Calling again with the token that holds the lock confirms it and renews its lease; it is
        not asked for the secret again, which may have been rotated while it waited. A token
        serves one holding, or one `watch`.
        `Busy` has entered a ticket, or refreshed it. `Replaced`, `Missing` and `QueueFull` leave
        neither lock nor ticket of this token behind.
        """
        ...

    async def read(
        self,
        key: bytes,
        secret: bytes,
        watch: Claim | None = None,
        seen: bytes | None = None,
        known: Version | None = None,
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        """Read what the last commit left; writes nothing. `known` is as in `acquire`.

        With `watch` it waits for a running writer as a reader does: while the lock is held,
        `Busy`, and a ticket is entered that is rung at the next release without being given the
        lock. `seen` is the `lock` of the first `Busy`: once another holding has followed, the
        writer waited for is done, and the answer is `Found`.
        """
        ...

    async def wait(self, key: bytes, token: bytes, seconds: float) -> None:
        """Return when the bell of this token's ticket rings, or after `seconds`.

        Call it after `Busy`, on the same event loop. A bell rung since then is not lost. It may
        also return for no reason; a bell may get lost: `seconds` bounds the harm.
        """
        ...

    async def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Committed | LockLost | Gone:
        """Store a change under the lock that `token` bears, and hand the lock on if `release`.

        The deadline is set anew from `change.timeout`. A lease that has run out while nobody
        took the lock, nor asked for a `commit_if`, still counts as the token's; an expired record
        without a lock is `Gone`. What made the record counts as a commit of it.
        """
        ...

    async def commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        """Store a change without a lock, where the record still is of the version `base`.

        For requests that share a session: each reads, works, and commits what it made of `base`.
        Decided in this order: no such record, `Gone`; repeated with its `commit_token`,
        `Committed` again; a secret that gives no access, `Replaced` or `Gone`; another's lock
        lives, `Locked`; another version, `Conflict`. After more than `REMEMBERED_COMMITS` other
        commits a repetition is not known any more: the counters tell.

        A lock whose lease has run out goes to the first ticket, as when one acquires: `Locked`.
        Where nobody waits for it, it ends: its holder would undo what is committed now, and is
        told `LockLost`. Those who watch are rung then.
        """
        ...

    async def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        """Let the leases of (key, token) pairs end `lease` seconds from now.

        Answers for each whether the lock is still the token's.
        """
        ...

    async def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        """Give back what the token has, lock or ticket, and hand a lock on.

        Giving back a lock slides the deadline.
        """
        ...

    async def touch(self, key: bytes) -> bool:
        """Slide the deadline. False when there is no such record (any more)."""
        ...

    async def remove(self, key: bytes, token: bytes | None = None) -> Removed | LockLost | Gone:
        """End a session. With a token only under its lock, without one whoever holds it.

        Those who wait are rung, and find it `Missing`.
        """
        ...

    async def sweep(self, limit: int) -> int:
        """Remove up to `limit` expired records; answers how many of `limit` it had to look at.

        Less than `limit` means: nothing more is due. An expired record is never seen by the
        other calls, swept or not.
        """
        ...
