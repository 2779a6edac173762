"""Concurrent requests that meet one another's endings, lost answers, and their own giving up."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from gridsession import (
    GridFull,
    GridUnavailable,
    Session,
    SessionClosed,
    SessionProvider,
    SessionReplaced,
    SettingsError,
)
from gridsession.access import Use
from gridsession.grids.memory import MemoryGrid
from gridsession.provider.bearer import Cookie
from gridsession.provider.visit import Visit
from gridsession.testing import ManualClock
from tests.provider.harness import (
    Outage,
    Spy,
    change,
    come_first,
    data_of,
    in_loop,
    is_free,
    provider_on,
    run,
    steps,
    stored,
    until,
)


async def fail_to_save(session: Session, grid: Spy, name: str = "commit_if") -> None:
    """Save, and get no answer, neither to the commit nor to its repetition; it is stored."""
    grid.after = Outage(name, times=2)
    with pytest.raises(GridUnavailable):
        await session.save()
    grid.after = None


# -- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["exclusive", "concurrent"])
@in_loop
async def test_of_two_that_replace_the_id_the_later_does_not(
    grid: Spy, clock: ManualClock, other: str
) -> None:
    """Its answer carries no cookie: the browser has the first one's, which has to stay good."""
    async with provider_on(grid) as provider, provider_on(grid) as another:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session.regenerate_id()
            session["mine"] = 1
            async with another.open(session_id, access=other) as theirs:
                theirs.regenerate_id()
                await theirs.release()
                new_id = theirs.id
        clock.advance(11.0)
        assert await data_of(another, new_id) == {"n": 0, "mine": 1}
    assert await is_free(grid, new_id)


@in_loop
async def test_an_id_that_is_not_good_any_more_ends_nobodys_session(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        new_ids: list[str] = []

        async def abandon() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session.abandon()
                async with provider.open(session_id) as other:
                    other.user = "bob"
                    await other.release()
                    new_ids.append(other.id)

        with pytest.raises(SessionReplaced):
            await abandon()
        assert await data_of(provider, new_ids[0]) == {"n": 0}


@in_loop
async def test_a_logout_beside_a_new_id_is_a_logout(grid: Spy) -> None:
    async with provider_on(grid) as provider, provider_on(grid) as another:
        session_id = await stored(provider, user="bob", n=0)
        async with provider.open(session_id, access="concurrent") as session:
            async with another.open(session_id) as other:
                other.regenerate_id()
                other["x"] = 1
                await other.release()
                new_id = other.id
            session.clear()
        async with provider.open(new_id, access="read_only") as session:
            assert (session.user, dict(session)) == (None, {"x": 1})


@pytest.mark.parametrize("how", ["clear", "abandon"])
@in_loop
async def test_a_logout_that_was_anothers_empties_the_cache(grid: Spy, how: str) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            async with provider_on(grid) as another, another.open(session_id) as other:
                other.abandon()
            await data_of(provider, session_id)
            getattr(session, how)()
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new


@in_loop
async def test_what_is_cleared_and_saved_is_removed_at_the_end(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session.clear()
            await session.save()
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new


@in_loop
async def test_a_late_repetition_does_not_renew_the_cookie(grid: Spy) -> None:
    """Another may have given the session a new id since it was stored."""
    async with provider_on(grid) as provider, provider_on(grid) as another:
        session_id = await stored(provider, n=0)
        visit = Visit(provider, session_id.encode(), Use.parse("concurrent"), "a test")
        await visit.begin()
        visit.session["n"] = 1

        async def lose(name: str) -> None:
            if name == "commit_if":
                grid.after = None
                async with another.open(session_id) as other:
                    other.user = "ann"
                raise GridUnavailable("the answer was lost")

        grid.after = lose
        await visit.end()
        assert visit.cookie_to_send(visit.session, rolling=True) is Cookie.KEEP


@pytest.mark.parametrize("how", ["clear", "abandon"])
@in_loop
async def test_two_logouts_at_once_are_one(grid: Spy, how: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, user="bob", n=0)

        async def log_out() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                await steps(3)
                getattr(session, how)()

        await asyncio.gather(log_out(), log_out())
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new


@in_loop
async def test_the_cache_gives_nothing_to_an_id_that_the_grid_refused(grid: Spy) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await stored(provider, n=0)
        async with provider_on(grid) as another, another.open(session_id) as other:
            other.user = "bob"
        for _ in range(2):
            with pytest.raises(SessionReplaced):
                async with provider.open(session_id):
                    raise AssertionError("the block ran")
            with pytest.raises(SessionReplaced):
                await data_of(provider, session_id)


# -- lost answers ---------------------------------------------------------------------------------


@in_loop
async def test_what_was_taken_back_ahead_of_a_block_is_as_if_the_answer_had_come(
    grid: Spy,
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["n"] = 1
            await fail_to_save(session, grid)
            session["n"] = 0
            async with session.exclusive() as s:
                s["n"] = 10
                s["new"] = 1
            await session.save()
            assert (session["n"], session["new"]) == (0, 1)  # outside a block comes after it
            session["n"] += 1
        assert await data_of(provider, session_id) == {"n": 1, "new": 1}


@in_loop
async def test_what_a_save_without_an_answer_stored_is_taken_back_after_a_block(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["n"] = 1
            await fail_to_save(session, grid)
            session["n"] = 0
            async with session.exclusive() as s:
                s["new"] = 1
        assert await data_of(provider, session_id) == {"n": 0, "new": 1}


@in_loop
async def test_a_save_cancelled_under_the_lock_is_settled(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, count=0, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["count"] = 1
            come, under_way = come_first(provider, session_id, times=3), asyncio.Event()

            async def come_unhindered(name: str) -> None:
                after, grid.after = grid.after, None
                await come(name)
                grid.after = after

            async def hang(name: str) -> None:
                if name == "commit":
                    under_way.set()
                    await asyncio.sleep(3600)

            grid.before, grid.after = come_unhindered, hang
            saving = asyncio.create_task(_save(session))
            await under_way.wait()
            saving.cancel()
            await asyncio.wait([saving])
            grid.before = grid.after = None
            session["count"] = 0
        assert (await data_of(provider, session_id))["count"] == 0
    assert await is_free(grid, session_id)


@in_loop
async def test_a_repetition_brings_no_older_version_into_the_cache(grid: Spy) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["n"] = 1
            await fail_to_save(session, grid)
            await change(provider, session_id, n=2)
        assert await data_of(provider, session_id) == {"n": 2}


@pytest.mark.parametrize("back", [True, False], ids=["taken back", "counted on"])
@in_loop
async def test_a_save_under_the_lock_without_an_answer_is_settled(grid: Spy, back: bool) -> None:
    add = lambda key, base, theirs, mine: theirs + mine - base  # noqa: E731
    async with provider_on(grid, on_conflict=add) as provider:
        session_id = await stored(provider, count=0, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["count"] = 1
            come = come_first(provider, session_id, times=3)

            async def come_unhindered(name: str) -> None:
                after, grid.after = grid.after, None
                await come(name)
                grid.after = after

            grid.before = come_unhindered
            await fail_to_save(session, grid, "commit")
            grid.before = None
            await grid.settle()
            if back:
                session["count"] = 0
            else:
                await change(provider, session_id, n=99)
                session["count"] += 1
        assert await data_of(provider, session_id) == (
            {"count": 0, "n": 3} if back else {"count": 2, "n": 99}
        )
    assert await is_free(grid, session_id)


@in_loop
async def test_what_was_too_large_for_the_grid_is_not_repeated(
    grid: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = grid.inner.commit_if

    async def commit_if(key: bytes, secret: bytes, base: Any, change: Any) -> Any:
        if len(change.payload) > 1000:
            raise GridFull
        return await ask(key, secret, base, change)

    monkeypatch.setattr(grid.inner, "commit_if", commit_if)
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["large"] = "x" * 5000
            with pytest.raises(GridFull):
                await session.save()
            del session["large"]
            session["n"] = 1
        assert await data_of(provider, session_id) == {"n": 1}


def test_what_a_fail_over_took_back_is_stored_again() -> None:
    """This worker believes that it is stored; the grid is asked all the same."""

    async def main() -> None:
        grid = Spy(MemoryGrid())
        assert isinstance(grid.inner, MemoryGrid)
        table = grid.inner._table
        async with provider_on(grid) as provider:
            session_id = await stored(provider, n=0)
            async with provider.open(session_id, access="concurrent") as session:
                kept = copy.deepcopy((table._records, table._payloads))
                async with provider.open(session_id) as other:
                    other["n"] = 7
                table._records, table._payloads = kept
                session["n"] = 7
            assert await data_of(provider, session_id) == {"n": 7}

    run(main())


# -- given up -------------------------------------------------------------------------------------


@in_loop
async def test_promise_4_a_commit_cancelled_in_line_is_told(
    real_grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(real_grid) as provider:
        session_id = await stored(provider, n=0)
        told: list[BaseException] = []

        async def write() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["n"] = 1
                releasing = asyncio.create_task(session.release())
                await until(lambda: real_grid.in_line(1))
                releasing.cancel()
                await asyncio.wait([releasing])

        async with provider.open(session_id):
            with pytest.raises(SessionClosed) as error:
                await write()
            told.append(error.value)
        await real_grid.settle()
        assert "the work of a cancelled request was not stored" in caplog.text
        assert await data_of(provider, session_id) == {"n": 0}
    assert await is_free(real_grid, session_id)


@in_loop
async def test_promise_4_a_save_of_a_request_given_up_in_line_is_told(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        go_on = asyncio.Event()

        async def slowly(name: str) -> None:
            if name == "commit_if":
                await go_on.wait()

        async def first() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["b"] = 1

        saving: list[asyncio.Task[None]] = []

        async def give_up() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 1
                saving.append(asyncio.create_task(_save(session)))
                await steps(5)
                raise ZeroDivisionError

        grid.before = slowly
        ahead = asyncio.create_task(first())
        await until(lambda: "commit_if" in grid.calls)
        with pytest.raises(ZeroDivisionError):
            await give_up()
        go_on.set()
        await ahead
        with pytest.raises(SessionClosed):
            await saving[0]
        assert await data_of(provider, session_id) == {"n": 0, "b": 1}


async def _save(session: Session) -> None:
    await session.save()


# -- blocks, settings -----------------------------------------------------------------------------


@in_loop
async def test_a_block_in_a_new_session_has_the_lock_from_its_first_save_on(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None, access="concurrent") as session:
            async with session.exclusive() as s:
                s["n"] = 1
                await s.save()
                assert not await is_free(grid, session.id)
                s["n"] += 1
                await s.save()
            session_id = session.id
        assert await data_of(provider, session_id) == {"n": 2}
    assert await is_free(grid, session_id)


@pytest.mark.parametrize("wrong", ["merge", 1])
def test_a_resolver_that_cannot_be_called_is_refused(wrong: Any) -> None:
    with pytest.raises(SettingsError, match=r"on_conflict=.* must be a plain function"):
        SessionProvider(grid=MemoryGrid(), on_conflict=wrong)


def test_a_resolver_that_would_have_to_be_awaited_is_refused() -> None:
    async def merge(key: str, base: Any, theirs: Any, mine: Any) -> Any:
        return mine

    with pytest.raises(SettingsError, match="no coroutine function"):
        SessionProvider(grid=MemoryGrid(), on_conflict=merge)
