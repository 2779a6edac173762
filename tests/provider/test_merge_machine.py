"""Promise 5: requests of several workers that share a session, against one serial order.

Hypothesis opens requests, concurrent ones and exclusive ones, changes keys in them, and commits
them in any order: by `save()`, at their end, and in blocks of `exclusive()`. The order in which the
grid carried commits out is noted. After each of them what is stored has to be what was stored
before, with that request's changes, key by key, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gridsession import Session, SessionProvider, SessionSettings, payload
from gridsession.changes import ABSENT
from gridsession.grids.contract import Committed, Found
from tests.provider.harness import NO_SWEEP, Spy, identity_of, make_grid, stored

Answer = TypeVar("Answer")
Values = dict[str, Any]
Change = tuple[str, str]  # what, under which key

KEYS = ("a", "b", "c", "n", "log")
AT_ONCE = 4  # requests
SECONDS = 20.0  # until everything that waits has had its turn

changes = st.lists(
    st.tuples(st.sampled_from(["set", "set", "remove", "inside"]), st.sampled_from(KEYS)),
    min_size=1,
    max_size=3,
)
places = st.integers(0, AT_ONCE - 1)


def make(what: str, key: str, number: int, values: MutableMapping[str, Any]) -> None:
    """One change, to a session or to a dict. The number is this change's own."""
    there = values.get(key)
    if what == "remove":
        values.pop(key, None)
    elif what == "set" or there is None:
        if key == "log":
            values[key] = [number]
        else:
            values[key] = number if key == "n" or number % 4 == 1 else {"x": [number]}
    elif isinstance(there, int):
        values[key] = there + number
    elif isinstance(there, list):
        there.append(number)
    else:
        there["x"].append(number)


def resolve(key: str, base: Any, theirs: Any, mine: Any) -> Any:
    """`n` is added up, `log` has the entries of both; elsewhere the later commit's stands."""
    if mine is ABSENT or key not in ("n", "log"):
        return mine
    base, theirs = [it if it is not ABSENT else 0 if key == "n" else [] for it in (base, theirs)]
    if key == "n":
        return theirs + mine - base
    return theirs + [entry for entry in mine if entry not in base]


class Request:
    """One that is open.

    Attributes:
        base: what was stored of the version that it goes by, and its place in the order.
        mine: what its session has to show.
        block: of an `exclusive()` that it is in, the same two.
        committed: the place of what it has stored last.
        task: what it does just now.
    """

    task: asyncio.Task[None] | None = None
    block: tuple[Values, Values] | None = None
    committed: int | None = None

    def __init__(self, session: Session, access: str, stored: Values, place: int) -> None:
        self.session = session
        self.access = access
        self.closing = contextlib.AsyncExitStack()
        self.load(stored, place)

    def load(self, stored: Values, place: int) -> None:
        self.base, self.mine, self.place = stored, copy.deepcopy(stored), place

    @property
    def is_busy(self) -> bool:
        return self.task is not None and not self.task.done()


current: ContextVar[Request | None] = ContextVar("current", default=None)


class Noted(Spy):
    """A grid that tells of each commit, before its answer is on its way."""

    on_commit: Callable[[Committed], Awaitable[None]]

    async def _call(self, name: str, call: Callable[[], Awaitable[Answer]]) -> Answer:
        async def noted() -> Answer:
            outcome = await call()
            if name in ("commit", "commit_if") and isinstance(outcome, Committed):
                await self.on_commit(outcome)
            return outcome

        return await super()._call(name, noted)


class Merges(RuleBasedStateMachine):
    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.closing = contextlib.ExitStack()
        folder = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        self.runner = self.closing.enter_context(asyncio.Runner())
        self.grid = Noted(make_grid(self.kind, folder))
        self.grid.on_commit = self._on_commit
        self.requests: list[Request | None] = [None] * AT_ONCE
        self.numbers = 0
        self.providers: list[SessionProvider] = []

    @initialize(capacities=st.tuples(*[st.sampled_from([0, 1])] * 2), resolves=st.booleans())
    def begin(self, capacities: tuple[int, ...], resolves: bool) -> None:
        self.resolves = resolves
        first: Values = {"stays": True, "a": 1, "b": {"x": [1]}, "n": 0, "log": []}

        async def begin() -> None:
            for capacity in capacities:
                options: dict[str, Any] = {"client_cache_capacity": capacity, "namespace": "merges"}
                provider = SessionProvider(
                    SessionSettings(**NO_SWEEP | options),
                    grid=self.grid,
                    on_conflict=resolve if resolves else None,
                )
                await provider.start()
                self.providers.append(provider)
            self.session_id = await stored(self.providers[0], **copy.deepcopy(first))

        self.run(begin())
        self.states: list[Values] = [first]  # in the order of commits

    def teardown(self) -> None:
        async def end() -> None:
            for place, request in enumerate(self.requests):
                if request is not None and request.access == "exclusive":
                    await self._end(place)  # others wait for it
            await self._wait_for_all()
            for place in range(AT_ONCE):
                await self._end(place)
            for provider in self.providers:
                await provider.close()

        try:
            self.run(end())
        finally:
            self.runner.run(self.grid.inner.close())
            self.closing.close()

    def run(self, work: Awaitable[None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(SECONDS):
                await work
                if self._is_locked():
                    await self._let_them_come_as_far_as_they_can()
                else:
                    await self._wait_for_all()

        self.runner.run(bounded())

    # -- rules ----------------------------------------------------------------------------

    @rule(
        place=places,
        worker=st.integers(0, 1),
        access=st.sampled_from(["concurrent"] * 5 + ["exclusive"]),
        to_do=changes,
    )
    def open(self, place: int, worker: int, access: str, to_do: list[Change]) -> None:
        """A request, and its first changes."""
        if self.requests[place] is not None or (access == "exclusive" and self._is_locked()):
            return

        async def open_one() -> None:
            closing = contextlib.AsyncExitStack()
            opened = self.providers[worker].open(self.session_id, access=access)
            session = await closing.enter_async_context(opened)
            request = Request(session, access, self.states[-1], len(self.states) - 1)
            request.closing = closing
            self.requests[place] = request

        self.run(open_one())
        self.change(place, to_do)

    def _number(self) -> int:
        """One that is no sum of others: two requests never come to the same value by chance."""
        self.numbers += 1
        return pow(3, self.numbers, (1 << 61) - 1)

    def _is_open(self, place: int) -> None:
        if self.requests[place] is None:
            self.open(place, place % 2, "concurrent", [("set", "a")])

    @rule(place=places, to_do=changes)
    def change(self, place: int, to_do: list[Change]) -> None:
        self._is_open(place)
        request = self.requests[place]
        if request is None or request.is_busy:
            return
        for what, key in to_do:
            number = self._number()
            make(what, key, number, request.session)
            make(what, key, number, request.mine)

    @rule(to_do=st.tuples(*[changes] * AT_ONCE))
    def change_everywhere(self, to_do: tuple[list[Change], ...]) -> None:
        for place in range(AT_ONCE):
            self.change(place, to_do[place])

    @rule(place=places)
    def look(self, place: int) -> None:
        """At all values: from then on they are in hand."""
        request = self.requests[place]
        if request is not None and not request.is_busy:
            assert dict(request.session) == request.mine

    @rule(place=places, to_do=changes)
    def save(self, place: int, to_do: list[Change]) -> None:
        self._is_open(place)
        self.change(place, to_do)
        self._do(place, self._save)

    @rule(place=places, to_do=changes)
    def change_exclusively(self, place: int, to_do: list[Change]) -> None:
        self._is_open(place)
        request = self.requests[place]
        if request is not None and request.access == "concurrent":
            self._do(place, lambda it: self._change_exclusively(it, to_do))

    @rule(place=places)
    def end(self, place: int) -> None:
        self.run(self._end(place))

    @rule(order=st.permutations(range(AT_ONCE)))
    def end_all(self, order: list[int]) -> None:
        """At once, as far as they can."""

        async def end() -> None:
            for place in order:
                await self._end(place)

        self.run(end())

    @invariant()
    def nothing_else_is_stored(self) -> None:
        async def read() -> None:
            assert await self._stored() == self.states[-1]

        if self.providers:
            self.runner.run(read())

    # -- what requests do -----------------------------------------------------------------

    def _do(self, place: int, work: Callable[[Request], Awaitable[None]]) -> None:
        async def begin() -> None:
            request = self.requests[place]
            if request is not None and not request.is_busy:
                request.task = asyncio.create_task(self._work(request, work))

        self.run(begin())

    async def _end(self, place: int) -> None:
        request = self.requests[place]
        if request is not None and not request.is_busy:
            request.task = asyncio.create_task(self._work(request, self._close))
            if not self._is_locked() or request.access == "exclusive":
                await request.task
                self.requests[place] = None

    async def _work(self, request: Request, work: Callable[[Request], Awaitable[None]]) -> None:
        current.set(request)
        request.committed = None
        await work(request)

    async def _save(self, request: Request) -> None:
        await request.session.save()
        self._has_stored(request)
        assert dict(request.session) == request.mine

    async def _close(self, request: Request) -> None:
        await request.closing.aclose()
        self._has_stored(request)
        request.access = "ended"

    def _has_stored(self, request: Request) -> None:
        """What it has now; and whatever it had changed is stored."""
        if request.committed is not None:
            request.load(self.states[request.committed], request.committed)
            return
        base, mine = request.base, request.mine
        if mine == base:
            return
        # Others have done the same before, key by key; its session shows what is stored since.
        since = range(request.place, len(self.states))
        for key in {*base, *mine}:
            assert any(
                self._merged(base, self.states[place], mine).get(key, ABSENT)
                == self.states[place].get(key, ABSENT)
                for place in since
            ), ("what it changed is not stored, and nobody was told", key)
        shown = [place for place in since if self.states[place] == dict(request.session)]
        assert shown, "a version that nobody has stored"
        request.load(self.states[shown[-1]], shown[-1])

    async def _change_exclusively(self, request: Request, to_do: list[Change]) -> None:
        async with request.session.exclusive() as session:
            before, place = self.states[-1], len(self.states) - 1
            assert dict(session) == before, "not what is stored, under the lock"
            mine = copy.deepcopy(before)
            request.block = before, mine
            for what, key in to_do:
                number = self._number()
                make(what, key, number, session)
                make(what, key, number, mine)
        request.block = None
        if request.committed is not None:
            place = request.committed
        assert self._merged(before, before, mine) == self.states[place]
        if request.mine == request.base:  # else it has still to be merged
            request.load(self.states[place], place)
        assert dict(request.session) == request.mine

    # -- what is stored -------------------------------------------------------------------

    async def _on_commit(self, _: Committed) -> None:
        request = current.get()
        assert request is not None
        base, mine = request.block or (request.base, request.mine)
        before, after = self.states[-1], await self._stored()
        expected = self._merged(base, before, mine)
        for key in {*expected, *after}:
            is_right = after.get(key, ABSENT) == expected.get(key, ABSENT)
            # Another had done the same before, and a third something else since: then this was
            # done when that was.
            was_done = any(
                state.get(key, ABSENT) == mine.get(key, ABSENT)
                for state in self.states[request.place :]
            )
            is_theirs = after.get(key, ABSENT) == before.get(key, ABSENT)
            assert is_right or (was_done and is_theirs), (key, base, before, mine, after)
        request.committed = len(self.states)
        self.states.append(after)

    def _merged(self, base: Values, theirs: Values, mine: Values) -> Values:
        merged = dict(theirs)
        for key in {*base, *mine}:
            three = [copy.deepcopy(it[key]) if key in it else ABSENT for it in (base, theirs, mine)]
            if three[0] == three[2]:
                continue
            value = three[2]
            if self.resolves and three[1] not in (three[0], three[2]):
                value = resolve(key, *three)
            merged.pop(key, None)
            if value is not ABSENT:
                merged[key] = value
        return merged

    async def _stored(self) -> Values:
        identity = identity_of(self.session_id)
        outcome = await self.grid.inner.read(identity.key, identity.secret)
        assert isinstance(outcome, Found)
        assert outcome.snapshot.payload is not None
        opened = self.providers[0].envelope.open(identity.key, outcome.snapshot.payload)
        return {key: payload.decode(segment) for key, segment in opened.items()}

    # -- who waits ------------------------------------------------------------------------

    def _is_locked(self) -> bool:
        return any(it is not None and it.access == "exclusive" for it in self.requests)

    async def _let_them_come_as_far_as_they_can(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0 if self.kind == "memory" else 0.0005)
        await self._forget_the_ended()

    async def _wait_for_all(self) -> None:
        """Nobody holds the lock: all that wait get it."""
        tasks = [it.task for it in self.requests if it is not None and it.task is not None]
        await asyncio.gather(*tasks)
        await self._forget_the_ended()

    async def _forget_the_ended(self) -> None:
        for place, request in enumerate(self.requests):
            if request is None or request.task is None or not request.task.done():
                continue
            await request.task  # what it failed with
            if request.access == "ended":
                self.requests[place] = None


def attack(kind: str, examples: int, steps: int) -> None:
    class Machine(Merges):
        pass

    Machine.kind = kind
    run_state_machine_as_test(
        Machine,
        settings=settings(
            deadline=None,
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.parametrize(("kind", "examples"), [("memory", 100), ("embedded", 20), ("redis", 20)])
def test_promise_5_no_change_is_lost_nor_undone(kind: str, examples: int) -> None:
    attack(kind, examples, steps=30)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["memory", "embedded", "redis"])
def test_no_change_is_lost_nor_undone_for_long(kind: str) -> None:
    attack(kind, 2_000, steps=60)
