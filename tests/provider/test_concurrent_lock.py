"""Concurrent requests that meet a lock, a block, an outage, or their own cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gridsession import (
    GridUnavailable,
    Session,
    SessionClosed,
    SessionLockTimeout,
    SessionProvider,
)
from tests.provider.harness import (
    OnTheWay,
    Outage,
    Spy,
    change,
    come_first,
    count,
    data_of,
    in_loop,
    is_free,
    provider_on,
    steps,
    stored,
    until,
)

# -- the lock -------------------------------------------------------------------------------------


async def in_line(grid: Spy, number: int = 1) -> None:
    await until(lambda: grid.in_line(number))


@in_loop
async def test_it_waits_for_who_holds_the_lock_and_merges_then(real_grid: Spy) -> None:
    async with provider_on(real_grid) as provider:
        session_id = await stored(provider, a=0, b=0)

        async def concurrently() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 1

        async with provider.open(session_id) as holder:
            holder["b"] = 1
            writing = asyncio.create_task(concurrently())
            await in_line(real_grid)
            assert not writing.done()
            holder["b"] = 2
        await writing
        assert await data_of(provider, session_id) == {"a": 1, "b": 2}
    assert await is_free(real_grid, session_id)


@in_loop
async def test_after_three_conflicts_it_takes_its_place_in_line(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            grid.calls.clear()
            grid.before = come_first(provider, session_id)
        grid.before = None
        assert grid.asked.count("commit_if") == 3
        assert grid.asked[-2:] == ["acquire", "commit"]
        assert await data_of(provider, session_id) == {"a": 1, "n": 3}
        assert (provider.merges, provider.key_conflicts) == (3, 0)
    assert await is_free(grid, session_id)


@in_loop
async def test_it_gives_up_after_the_lock_wait_timeout(real_grid: Spy) -> None:
    async with provider_on(real_grid, lock_wait_timeout=0.3) as provider:
        session_id = await stored(provider, a=0)
        async with provider.open(session_id):
            with pytest.raises(SessionLockTimeout):
                async with provider.open(session_id, access="concurrent") as session:
                    session["a"] = 1
        await real_grid.settle()
        assert await data_of(provider, session_id) == {"a": 0}
    assert await is_free(real_grid, session_id)


@in_loop
async def test_a_full_queue_refuses_no_commit(real_grid: Spy) -> None:
    async with provider_on(real_grid, request_queue_limit_per_session=1) as provider:
        session_id = await stored(provider, a=0, n=0)

        async def concurrently(key: str) -> None:
            async with (
                provider_on(real_grid) as worker,
                worker.open(session_id, access="concurrent") as session,
            ):
                session[key] = 1

        async def exclusively() -> None:
            async with provider.open(session_id) as session:
                session["n"] += 1

        async with provider.open(session_id):
            waiting = [asyncio.create_task(exclusively())]
            await in_line(real_grid, 1)
            for number, key in enumerate("abcd", 2):
                waiting.append(asyncio.create_task(concurrently(key)))
                await in_line(real_grid, number)
        await asyncio.gather(*waiting)
        assert await data_of(provider, session_id) == {
            "a": 1, "b": 1, "c": 1, "d": 1, "n": 1,
        }  # fmt: skip
    assert await is_free(real_grid, session_id)


@in_loop
async def test_a_worker_has_few_tickets_however_many_of_its_requests_wait_to_commit(
    real_grid: Spy,
) -> None:
    async with provider_on(real_grid) as provider:
        session_id = await stored(provider, n=0)

        async def concurrently(number: int) -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session[f"k{number}"] = number

        async with provider.open(session_id) as holder:
            holder["n"] = 1
            real_grid.calls.clear()
            waiting = [asyncio.create_task(concurrently(number)) for number in range(30)]
            await in_line(real_grid)
            await steps(50)
            asked = real_grid.calls.count("acquire")
            assert asked <= 8  # four tickets; at a Redis each asks again when it listens
        await asyncio.gather(*waiting)
        assert await data_of(provider, session_id) == {"n": 1} | {
            f"k{number}": number for number in range(30)
        }
    assert await is_free(real_grid, session_id)


@in_loop
async def test_all_that_wait_to_commit_give_up_after_the_lock_wait_timeout(
    real_grid: Spy,
) -> None:
    async with provider_on(real_grid, lock_wait_timeout=0.3) as provider:
        session_id = await stored(provider, n=0)

        async def concurrently(number: int) -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session[f"k{number}"] = number

        async with provider.open(session_id):
            began = asyncio.get_running_loop().time()
            outcomes = await asyncio.gather(*map(concurrently, range(5)), return_exceptions=True)
            assert asyncio.get_running_loop().time() - began < 1.2  # and not five times as long
        assert [type(outcome) for outcome in outcomes] == [SessionLockTimeout] * 5
        await real_grid.settle()
        assert await data_of(provider, session_id) == {"n": 0}
    assert await is_free(real_grid, session_id)


@in_loop
async def test_a_save_under_the_lock_gives_it_back(real_grid: Spy) -> None:
    async with provider_on(real_grid) as provider:
        session_id = await stored(provider, a=0, b=0)

        async def concurrently() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 1
                await session.save()
                assert await is_free(real_grid, session_id)
                await change(provider, session_id, b=7)
                session["a"] = 2

        async with provider.open(session_id):
            writing = asyncio.create_task(concurrently())
            await in_line(real_grid)
        await writing
        assert await data_of(provider, session_id) == {"a": 2, "b": 7}
    assert await is_free(real_grid, session_id)


# -- exclusive() inside ---------------------------------------------------------------------------


@in_loop
async def test_exclusive_inside_takes_the_lock_and_sees_what_is_stored(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            assert session["n"] == 0
            await change(provider, session_id, n=5)
            async with session.exclusive() as s:
                assert s["n"] == 5
                s["n"] += 1
            assert session["n"] == 6
            assert await is_free(grid, session_id)
        assert await data_of(provider, session_id) == {"n": 6}


@in_loop
async def test_counting_in_exclusive_loses_none(real_grid: Spy) -> None:
    async with provider_on(real_grid) as provider:
        session_id = await stored(provider, n=0)

        async def one(number: int) -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session[f"k{number}"] = number
                await count(session)

        await asyncio.gather(*map(one, range(12)))
        data = await data_of(provider, session_id)
        assert data == {"n": 12} | {f"k{number}": number for number in range(12)}


@in_loop
async def test_what_was_changed_around_a_block_is_merged_with_what_it_stored(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            async with session.exclusive() as s:
                assert s["a"] == 0  # not stored yet
                s["n"] += 1
        assert await data_of(provider, session_id) == {"a": 1, "n": 1}


@pytest.mark.parametrize("how", ["user", "timeout", "regenerate_id", "abandon"])
@in_loop
async def test_what_was_asked_for_ahead_of_a_block_is_not_forgotten(grid: Spy, how: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            match how:
                case "user":
                    session.user = "ann"
                case "timeout":
                    session.timeout = 50
                case _:
                    getattr(session, how)()
            async with session.exclusive() as s:
                s["n"] += 1
            await session.release()
            new_id = session_id if how in ("timeout", "abandon") else session.id
        assert (new_id != session_id) == (how in ("user", "regenerate_id"))
        async with provider.open(new_id, access="read_only") as session:
            assert session.is_new == (how == "abandon")
            assert session.user == ("ann" if how == "user" else None)
            assert session.timeout == (50.0 if how == "timeout" else 1200.0)
            assert session.get("n") == (None if how == "abandon" else 1)
    assert await is_free(grid, new_id)


@in_loop
async def test_the_request_itself_is_not_saved_inside_its_own_block(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            async with session.exclusive() as s:
                s["n"] += 1
                with pytest.raises(SessionClosed, match=r"Inside a block of"):
                    await session.save()
        assert await data_of(provider, session_id) == {"a": 1, "n": 1}
    assert await is_free(grid, session_id)


@in_loop
async def test_a_block_that_begins_the_session_is_stored_with_the_request(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None, access="concurrent") as session:
            session["a"] = 1
            async with session.exclusive() as s:
                s["n"] = 1
            session_id = session.id
        assert await data_of(provider, session_id) == {"a": 1, "n": 1}


@in_loop
async def test_a_block_that_ends_the_session(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0)
        async with provider.open(session_id, access="concurrent") as session:
            async with session.exclusive() as s:
                s.abandon()
            assert dict(session) == {}
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new


# -- failures and cancellation ------------------------------------------------------------------


@pytest.mark.parametrize("applied", [False, True], ids=["not applied", "applied"])
@in_loop
async def test_a_commit_without_an_answer_is_told(grid: Spy, applied: bool) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0)
        away = Outage("commit_if", times=2)
        if applied:
            grid.after = away
        else:
            grid.before = away
        with pytest.raises(GridUnavailable):
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 1
        assert await data_of(provider, session_id) == {"a": int(applied)}


@pytest.mark.parametrize("applied", [False, True], ids=["not applied", "applied"])
@in_loop
async def test_a_save_without_an_answer_is_stored_by_the_next(grid: Spy, applied: bool) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, b=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            away = Outage("commit_if", times=2)
            if applied:
                grid.after = away
            else:
                grid.before = away
            with pytest.raises(GridUnavailable):
                await session.save()
            await change(provider, session_id, b=2)
        assert await data_of(provider, session_id) == {"a": 1, "b": 2}
        assert provider.key_conflicts == 0


@pytest.mark.parametrize("applied", [False, True], ids=["not applied", "applied"])
@in_loop
async def test_what_was_taken_back_after_a_save_without_an_answer(grid: Spy, applied: bool) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            away = Outage("commit_if", times=2)
            if applied:
                grid.after = away
            else:
                grid.before = away
            with pytest.raises(GridUnavailable):
                await session.save()
            session["a"] = 0
        assert await data_of(provider, session_id) == {"a": 0}
        assert provider.key_conflicts == 0


@in_loop
async def test_what_a_save_stored_under_the_lock_is_not_counted_twice(real_grid: Spy) -> None:
    """Its answer was lost, and the next commit meets what it left."""
    add = lambda key, base, theirs, mine: theirs + mine - base  # noqa: E731
    async with provider_on(real_grid, on_conflict=add) as provider:
        session_id = await stored(provider, n=10)
        async with provider.open(session_id, access="concurrent") as session:
            session["n"] += 1

            async def save() -> None:
                with pytest.raises(GridUnavailable):
                    await session.save()

            async with provider.open(session_id):
                saving = asyncio.create_task(save())
                await in_line(real_grid)
                real_grid.after = Outage("commit", times=1)
            await saving
        assert await data_of(provider, session_id) == {"n": 11}
    assert await is_free(real_grid, session_id)


@pytest.mark.parametrize("way", ["there", "back"])
@in_loop
async def test_a_cancelled_commit_stands_or_is_told(
    grid: Spy, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0)

        async def write() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 1

        on_the_way = OnTheWay(grid, "commit_if", way)
        writing = asyncio.create_task(write())
        await on_the_way.reached.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await grid.settle()
        assert await data_of(provider, session_id) == {"a": 1}
        assert not caplog.records


@pytest.mark.parametrize("applied", [False, True], ids=["not applied", "applied"])
@in_loop
async def test_a_commit_whose_answer_was_lost_is_asked_about(grid: Spy, applied: bool) -> None:
    def on_conflict(*_: object) -> object:
        raise AssertionError("it does not conflict with itself")

    async with provider_on(grid, on_conflict=on_conflict) as provider:
        session_id = await stored(provider, a=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            away = Outage("commit_if", times=1)
            if applied:
                grid.after = away
            else:
                grid.before = away
        assert away.failed == 1
        assert await data_of(provider, session_id) == {"a": 1}


@pytest.mark.parametrize("others", [7, 8])
@in_loop
async def test_promise_5_a_commit_is_not_put_upon_itself(grid: Spy, others: int) -> None:
    """It was stored, its answer was lost, and others have committed since: more than the grid
    remembers, and nobody knows any more whether it was.
    """
    add = lambda key, base, theirs, mine: theirs + mine  # noqa: E731
    async with provider_on(grid, on_conflict=add) as provider:
        session_id = await stored(provider, log=[])

        async def lose(name: str) -> None:
            if name == "commit_if":
                grid.after = None
                for number in range(others):
                    await change(provider, session_id, **{f"k{number}": number})
                raise GridUnavailable("the answer was lost")

        async def append() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["log"].append("mine")
                grid.after = lose

        if others == 8:
            with pytest.raises(GridUnavailable, match="not known"):
                await append()
        else:
            await append()
        assert (await data_of(provider, session_id))["log"] == ["mine"]
    assert await is_free(grid, session_id)


@in_loop
async def test_a_cancelled_commit_that_comes_too_late_is_told(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, b=0)

        async def write() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 1
                await change(provider, session_id, b=1)

        on_the_way = OnTheWay(grid, "commit_if")
        writing = asyncio.create_task(write())
        await on_the_way.reached.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await grid.settle()
        assert await data_of(provider, session_id) == {"a": 0, "b": 1}
        assert "the work of a cancelled request was not stored" in caplog.text


@in_loop
async def test_promise_7_cancelled_at_any_step_it_leaves_no_lock_and_no_half(grid: Spy) -> None:
    """At each step of a request that meets a conflict each time and takes the lock in the end."""
    for stop_at in range(40):
        async with provider_on(grid) as provider:
            session_id = await stored(provider, a=0, b=0, n=0)
            writing = asyncio.create_task(_contended(provider, grid, session_id))
            await steps(stop_at * 2)
            done = writing.done()
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing
            grid.before = None
            await grid.settle()
            await until(lambda: not provider._work or _is_idle(provider))
            data = await data_of(provider, session_id)
            assert data["a"] == data["b"]
            if done:
                assert data["a"] == 1
        assert await is_free(grid, session_id)


def _is_idle(provider: SessionProvider) -> bool:
    return all(not work._tasks for work in provider._work.values())


async def _contended(provider: SessionProvider, grid: Spy, session_id: str) -> None:
    async with provider.open(session_id, access="concurrent") as session:
        session["a"] = session["b"] = 1
        grid.before = come_first(provider, session_id)


@in_loop
async def test_a_request_given_up_while_its_save_waits_in_line_stores_nothing(
    real_grid: Spy,
) -> None:
    async with provider_on(real_grid) as provider:
        session_id = await stored(provider, a=0)
        saving: list[asyncio.Task[None]] = []

        async def give_up() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 1
                saving.append(asyncio.create_task(_save(session)))
                await in_line(real_grid)
                raise ZeroDivisionError

        async with provider.open(session_id):
            with pytest.raises(ZeroDivisionError):
                await give_up()
        with pytest.raises(SessionClosed):
            await saving[0]
        await real_grid.settle()
        assert await data_of(provider, session_id) == {"a": 0}
    assert await is_free(real_grid, session_id)


async def _save(session: Session) -> None:
    await session.save()
