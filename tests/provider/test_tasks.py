"""What the tasks of one request do with its session at once: they take turns."""

# ruff: noqa: PT012 - what is raised comes from the end of a block, after the statements in it

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from gridsession import (
    Session,
    SessionClosed,
    SessionLockLost,
    SessionLockTimeout,
    SessionReplaced,
)
from gridsession.testing import ManualClock
from tests.provider.harness import (
    OnTheWay,
    Spy,
    count,
    data_of,
    in_loop,
    is_free,
    make_grid,
    provider_on,
    steps,
    stored,
    until,
)

BOTH = pytest.mark.parametrize("access", ["exclusive", "read_only"])
WAYS = pytest.mark.parametrize("way", ["there", "back"])


async def transfer(session: Session, begun: asyncio.Event) -> None:
    """Two changes, of which none is to be stored without the other."""
    async with session.exclusive() as s:
        s["a"] -= 10
        begun.set()
        await steps(20)
        s["b"] += 10


async def never_end(session: Session, begun: asyncio.Event) -> None:
    async with session.exclusive() as s:
        s["a"] -= 10
        begun.set()
        await asyncio.Event().wait()


# -- tasks take turns -----------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@in_loop
async def test_tasks_of_one_request_take_turns_at_exclusive(
    grid: Spy, held: bool, loop: str
) -> None:
    """As the tasks of a WebSocket do: one reads, one writes, one beats."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0, list=[])
        async with provider.open(session_id, access="read_only") as session:

            async def count(number: int) -> None:
                async with session.exclusive() as s:
                    n = s["n"]
                    await asyncio.sleep(0.001)
                    s["n"] = n + 1
                    s["list"].append(number)
                    async with session.exclusive() as inner:
                        inner["n"] += 1
                    if number == 2:
                        await s.release()
                        async with session.exclusive() as again:
                            again["n"] += 1

            async with asyncio.TaskGroup() as tasks:
                other = provider.open(session_id) if held else contextlib.nullcontext()
                async with other:
                    counting = [tasks.create_task(count(number)) for number in range(4)]
                    leaving = tasks.create_task(count(99))
                    await asyncio.sleep(0.002)
                    leaving.cancel()
            assert all(task.exception() is None for task in counting)
            assert session.is_read_only
        data = await data_of(provider, session_id)
        assert data == {"n": 9, "list": [0, 1, 2, 3]}
        assert await is_free(grid, session_id)


@in_loop
async def test_a_task_that_a_block_started_is_inside_it(grid: Spy) -> None:
    """`asyncio.wait_for` makes such tasks."""
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, n=0)
        for access in ("read_only", "exclusive"):
            async with provider.open(session_id, access=access) as session:

                async def child(session: Session = session) -> None:
                    async with session.exclusive() as s:
                        s["n"] += 1

                async with session.exclusive() as s:
                    s["n"] += 1
                    await asyncio.wait_for(child(), 5)
                    s["n"] += 1
        assert await data_of(provider, session_id) == {"n": 6}


@in_loop
async def test_a_task_beside_anothers_block_waits_no_longer_than_for_a_lock(grid: Spy) -> None:
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id) as session:

            async def beside() -> None:
                with pytest.raises(SessionLockTimeout, match=r"Another task.*after 0\.1 s"):
                    async with session.exclusive():
                        raise AssertionError("the block ran")

            waiting = asyncio.create_task(beside())  # made before the block: not within it
            async with session.exclusive() as s:
                s["n"] = 1
                await waiting
                s["n"] = 2
        assert await data_of(provider, session_id) == {"n": 2}


@in_loop
async def test_promise_5_tasks_of_a_request_that_holds_the_lock_take_turns(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id) as session:
            await asyncio.gather(*(count(session) for _ in range(5)))
        assert await data_of(provider, session_id) == {"n": 5}


@BOTH
@in_loop
async def test_promise_5_tasks_that_one_block_started_take_turns(grid: Spy, access: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access=access) as session, session.exclusive():
            await asyncio.gather(*(count(session) for _ in range(5)))
        assert await data_of(provider, session_id) == {"n": 5}


@BOTH
@in_loop
async def test_promise_5_by_whichever_session_they_ask_for_it(grid: Spy, access: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access=access) as session, session.exclusive() as s:
            await asyncio.gather(count(s), count(session), count(s), count(session))
            assert s["n"] == 4
        assert await data_of(provider, session_id) == {"n": 4}


@BOTH
@in_loop
async def test_promise_5_tasks_of_a_task_of_a_block_take_turns(grid: Spy, access: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)

        async def family(session: Session) -> None:
            async with session.exclusive() as s:
                before = s["n"]
                await asyncio.gather(count(session), count(session))
                assert s["n"] == before + 2  # nobody else's has come in between

        async with provider.open(session_id, access=access) as session, session.exclusive():
            await asyncio.gather(family(session), count(session), family(session))
        assert await data_of(provider, session_id) == {"n": 5}


@BOTH
@in_loop
async def test_promise_5_tasks_of_a_block_whose_lock_one_gave_back_take_turns(
    grid: Spy, access: str
) -> None:
    async with provider_on(grid, lock_wait_timeout=0.2) as provider:
        session_id = await stored(provider, n=0)

        async def count_twice(session: Session) -> None:
            async with session.exclusive() as s:
                s["n"] += 1
                await steps(3)  # the other waits for its turn meanwhile
                await s.release()
            await count(session)

        async with provider.open(session_id, access=access) as session, session.exclusive():
            await asyncio.gather(count_twice(session), count_twice(session))
        assert await data_of(provider, session_id) == {"n": 4}
        assert await is_free(grid, session_id)


@in_loop
async def test_a_task_beside_anothers_block_that_logs_in_comes_with_the_new_id(grid: Spy) -> None:
    """It waits with the id that the other shuts out, and both are one browser's."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="read_only") as session:

            async def log_in() -> None:
                async with session.exclusive() as s:
                    await until(lambda: "wait" in grid.calls)
                    s.user = "ann"

            await asyncio.gather(log_in(), count(session))
            assert (session.user, session["n"]) == ("ann", 1)
        assert await data_of(provider, session.id) == {"n": 1}


@in_loop
async def test_a_task_may_log_in_that_waited_while_another_replaced_the_id(grid: Spy) -> None:
    """It comes with the id that was replaced, but in the same request: it is no stranger."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="read_only") as session:

            async def replace() -> None:
                async with session.exclusive() as s:
                    await until(lambda: "wait" in grid.calls)
                    s["n"] += 1
                    s.regenerate_id()

            async def log_in() -> None:
                async with session.exclusive() as s:
                    s["n"] += 1
                    s.user = "ann"

            await asyncio.gather(replace(), log_in())
            assert (session.user, session["n"]) == ("ann", 2)
        assert await data_of(provider, session.id) == {"n": 2}
        assert await is_free(grid, session.id)


@in_loop
async def test_a_task_may_not_that_waited_while_another_request_replaced_the_id(grid: Spy) -> None:
    """Nor where its own request had replaced it before: what it knows is not the newest."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="read_only") as session:
            replaced = asyncio.Event()

            async def replace() -> None:
                async with session.exclusive() as s:
                    await until(lambda: "wait" in grid.calls)
                    s.regenerate_id()
                replaced.set()

            async def log_in() -> None:
                with pytest.raises(SessionReplaced):
                    async with session.exclusive() as s:
                        s.user = "ann"

            async def another_request() -> None:
                async with provider.open(session_id) as other:
                    await replaced.wait()
                    other["n"] = 1
                    other._replaced = False  # as one that came with the newest
                    other.regenerate_id()

            replacing = asyncio.create_task(replace())
            await steps(5)
            other = asyncio.create_task(another_request())
            await steps(5)
            await asyncio.gather(replacing, other, log_in())
        assert await is_free(grid, session_id)


@pytest.mark.parametrize("change", ["user", "id"])
@in_loop
async def test_a_block_that_was_released_comes_with_its_requests_id(grid: Spy, change: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="read_only") as session:

            async def replace() -> None:
                async with session.exclusive() as s:
                    if change == "user":
                        s.user = "ann"
                    else:
                        s.regenerate_id()

            async with session.exclusive() as s:
                await s.release()
                await asyncio.create_task(replace())
                async with s.exclusive() as again:
                    again["n"] += 1
                    again.user = "bob"
                assert s.id == session.id != session_id
            assert (session.user, session["n"]) == ("bob", 1)
        assert await data_of(provider, session.id) == {"n": 1}


@pytest.mark.parametrize("first", ["fails", "reads"])
@in_loop
async def test_a_request_keeps_the_newest_of_what_its_blocks_saw(grid: Spy, first: str) -> None:
    """The first one's release is answered when the other has stored already."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)

        async def answer_late(name: str) -> None:
            if name == "release":
                await until(counting.done)

        async with provider.open(session_id, access="read_only") as session:

            async def be_first() -> None:
                with contextlib.suppress(ZeroDivisionError):
                    async with session.exclusive():
                        await until(lambda: "wait" in grid.calls)
                        if first == "fails":
                            raise ZeroDivisionError

            grid.after = answer_late
            going_first = asyncio.create_task(be_first())
            counting = asyncio.create_task(count(session))
            await asyncio.gather(going_first, counting)
            assert session["n"] == 1
        assert await data_of(provider, session_id) == {"n": 1}


@pytest.mark.parametrize("what", ["save", "end"])
@in_loop
async def test_headers_do_not_wait_for_what_cannot_change_the_id(grid: Spy, what: str) -> None:
    """Nor for one such after the other: a task might save for as long as it lives."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="read_only") as session:

            async def go_on() -> None:
                async with session.exclusive() as s:
                    s["n"] = 1
                    if what == "save":
                        await s.save()

            commit = OnTheWay(grid, "commit")
            task = asyncio.create_task(go_on())
            await commit.reached.wait()
        assert not task.done()
        await task
        assert await data_of(provider, session_id) == {"n": 1}


@BOTH
@in_loop
async def test_a_block_waits_for_blocks_inside_it(grid: Spy, access: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=100, b=0)
        begun = asyncio.Event()
        async with provider.open(session_id, access=access) as session:
            async with session.exclusive() as s:
                child = asyncio.create_task(transfer(session, begun))
                await begun.wait()
            assert s["b"] == 10
            await child
        assert await data_of(provider, session_id) == {"a": 90, "b": 10}


@BOTH
@in_loop
async def test_a_block_waits_no_longer_than_for_a_lock_for_blocks_inside_it(
    grid: Spy, access: str
) -> None:
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, a=100, b=0)
        begun = asyncio.Event()
        with pytest.raises(SessionLockTimeout, match=r"Another task.*after 0\.1 s"):
            async with (
                provider.open(session_id, access=access) as session,
                session.exclusive() as s,
            ):
                child = asyncio.create_task(never_end(session, begun))
                await begun.wait()
                s["b"] += 10
        assert await data_of(provider, session_id) == {"a": 100, "b": 0}
        assert await is_free(grid, session_id)
        child.cancel()


# -- the end, and the blocks of other tasks -------------------------------------------------------


@pytest.mark.parametrize("member", ["end", "save", "release"])
@in_loop
async def test_nothing_is_stored_of_half_a_block(grid: Spy, member: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=100, b=0)
        begun = asyncio.Event()
        async with provider.open(session_id) as session:
            task = asyncio.create_task(transfer(session, begun))
            await begun.wait()
            if member != "end":
                await getattr(session, member)()
                assert await data_of(provider, session_id) == {"a": 90, "b": 10}
        assert await data_of(provider, session_id) == {"a": 90, "b": 10}
        await task
        assert await is_free(grid, session_id)


@in_loop
async def test_nothing_is_stored_of_half_a_block_in_a_block_that_failed(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=100, b=0)
        begun = asyncio.Event()
        async with provider.open(session_id) as session:
            with contextlib.suppress(ZeroDivisionError):
                async with session.exclusive():
                    task = asyncio.create_task(transfer(session, begun))
                    await begun.wait()
                    raise ZeroDivisionError
        assert await data_of(provider, session_id) == {"a": 90, "b": 10}
        await task
        assert await is_free(grid, session_id)


@BOTH
@pytest.mark.parametrize("member", ["save", "release"])
@in_loop
async def test_nothing_is_stored_of_half_a_block_by_the_block_around_it(
    grid: Spy, member: str, access: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=100, b=0)
        begun = asyncio.Event()
        async with provider.open(session_id, access=access) as session, session.exclusive() as s:
            task = asyncio.create_task(transfer(session, begun))
            await begun.wait()
            await getattr(s, member)()
            assert await data_of(provider, session_id) == {"a": 90, "b": 10}
            await task
        assert await is_free(grid, session_id)


@in_loop
async def test_a_block_that_never_ends_fails_the_end_and_not_the_next_request(grid: Spy) -> None:
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, a=100, b=0)
        begun = asyncio.Event()
        with pytest.raises(SessionLockTimeout, match=r"Another task.*after 0\.1 s"):
            async with provider.open(session_id) as session:
                session["b"] = 10
                stuck = asyncio.create_task(never_end(session, begun))
                await begun.wait()
        assert await is_free(grid, session_id)
        with pytest.raises(SessionClosed):
            session["b"] = 20
        stuck.cancel()
        await asyncio.wait((stuck,))
        assert await data_of(provider, session_id) == {"a": 100, "b": 0}


@pytest.mark.parametrize("cause", ["exception", "time-out"])
@in_loop
async def test_promise_4_a_block_whose_request_is_given_up_is_told(grid: Spy, cause: str) -> None:
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, log=[])
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def work(session: Session) -> None:
            async with session.exclusive() as s:
                s["log"].append("work")
                begun.set()
                await go_on.wait()

        with pytest.raises(ZeroDivisionError if cause == "exception" else SessionLockTimeout):
            async with provider.open(session_id) as session:
                task = asyncio.create_task(work(session))
                await begun.wait()
                if cause == "exception":
                    raise ZeroDivisionError
        go_on.set()
        with pytest.raises(SessionClosed, match="given up while this block"):
            await task
        assert await data_of(provider, session_id) == {"log": []}


@in_loop
async def test_who_waits_for_a_turn_as_the_end_comes_has_it(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        held = asyncio.Event()
        under_the_requests_lock: list[bool] = []

        async def hold(session: Session) -> None:
            async with session.exclusive():
                held.set()
                await steps(20)

        async def count_after(moments: int, session: Session) -> None:
            await held.wait()
            await steps(moments)
            async with session.exclusive() as s:
                under_the_requests_lock.append(s is session)
                await count(session)

        async with provider.open(session_id) as session:
            tasks = [
                asyncio.create_task(hold(session)),
                asyncio.create_task(count_after(0, session)),
                asyncio.create_task(count_after(10, session)),
            ]
            await held.wait()
            await steps(5)
        await asyncio.gather(*tasks)
        assert under_the_requests_lock == [True, False]  # ahead of the end, and after it
        assert await data_of(provider, session_id) == {"n": 2}
        assert await is_free(grid, session_id)


@in_loop
async def test_a_block_that_outlives_its_request_keeps_its_own_lock_and_commits(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        entered, ended = asyncio.Event(), asyncio.Event()

        async def beside(session: Session) -> None:
            async with session.exclusive() as s:
                s["n"] = -1
                entered.set()
                await ended.wait()
                s["n"] = 7

        async with provider.open(session_id) as session:
            session["n"] = 1
            await session.release()
            task = asyncio.create_task(beside(session))
            await entered.wait()
        async with provider.open(session_id, access="read_only") as reader:
            assert reader["n"] == 1  # nothing of a block that is still open
        ended.set()
        await task
        assert await data_of(provider, session_id) == {"n": 7}
        assert await is_free(grid, session_id)


# -- while the end's commit is on its way ---------------------------------------------------------


@WAYS
@in_loop
async def test_a_block_that_comes_while_the_end_is_stored_has_a_lock_of_its_own(
    grid: Spy, way: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        commit = OnTheWay(grid, "commit", way)

        async def come_late(session: Session) -> None:
            await commit.reached.wait()
            async with session.exclusive() as s:
                assert s is not session
                s["late"] = s["n"]

        async with provider.open(session_id) as session:
            task = asyncio.create_task(come_late(session))
            session["n"] = 1
        await task
        assert await data_of(provider, session_id) == {"n": 1, "late": 1}
        assert await is_free(grid, session_id)


async def change(session: Session, how: str) -> None:
    match how:
        case "value":
            session["late"] = True
        case "user":
            session.user = "ann"
        case "timeout":
            session.timeout = 77.0
        case "save":
            await session.save()
        case _:
            getattr(session, how)()


@WAYS
@pytest.mark.parametrize(
    "how", ["value", "user", "timeout", "regenerate_id", "clear", "abandon", "save"]
)
@in_loop
async def test_promise_4_what_is_changed_while_the_end_is_stored_is_told(
    grid: Spy, how: str, way: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        commit = OnTheWay(grid, "commit", way)

        async def come_late(session: Session) -> None:
            await commit.reached.wait()
            with pytest.raises(SessionClosed, match="committed and unlocked already"):
                await change(session, how)

        async with provider.open(session_id) as session:
            task = asyncio.create_task(come_late(session))
            timeout = session.timeout
            session["n"] = 1
        await task
        assert grid.asked.count("commit") == 1
        async with provider.open(session_id) as again:
            assert (again.user, again.timeout, dict(again)) == (None, timeout, {"n": 1})
        assert session.id == session_id


@WAYS
@pytest.mark.parametrize("first", ["release", "end"])
@in_loop
async def test_release_and_the_end_at_once_store_once(grid: Spy, first: str, way: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        commit = OnTheWay(grid, "commit", way)

        async def release(session: Session) -> None:
            if first == "end":
                await commit.reached.wait()
            await session.release()

        async with provider.open(session_id) as session:
            session["n"] = 1
            task = asyncio.create_task(release(session))
            if first == "release":
                await commit.reached.wait()
        await task
        assert grid.asked.count("commit") == 1
        assert await data_of(provider, session_id) == {"n": 1}
        assert await is_free(grid, session_id)


@in_loop
async def test_nothing_overlaps_an_end_that_waits_for_the_disk(tmp_path: Path) -> None:
    grid = Spy(make_grid("durable", tmp_path))
    on_its_way = asyncio.Event()

    async def note(name: str) -> None:
        if name == "commit":
            on_its_way.set()

    grid.before = note
    try:
        async with provider_on(grid) as provider:
            session_id = await stored(provider, n=0)

            async def come_late(session: Session) -> None:
                await on_its_way.wait()
                assert "commit" not in dict(grid.outcomes)
                for how in ("value", "user", "abandon", "save"):
                    with pytest.raises(SessionClosed):
                        await change(session, how)
                await session.release()
                async with session.exclusive() as s:
                    s["late"] = s["n"]

            async with provider.open(session_id) as session:
                task = asyncio.create_task(come_late(session))
                session["n"] = 1
            await task
            assert await data_of(provider, session_id) == {"n": 1, "late": 1}
            assert await is_free(grid, session_id)
    finally:
        await grid.inner.close()


# -- save() beside other tasks, and after a lost lock ---------------------------------------------


@WAYS
@in_loop
async def test_two_tasks_that_save_a_new_session_make_one(grid: Spy, way: str) -> None:
    async with provider_on(grid) as provider:
        OnTheWay(grid, "create", way)

        async def put(session: Session, key: str) -> None:
            session[key] = 1
            await session.save()

        async with provider.open(None) as session:
            await asyncio.gather(put(session, "a"), put(session, "b"))
            assert await data_of(provider, session.id) == {"a": 1, "b": 1}
            assert not await is_free(grid, session.id)
            session["c"] = 1
        assert grid.asked.count("create") == 1
        assert await data_of(provider, session.id) == {"a": 1, "b": 1, "c": 1}
        assert await is_free(grid, session.id)


@WAYS
@pytest.mark.parametrize("how", ["value", "user", "timeout", "regenerate_id"])
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "stored"])
@in_loop
async def test_what_is_changed_while_a_save_is_on_its_way_is_stored_by_the_end(
    grid: Spy, is_new: bool, how: str, way: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = None if is_new else await stored(provider, n=0)
        call = OnTheWay(grid, "create" if is_new else "commit", way)
        async with provider.open(session_id) as session:
            session["n"] = 1
            saving = asyncio.create_task(session.save())
            await call.reached.wait()
            await change(session, how)
            await saving
            saved_as, timeout = session.id, session.timeout
        async with provider.open(session.id) as again:
            assert again.get("late", False) is (how == "value")
            assert again.user == ("ann" if how == "user" else None)
            assert again.timeout == timeout == (77.0 if how == "timeout" else provider.timeout)
            assert (again.id != saved_as) is (how in ("user", "regenerate_id"))


@WAYS
@in_loop
async def test_a_new_session_that_is_saved_as_its_request_fails_leaves_no_lock(
    grid: Spy, way: str
) -> None:
    async with provider_on(grid) as provider:
        create = OnTheWay(grid, "create", way)
        with pytest.raises(ZeroDivisionError):
            async with provider.open(None) as session:
                session["n"] = 1
                saving = asyncio.create_task(session.save())
                await create.reached.wait()
                session_id = session.id
                raise ZeroDivisionError
        with pytest.raises(SessionClosed):
            await saving
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert await is_free(grid, session_id)


@in_loop
async def test_a_lost_lock_that_save_has_told_of_is_not_told_again(
    grid: Spy, clock: ManualClock
) -> None:
    async with provider_on(grid, lock_lease=15) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as hung:
            clock.advance(15.1)
            async with provider.open(session_id) as other:
                other["b"] = 2
            hung["a"] = 3
            with pytest.raises(SessionLockLost):
                await hung.save()
            hung["a"] = 1  # undone: so nothing of it is lost
        assert await data_of(provider, session_id) == {"a": 1, "b": 2}
        assert await is_free(grid, session_id)
