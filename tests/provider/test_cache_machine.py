"""Client caches of several workers on one grid, against what that grid had stored, and when.

Hypothesis makes up requests of three workers with caches of any kind, some of them with others in
between, while the grid loses its last commits in fail-overs, time passes, and sessions are rotated,
removed and expire. After each call what the grid has stored is noted; what a request sees is
compared with what was noted when the grid answered it, or, where it was not asked, with all that
was noted within the interval.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gridsession import (
    GridUnavailable,
    Session,
    SessionGone,
    SessionLockLost,
    SessionProvider,
    SessionReplaced,
    SessionSettings,
    payload,
)
from gridsession.grids.contract import Found, Replaced
from gridsession.grids.memory import MemoryGrid
from gridsession.provider.client_cache import ClientCache
from gridsession.settings import ClientCacheType
from gridsession.testing import ManualClock
from tests.provider.harness import NO_SWEEP, Spy, identity_of

Answer = TypeVar("Answer")
Point = Literal["there", "back", "open", "commit there", "commit back"]
Act = Callable[[], Awaitable[None]]

# Seconds; no sum of some of them is another.
STEPS = (0.1301, 1.0107, 2.5003, 9.1709, 31.0909)
INTERVALS = (0.0, 5.0, 20.0)
TIMEOUTS = (4.0, 30.0, 1200.0)
TRAVEL = (0.0, 0.0, 0.0, 0.7013, 6.0301)  # for a call, there and back each
SIZES = (0, 0, 400_000, 700_000, 1_100_000)  # the last one alone is larger than a cache
KINDS: tuple[ClientCacheType, ...] = ("LRU", "Random", "LRU-MaxMemory", "Random-MaxMemory")
READS = ("read", "acquire")
COMMITS = ("commit", "commit_if", "create")

slots = st.integers(0, 2)
workers = st.integers(0, 2)
writing = st.sampled_from(["exclusive", "concurrent"])
accesses = st.sampled_from(["read_only"] * 3 + ["exclusive", "concurrent"])


class Stored(NamedTuple):
    """What one id would have been given at some moment.

    `values` None: there is no such session. `replaced`: it is refused. `ends_at` is the deadline
    in seconds of the steady clock.
    """

    values: dict[str, Any] | None = None
    ends_at: float = 0.0
    replaced: bool = False


class Note(NamedTuple):
    """What the grid had stored; `at` in seconds of the steady clock."""

    at: float
    place: int
    by_id: dict[str, Stored]


@dataclass
class Request:
    """One that is under way; `answers` are what was noted as the grid answered it."""

    point: Point | None = None
    act: Act | None = None  # what happens at that point
    travel: float = 0.0
    loses: Literal["there", "back"] | None = None  # its commit, and nobody answers
    answers: list[tuple[str, Note]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    failed_over: bool = False

    def answer(self) -> Note | None:
        """To what it asked first."""
        return next((note for name, note in self.answers if name in READS), None)


class Watched(Spy):
    """A grid whose every call is noted and may be disturbed.

    Attributes:
        on: called with the name before and after a call is carried out, and with what it is.
    """

    on: Callable[[str, Literal["there", "done", "back"]], Awaitable[None]]

    async def _call(self, name: str, call: Callable[[], Awaitable[Answer]]) -> Answer:
        async def watched() -> Answer:
            await self.on(name, "there")
            outcome = await call()
            await self.on(name, "done")
            await self.on(name, "back")
            return outcome

        return await super()._call(name, watched)


class Caches(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.memory = MemoryGrid(self.clock)
        self.grid = Watched(self.memory)
        self.grid.on = self._on_call
        self.away = False
        self.providers: list[SessionProvider] = []
        self.ids: list[list[str]] = [[], [], []]  # of each slot, the newest first
        self.notes: list[Note] = []
        self.requests: list[Request] = []  # under way: each is within the one before
        self.told: dict[tuple[int, str], int] = {}  # the newest note that a worker was told of
        self.ended_here: dict[tuple[int, str], int] = {}  # and after which note
        self.backup: tuple[Any, Any, Any] | None = None
        self.numbers = self.ticks = 0

    def teardown(self) -> None:
        for provider in self.providers:
            self.run(provider.close())
        self.runner.close()

    def run(self, work: Awaitable[None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(10.0):
                await work
                await self.grid.settle()  # what was done beside it

        self.runner.run(bounded())

    @initialize(
        kinds=st.tuples(*[st.sampled_from(KINDS)] * 3),
        capacities=st.tuples(*[st.integers(1, 3)] * 3),
        intervals=st.permutations(INTERVALS),
        access=writing,
        size=st.sampled_from(SIZES[:-1]),
    )
    def begin(
        self,
        kinds: tuple[ClientCacheType, ...],
        capacities: tuple[int, ...],
        intervals: list[float],
        access: str,
        size: int,
    ) -> None:
        for kind, capacity, interval in zip(kinds, capacities, intervals, strict=True):
            room = 1 if kind.endswith("MaxMemory") else capacity
            options: dict[str, Any] = {
                "client_cache_type": kind,
                "client_cache_capacity": room,
                "client_cache_coherency_interval": interval,
                "if_grid_unavailable": "read_cached",
                "max_payload_bytes": 2 << 20,
            }
            provider = SessionProvider(SessionSettings(**NO_SWEEP | options), grid=self.grid)
            provider.client_cache = ClientCache(kind, room, interval, self._steady)
            self.providers.append(provider)
        for slot in range(len(self.ids)):
            self._begin(slot, slot, access, size, TIMEOUTS[slot])

    # -- requests -------------------------------------------------------------------------

    def _at_hand(self, slot: int) -> list[str]:
        """The ids of a slot's session, the newest first; where it has ended, of a new one's."""
        if self.notes[-1].by_id[self.ids[slot][0]].values is None:
            self._begin(slot, slot, "exclusive", 0, TIMEOUTS[slot])
        return self.ids[slot]

    def _begin(self, worker: int, slot: int, access: str, size: int, timeout: float) -> None:
        async def create() -> None:
            self.requests.append(Request())
            async with self.providers[worker].open(None, access=access) as session:
                self._write(session, size)
                session.timeout = timeout
            self.requests.pop()
            self.ids[slot] = [session.id, *self.ids[slot][:2]]
            await self._note()

        self.run(create())

    @rule(
        worker=workers,
        slot=slots,
        which=st.integers(0, 2),
        access=accesses,
        travel=st.sampled_from(TRAVEL),
    )
    def read(self, worker: int, slot: int, which: int, access: str, *, travel: float = 0.0) -> None:
        ids = self.ids[slot]
        request = Request(travel=travel)
        self.run(self._use(worker, ids[which % len(ids)], access, None, request))
        assert not {*request.calls} & {*COMMITS, "remove"}, "a pure read wrote"

    @rule(slot=slots, access=accesses)
    def read_everywhere(self, slot: int, access: str) -> None:
        for worker in range(len(self.providers)):
            self.read(worker, slot, 0, access)

    @rule(
        worker=workers,
        slot=slots,
        other=workers,
        travel=st.sampled_from(TRAVEL),
        until=st.sampled_from(["interval", "deadline"]),
        by=st.sampled_from([-0.0507, 0.0507]),
    )
    def read_at_the_bounds(
        self, *, worker: int, slot: int, other: int, travel: float, until: str, by: float
    ) -> None:
        """Shortly before and after what was read may be served no more."""
        ids = self._at_hand(slot)
        asked_at = self.clock.steady()
        self.read(worker, slot, 0, "read_only", travel=travel)
        stored = self.notes[-1].by_id[ids[0]]
        if until == "interval":
            end = asked_at + self._interval(worker)
            self.run(self._change(other, slot, "exclusive", Request()))
        else:
            end = min(stored.ends_at, asked_at + 2 * max(INTERVALS))
        self.run(self._advance(max(end + by - self.clock.steady(), 0.0)))
        self.read(worker, slot, 0, "read_only")

    @rule(
        worker=workers,
        slot=slots,
        access=writing,
        size=st.sampled_from(SIZES),
        timeout=st.sampled_from([None, None, None, *TIMEOUTS]),
        travel=st.sampled_from(TRAVEL),
        loses=st.sampled_from([None, None, None, "there", "back"]),
        then=accesses,
    )
    def write(
        self,
        *,
        worker: int,
        slot: int,
        access: str,
        size: int,
        timeout: float | None,
        travel: float,
        loses: Literal["there", "back"] | None,
        then: str,
    ) -> None:
        self._at_hand(slot)
        request = Request(travel=travel, loses=loses)
        self.run(self._change(worker, slot, access, request, size=size, timeout=timeout))
        self.read(worker, slot, 0, then)

    @rule(worker=workers, slot=slots, how=st.sampled_from(["abandon", "clear"]), access=writing)
    def remove(self, worker: int, slot: int, how: str, access: str) -> None:
        self._at_hand(slot)
        self.run(self._end(worker, slot, how, access))
        self.read(worker, slot, 0, "read_only")

    @rule(worker=workers, slot=slots, user=st.sampled_from([None, None, "ann", "bob"]))
    def rotate(self, worker: int, slot: int, user: str | None) -> None:
        self._at_hand(slot)
        self.run(self._rotate(worker, slot, user))
        self.read(worker, slot, 1, "read_only")  # with the id that was replaced, if it was

    @rule(
        worker=workers,
        slot=slots,
        access=accesses,
        changes=st.booleans(),
        point=st.sampled_from(["there", "back", "open", "commit there", "commit back"]),
        other=st.sampled_from([None, 0, 1, 2]),  # None: of the same worker
        what=st.sampled_from(["write", "write", "rotate", "end", "fail over", "later"]),
        travel=st.sampled_from(TRAVEL),
        then=accesses,
    )
    def two_at_once(
        self,
        *,
        worker: int,
        slot: int,
        access: str,
        changes: bool,
        point: Point,
        other: int | None,
        what: str,
        travel: float,
        then: str,
    ) -> None:
        """While one is at a point of its way, another comes and goes."""
        ids = self._at_hand(slot)
        whose = worker if other is None else other
        has_the_lock = access == "exclusive" and point in ("back", "open", "commit there")
        if has_the_lock and what in ("write", "rotate"):
            what = "end"

        async def act() -> None:
            if what == "write":
                await self._change(whose, slot, "exclusive", Request())
            elif what == "rotate":
                await self._rotate(whose, slot, None)
            elif what == "end":
                # Without its lock, which may be another's.
                await self._end(whose, slot, "abandon", "concurrent")
            elif what == "fail over":
                await self._fail_over()
            else:
                await self._advance(STEPS[2])

        request = Request(point, act, travel)
        if access == "read_only" or not changes:
            self.run(self._use(worker, ids[0], access, None, request))
        else:
            self.run(self._change(worker, slot, access, request))
        for reader in {worker, whose}:
            self.read(reader, slot, 0, then)

    @rule(worker=workers, slot=slots)
    def read_in_an_outage(self, worker: int, slot: int) -> None:
        """The last version known is read until the session expires, and never elsewhere."""

        async def read() -> None:
            session_id, provider, now = self.ids[slot][0], self.providers[worker], self.clock.steady
            self.away = True
            try:
                async with provider.open(session_id, access="read_only") as session:
                    assert (worker, session_id) not in self.ended_here
                    interval = None if session.is_stale else self._interval(worker)
                    assert self._was_there(session_id, dict(session), now(), interval)
            except GridUnavailable:
                pass
            finally:
                await self.grid.settle()
                self.away = False

        self.run(read())

    # -- what befalls the grid ------------------------------------------------------------

    @rule(seconds=st.sampled_from(STEPS))
    def advance(self, seconds: float) -> None:
        self.run(self._advance(seconds))

    @rule()
    def remember(self) -> None:
        """A replica that will not hear of what is committed from now on."""
        table = self.memory._table
        self.backup = copy.deepcopy((table._records, table._payloads, table._deadlines))

    @precondition(lambda self: self.backup is not None)
    @rule()
    def fail_over(self) -> None:
        self.run(self._fail_over())

    @rule(
        slot=slots,
        worker=workers,
        other=workers,
        first=writing,
        second=writing,
        then=accesses,
    )
    def repeat_a_counter(
        self, *, slot: int, worker: int, other: int, first: str, second: str, then: str
    ) -> None:
        """What one has committed is lost, and another's commit has the same number."""
        self._at_hand(slot)
        self.remember()
        self.run(self._change(worker, slot, first, Request()))
        self.run(self._fail_over())
        self.run(self._change(other, slot, second, Request()))
        self.read(worker, slot, 0, then)

    # -- what must hold at any moment -----------------------------------------------------

    @invariant()
    def no_cache_is_too_full(self) -> None:
        for provider in self.providers:
            assert provider.client_cache is not None
            counters = provider.client_cache.counters
            capacity = provider.settings.client_cache_capacity
            if provider.settings.client_cache_type.endswith("MaxMemory"):
                assert counters.bytes <= capacity << 20
            else:
                assert counters.sessions <= capacity

    # -- parts ----------------------------------------------------------------------------

    def _steady(self) -> float:
        """The workers' clock: no two of its answers are alike, as with a real one."""
        self.ticks += 1
        return self.clock.steady() + self.ticks * 1e-7

    def _interval(self, worker: int) -> float:
        return float(self.providers[worker].settings.client_cache_coherency_interval)  # type: ignore[arg-type]

    def _write(self, session: Session, size: int) -> None:
        self.numbers += 1
        session["n"] = self.numbers
        session.setdefault("seen", []).append(self.numbers)
        session["pad"] = bytes(size)

    async def _use(
        self,
        worker: int,
        session_id: str,
        access: str,
        handler: Callable[[Session], None] | None,
        request: Request,
    ) -> None:
        """One request; what it sees is checked. Raises what its own commit is refused with."""
        self.requests.append(request)
        is_open = False
        try:
            provider = self.providers[worker]
            async with provider.open(session_id, access=access) as session:
                is_open = True
                self._check(worker, session_id, access, request, session)
                await self._pass("open", request)
                if handler is not None:
                    handler(session)
        except SessionReplaced:
            note = request.answer()
            assert is_open or (note is not None and note.by_id[session_id].replaced)
            if is_open and request.act is None:
                raise
        except (SessionGone, SessionLockLost):
            if request.act is None and not request.travel:
                raise
        except GridUnavailable:
            if "lost" not in request.calls:
                raise
        else:
            ids = next(ids for ids in self.ids if session_id in ids)
            if session.is_new or session.id is None:
                pass
            elif session.id not in ids:
                ids.insert(0, session.id)
                await self._note()
        finally:
            self.requests.pop()
            self._was_told(worker, session_id, request)

    def _check(
        self, worker: int, session_id: str, access: str, request: Request, session: Session
    ) -> None:
        seen = None if session.is_new else dict(session)
        note = request.answer()
        interval = self._interval(worker)
        if note is not None:
            assert seen == note.by_id[session_id].values, "another version than the grid's"
            return
        assert access == "read_only", "a request that may write did not ask the grid"
        assert interval > 0, "the grid was not asked"
        assert (worker, session_id) not in self.ended_here, "what was ended here is served here"
        assert seen is not None
        assert not session.is_stale
        told = self.told.get((worker, session_id), 0)
        now = self.clock.steady()
        assert self._was_there(session_id, seen, now, interval, told), "older than it may be"

    def _was_there(
        self,
        session_id: str,
        values: dict[str, Any],
        now: float,
        interval: float | None,
        since: int = 0,
    ) -> bool:
        """Whether the grid had these values within the interval, with a deadline yet to come."""
        for note in self.notes[since:]:
            stored = note.by_id.get(session_id)
            if (
                stored is not None
                and (interval is None or note.at > now - interval)
                and stored.values == values
                and now < stored.ends_at
            ):
                return True
        return False

    def _was_told(self, worker: int, session_id: str, request: Request) -> None:
        if request.failed_over:  # the numbers of what it saw tell nothing any more
            self.told = {}
            return
        for name, note in request.answers:
            if name in (*READS, *COMMITS):
                one = worker, session_id
                self.told[one] = max(self.told.get(one, 0), note.place)
                if note.place > self.ended_here.get(one, note.place):
                    del self.ended_here[one]

    async def _change(
        self,
        worker: int,
        slot: int,
        access: str,
        request: Request,
        *,
        size: int = 0,
        timeout: float | None = None,
    ) -> None:
        def handler(session: Session) -> None:
            if session.is_new:
                return
            self._write(session, size)
            if timeout is not None:
                session.timeout = timeout

        await self._use(worker, self.ids[slot][0], access, handler, request)

    async def _rotate(self, worker: int, slot: int, user: str | None) -> None:
        def handler(session: Session) -> None:
            if session.is_new:
                return
            if user is None:
                session.regenerate_id()
            else:
                session.user = user

        await self._use(worker, self.ids[slot][0], "exclusive", handler, Request())

    async def _end(self, worker: int, slot: int, how: str, access: str) -> None:
        ids = self.ids[slot]

        def handler(session: Session) -> None:
            if not session.is_new:
                getattr(session, how)()

        request = Request()
        await self._use(worker, ids[0], access, handler, request)
        if "remove" in request.calls:
            key = identity_of(ids[0]).key  # the older ids may be of sessions before this one
            ended = [it for it in ids if identity_of(it).key == key]
            self.ended_here |= {(worker, it): len(self.notes) - 1 for it in ended}

    async def _advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self._note()

    async def _fail_over(self) -> None:
        if self.backup is None:
            return
        table = self.memory._table
        state = copy.deepcopy(self.backup)
        table._records, table._payloads, table._deadlines = state
        for request in self.requests:
            request.failed_over = True
        self.told = {}
        await self._note()

    # -- around each call -----------------------------------------------------------------

    async def _on_call(self, name: str, when: Literal["there", "done", "back"]) -> None:
        if name in ("open", "close", "wait", "sweep"):
            return
        request = self.requests[-1] if self.requests and name != "touch" else None
        if when == "done":
            note = await self._note()
            if request is not None:
                request.answers.append((name, note))
            return
        if when == "there" and request is not None:
            request.calls.append(name)
        if self.away:
            raise GridUnavailable("the grid is away")
        if request is None:
            return
        self.clock.advance(request.travel)
        if name in COMMITS and request.loses == when:
            request.loses = None  # once: its lock is given back
            request.calls.append("lost")
            raise GridUnavailable("no answer came")
        if name in READS:
            await self._pass(when, request)
        elif name in COMMITS:
            await self._pass(f"commit {when}", request)  # type: ignore[arg-type]

    async def _pass(self, point: Point, request: Request) -> None:
        if request.point == point and request.act is not None:
            request.point = None
            await request.act()

    async def _note(self) -> Note:
        by_id = {it: await self._stored(it) for ids in self.ids for it in ids}
        note = Note(self.clock.steady(), len(self.notes), by_id)
        self.notes.append(note)
        return note

    async def _stored(self, session_id: str) -> Stored:
        identity = identity_of(session_id)
        outcome = await self.memory.read(identity.key, identity.secret)
        if isinstance(outcome, Replaced):
            return Stored(replaced=True)
        if not isinstance(outcome, Found):
            return Stored()
        snapshot = outcome.snapshot
        assert snapshot.payload is not None
        segments = self.providers[0].envelope.open(identity.key, snapshot.payload)
        values = {key: payload.decode(segment) for key, segment in segments.items()}
        return Stored(values, self.clock.steady() + snapshot.expires_in)


def attack(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Caches,
        settings=settings(
            deadline=None,
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_promise_8_caches_hide_no_commit() -> None:
    attack(examples=150, steps=30)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_caches_hide_no_commit_for_long() -> None:
    attack(examples=5_000, steps=60)
