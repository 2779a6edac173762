"""What becomes of a session while its grid is away, full or broken."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gridsession import (
    GridFull,
    GridUnavailable,
    Session,
    SessionFormatError,
    SessionProvider,
)
from gridsession.access import Use
from gridsession.grids.contract import NewRecord
from gridsession.identity import new_id
from gridsession.provider.bearer import Cookie
from gridsession.provider.visit import Visit
from tests.provider.harness import (
    Outage,
    Spy,
    data_of,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    steps,
    stored,
    until,
)

APPLIED = pytest.mark.parametrize("applied", [False, True], ids=["not applied", "applied"])


def break_off(grid: Spy, *names: str, applied: bool, times: int | None = None) -> Outage:
    """Fail calls before, or after, the grid has carried them out."""
    away = Outage(*names, times=times)
    if applied:
        grid.after = away
    else:
        grid.before = away
    return away


def tasks_left() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


# -- before the block ---------------------------------------------------------------------------


@APPLIED
@pytest.mark.parametrize("access", ["exclusive", "read_only", "read_only wait_for_writer"])
@in_loop
async def test_unreachable_is_not_missing(grid: Spy, access: str, applied: bool) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        away = break_off(grid, applied=applied)
        with pytest.raises(GridUnavailable):
            async with provider.open(session_id, access=access):
                raise AssertionError("the block ran")
        away.over()
    assert await is_free(grid, session_id)


@APPLIED
@in_loop
async def test_what_a_lost_acquire_left_is_withdrawn_until_the_grid_answers(
    grid: Spy, applied: bool
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        away = break_off(grid, applied=applied)
        with pytest.raises(GridUnavailable):
            async with provider.open(session_id):
                pass
        await until(lambda: grid.calls.count("release") >= 3)
        grid.before = grid.after = None
        assert await is_free(grid, session_id) is (not applied or away.failed > 1)
        await until(lambda: not tasks_left())
        assert await is_free(grid, session_id)
        calls = len(grid.calls)
        await asyncio.sleep(0.1)
        assert grid.calls[calls:] == []


@APPLIED
@in_loop
async def test_an_outage_while_waiting_leaves_no_ticket(grid: Spy, applied: bool) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session, asyncio.TaskGroup() as tasks:

            async def wait() -> None:
                with pytest.raises(GridUnavailable):
                    async with provider.open(session_id):
                        raise AssertionError("the block ran")

            tasks.create_task(wait())
            await until(lambda: "wait" in grid.calls)
            break_off(grid, "acquire", applied=applied)
            await session.release()
    grid.before = grid.after = None
    assert await is_free(grid, session_id)


@in_loop
async def test_an_outage_in_exclusive_leaves_the_session_as_it_was(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, access="read_only") as session:
            grid.before = Outage("acquire", times=1)
            with pytest.raises(GridUnavailable):
                async with session.exclusive():
                    raise AssertionError("the block ran")
            assert session == {"a": 1}
            assert session.is_read_only
            async with session.exclusive() as s:
                s["a"] = 2
        assert await data_of(provider, session_id) == {"a": 2}


@in_loop
async def test_withdrawal_stops_by_itself(grid: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gridsession.provider.loop.TICKET_SECONDS", 0.05)
    async with provider_on(grid, lock_lease=0.1) as provider:
        session_id = await stored(provider, a=1)
        away = break_off(grid, applied=True)
        with pytest.raises(GridUnavailable):
            async with provider.open(session_id):
                pass
        await until(lambda: not tasks_left())
        # 0.02 + 0.04 + 0.08 seconds; after that nothing is left for the token to name.
        assert 2 <= grid.calls.count("release") <= 4
        away.over()


@in_loop
async def test_stored_bytes_that_cannot_be_read_are_left_as_they_are(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = new_id(bytes(range(48)))
        _, key, secret = identity_of(session_id)
        new = NewRecord(7, secret, b"\xff\xffcard 4111", 100.0, None, None)
        await grid.inner.create(key, new)
        for access in ("exclusive", "read_only"):
            with pytest.raises(SessionFormatError) as raised:
                async with provider.open(session_id, access=access):
                    raise AssertionError("the block ran")
            assert "4111" not in str(raised.value)
        await until(lambda: not tasks_left())
        assert await is_free(grid, session_id)
        outcome = await grid.inner.read(key, secret)
        assert outcome.snapshot.payload == new.payload  # type: ignore[union-attr]


# -- at the end -----------------------------------------------------------------------------------


@APPLIED
@in_loop
async def test_a_commit_of_unknown_outcome_is_reported_and_its_lock_withdrawn(
    grid: Spy, applied: bool
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        away = break_off(grid, "commit", "release", applied=applied)
        with pytest.raises(GridUnavailable):
            async with provider.open(session_id) as session:
                session["a"] = 2
        await until(lambda: grid.calls.count("release") >= 2)
        assert grid.calls.count("commit") == 1  # never repeated: it was reported
        away.over()
        await until(lambda: not tasks_left())
        assert await is_free(grid, session_id)
        assert await data_of(provider, session_id) == {"a": 2 if applied else 1}


@APPLIED
@pytest.mark.parametrize("change", ["user", "id"])
@pytest.mark.parametrize("lock", ["the request's", "a block's"])
@in_loop
async def test_a_new_id_of_unknown_outcome_is_known_before_the_headers_leave(
    grid: Spy, lock: str, change: str, applied: bool
) -> None:
    """Else the browser would be left with an id that is good for nothing any more."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        use = Use.parse("exclusive" if lock == "the request's" else "read_only")
        visit = Visit(provider, session_id.encode(), use, "a login")
        await visit.begin()
        break_off(grid, "commit", applied=applied, times=1)
        if lock == "the request's":
            log_in(visit.session, change)
            with pytest.raises(GridUnavailable):
                await visit.end()
        else:
            with pytest.raises(GridUnavailable):
                async with visit.session.exclusive() as s:
                    log_in(s, change)
            await visit.end()
        await visit.wait_for_what_is_under_way()
        assert visit.cookie is (Cookie.SET if applied else Cookie.KEEP)
        assert (visit.session_id != session_id) is applied
        assert await data_of(provider, visit.session_id) == {"a": 1 + applied}
        assert await is_free(grid, visit.session_id)


@in_loop
async def test_an_id_of_unknown_outcome_keeps_nobody_from_the_lock(grid: Spy) -> None:
    """Not even a task of the same request, for which its end waits."""
    async with provider_on(grid, lock_wait_timeout=5) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, access="read_only") as session:
            inside = asyncio.Event()
            waiting = asyncio.create_task(count_up(session, inside))
            with contextlib.suppress(GridUnavailable):
                async with session.exclusive() as s:
                    log_in(s, "user")
                    inside.set()
                    await until(lambda: "wait" in grid.calls)
                    break_off(grid, "commit", applied=False, times=1)
            async with asyncio.timeout(2):
                await waiting
        assert await data_of(provider, session_id) == {"a": 2}


@pytest.mark.parametrize("change", ["user", "id"])
@pytest.mark.parametrize("lock", ["the session's", "a block's"])
@in_loop
async def test_a_new_id_that_nobody_would_be_told_of_is_not_tried_again(
    grid: Spy, lock: str, change: str
) -> None:
    """Whoever opened the session without a request has the old id, and keeps it."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        access = "exclusive" if lock == "the session's" else "read_only"

        async def work() -> None:
            async with provider.open(session_id, access=access) as session:
                if lock == "the session's":
                    log_in(session, change)
                else:
                    async with session.exclusive() as s:
                        log_in(s, change)

        break_off(grid, "commit", applied=False, times=1)
        with pytest.raises(GridUnavailable):
            await work()
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert await is_free(grid, session_id)
        assert await data_of(provider, session_id) == {"a": 1}


@in_loop
async def test_a_request_that_copes_with_a_new_id_of_unknown_outcome_has_it(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        break_off(grid, "commit", applied=True, times=1)
        async with provider.open(session_id) as session:
            log_in(session, "user")
            with pytest.raises(GridUnavailable):
                await session.release()
        assert await data_of(provider, session.id) == {"a": 2}


@in_loop
async def test_headers_wait_one_more_grid_timeout_for_a_new_id_of_unknown_outcome(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(grid, grid_timeout=0.05) as provider:
        session_id = await stored(provider, a=1)
        visit = Visit(provider, session_id.encode(), Use.parse("exclusive"), "a login")
        await visit.begin()
        log_in(visit.session, "user")
        away = break_off(grid, "commit", "release", applied=False)
        with pytest.raises(GridUnavailable):
            await visit.end()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await visit.wait_for_what_is_under_way()
        assert 0.03 <= loop.time() - began < 5
        assert visit.cookie is Cookie.KEEP
        away.over()
        await until(lambda: not tasks_left())
        assert await is_free(grid, session_id)
        assert await data_of(provider, session_id) == {"a": 1}  # nor is it stored after that
    assert not [r for r in caplog.records if r.levelname == "ERROR"]  # whoever asked was told


async def count_up(session: Session, when: asyncio.Event) -> None:
    await when.wait()
    async with session.exclusive() as s:
        s["a"] += 1


def log_in(session: Session, change: str) -> None:
    session["a"] = 2
    if change == "user":
        session.user = "ann"
    else:
        session.regenerate_id()


@APPLIED
@in_loop
async def test_a_session_that_cannot_be_created_is_reported(grid: Spy, applied: bool) -> None:
    async with provider_on(grid) as provider:
        away = break_off(grid, "create", applied=applied, times=1)
        with pytest.raises(GridUnavailable):
            async with provider.open(None) as session:
                session["a"] = 1
        assert away.failed == 1
        async with provider.open(None) as session:
            session["a"] = 1
            away = break_off(grid, "create", applied=applied, times=1)
            with pytest.raises(GridUnavailable):
                await session.save()
            lost = session.id
            session["a"] = 2
            await session.save()
        assert await data_of(provider, session.id) == {"a": 2}
        assert await is_free(grid, lost)


@APPLIED
@in_loop
async def test_an_unchanged_session_that_cannot_be_unlocked_is_no_error(
    grid: Spy, applied: bool
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        away = break_off(grid, "release", applied=applied, times=3)
        async with provider.open(session_id) as session:
            assert session["a"] == 1
        await until(lambda: not tasks_left())
        assert away.failed == 3
        assert await is_free(grid, session_id)


@APPLIED
@pytest.mark.parametrize("ending", ["abandon", "clear"])
@in_loop
async def test_an_end_that_fails_is_reported(grid: Spy, ending: str, applied: bool) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        away = break_off(grid, "remove", applied=applied)
        with pytest.raises(GridUnavailable):
            async with provider.open(session_id) as session:
                getattr(session, ending)()
        away.over()
        await until(lambda: not tasks_left())
        assert await is_free(grid, session_id)
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new is applied


@APPLIED
@in_loop
async def test_an_end_that_could_not_be_saved_is_tried_again(grid: Spy, applied: bool) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            session.abandon()
            break_off(grid, "remove", applied=applied, times=1)
            with pytest.raises(GridUnavailable):
                await session.save()
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new


@APPLIED
@in_loop
async def test_what_a_failed_save_may_have_stored_is_undone_by_the_commit(
    grid: Spy, applied: bool
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            session["a"] = 2
            break_off(grid, "commit", applied=applied, times=1)
            with pytest.raises(GridUnavailable):
                await session.save()
            assert not await is_free(grid, session_id)
            session["a"] = 1
        assert await data_of(provider, session_id) == {"a": 1}


@in_loop
async def test_a_full_grid_refuses_and_keeps_what_it_has(grid: Spy) -> None:
    async def full(name: str) -> None:
        if name in ("create", "commit"):
            raise GridFull

    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        grid.before = full
        for opened in (session_id, None):
            with pytest.raises(GridFull):
                async with provider.open(opened) as session:
                    session["a"] = 2
        await until(lambda: not tasks_left())
        assert await is_free(grid, session_id)
        assert await data_of(provider, session_id) == {"a": 1}


@in_loop
async def test_an_exception_in_the_block_is_not_replaced_by_the_grids(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        away = break_off(grid, "release", applied=False, times=2)
        with pytest.raises(ZeroDivisionError):
            async with provider.open(session_id):
                raise ZeroDivisionError
        await until(lambda: not tasks_left())
        assert away.failed == 2
        assert await is_free(grid, session_id)


# -- start and close ------------------------------------------------------------------------------


@in_loop
async def test_an_unreachable_grid_heals_without_a_restart(grid: Spy) -> None:
    grid.before = Outage("open", times=2)
    provider = SessionProvider(grid=grid)
    for _ in range(2):
        with pytest.raises(GridUnavailable):
            await provider.start()
        assert not provider.is_started
    session_id = await stored(provider, a=1)
    assert await data_of(provider, session_id) == {"a": 1}
    await provider.close()
    assert not provider.is_started
    assert "close" not in grid.calls  # it is the caller's


@in_loop
async def test_a_provider_closes_what_it_opened_and_can_be_opened_again(grid: Spy) -> None:
    provider = SessionProvider(grid=grid)
    for _ in range(2):
        async with provider:
            assert provider.is_started
            await provider.start()
            await stored(provider, a=1)
        await provider.close()
    assert grid.calls.count("open") == 2


@in_loop
async def test_closing_waits_for_what_is_under_way_and_leaves_no_task(grid: Spy) -> None:
    provider = SessionProvider(grid=grid)
    session_id = await stored(provider, a=1)
    grid.before = away = Outage("release", times=2)
    async with provider.open(session_id):
        pass
    assert tasks_left()
    await provider.close()
    assert away.failed == 2
    assert not tasks_left()
    grid.before = None
    # A closed provider does not insist: a lease ends by itself. But it has tried.
    assert grid.calls.count("release") >= 2


@in_loop
async def test_closing_does_not_wait_for_a_grid_that_stays_away(grid: Spy) -> None:
    provider = SessionProvider(grid=grid)
    session_id = await stored(provider, a=1)
    grid.before = Outage("release")
    async with provider.open(session_id):
        pass
    async with asyncio.timeout(0.5):
        await provider.close()
    assert not tasks_left()


@in_loop
async def test_a_session_that_outlives_its_provider_ends_all_the_same(grid: Spy) -> None:
    provider = SessionProvider(grid=grid)
    session_id = await stored(provider, a=1)
    async with provider.open(session_id) as session:
        session["a"] = 2
        await provider.close()
    assert await is_free(grid, session_id)
    grid.calls.clear()
    await steps(5)
    assert not tasks_left()
    async with provider.open(session_id) as session:
        assert session == {"a": 2}
    await provider.close()


@in_loop
async def test_what_never_left_is_not_withdrawn(grid: Spy) -> None:
    """In an outage each request would leave a task behind, which asks again and again."""

    async def away(name: str) -> None:
        if name in ("acquire", "read"):
            error = GridUnavailable("known to be away")
            error.never_asked = True
            raise error

    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=1)
        for use in ("exclusive", "read_only"):
            grid.calls.clear()
            grid.before = away
            with pytest.raises(GridUnavailable, match="known to be away"):
                async with provider.open(session_id, access=use):
                    pass
            await grid.settle()
            assert "release" not in grid.calls
            grid.before = None
        assert await is_free(grid, session_id)
