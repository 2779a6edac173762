"""A session's way through a request: what is stored, at what cost, and what is answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from gridsession import (
    GridFull,
    GridUnavailable,
    Session,
    SessionFormatError,
    SessionNotAvailable,
)
from gridsession.grids.contract import NewRecord
from gridsession.identity import new_id
from gridsession.testing import ManualClock
from gridsession.web.starlette import SessionMiddleware
from gridsession.web.types import Receive, Scope, Send
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
from tests.web.driver import FRAMEWORKS, Asked, Browser, Reply, browsing

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)


async def answer_200(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"all right"})


async def shop(asked: Asked) -> Reply:
    match asked.path.strip("/").split("/"):
        case ["add", *_]:
            asked.session["n"] = asked.session.get("n", 0) + 1
        case ["read", *_]:
            return Reply(str(asked.session.get("n")).encode())
        case ["touched"]:
            asked.session.setdefault("list", [])
            _ = asked.session.id
        case ["status", status]:
            asked.session["n"] = int(status)
            return Reply(b"", int(status))
        case ["raise"]:
            asked.session["n"] = 666
            raise ZeroDivisionError
        case ["cancel"]:
            asked.session["n"] = 666
            raise asyncio.CancelledError
        case ["nested"]:
            asked.session["list"].append(1)
        case ["bad"]:
            asked.session["n"] = object()
            return Reply(b"200 all right")
        case ["release"]:
            asked.session["n"] = 5
            await asked.session.release()
            return Reply(str(asked.session.waited).encode())
    return Reply()


# -- what it costs -----------------------------------------------------------------------------


@ALL
@in_loop
async def test_grid_calls_per_request(grid: Spy, framework: str) -> None:
    async with browsing(
        framework, shop, grid, access={"/none": "none", "/read*": "read_only"}
    ) as b:

        async def cost(path: str) -> list[str]:
            grid.calls.clear()
            assert (await b.ask(path=path)).status == 200
            return grid.asked

        assert await cost("/untouched") == []
        assert await cost("/read") == []
        assert await cost("/touched") == ["create"]
        assert await cost("/add") == ["acquire", "commit"]
        assert await cost("/untouched") == ["acquire", "release"]
        assert await cost("/touched") == ["acquire", "release"]
        assert await cost("/nested") == ["acquire", "commit"]
        assert await cost("/read") == ["read"]
        assert await cost("/none") == []
        b.cookie = "x"
        assert await cost("/untouched") == []


@ALL
@in_loop
async def test_waiting_costs_few_calls(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        async with browser.provider.open(browser.cookie) as session:
            grid.calls.clear()
            exchange = browser.start(path="/add")
            await until(lambda: "wait" in grid.calls)
            await session.release()
            await exchange.answered()
        *asked, last = [name for name in grid.asked if name != "release"]
        # Once more at a Redis, where a waiter begins to listen when it knows that it has to wait.
        assert 2 <= asked.count("acquire") == len(asked) <= 3
        assert last == "commit"
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 2}


# -- what is stored ----------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("status", [200, 204, 302, 404, 422, 500, 503])
@in_loop
async def test_a_response_that_the_application_made_commits(
    grid: Spy, framework: str, status: int
) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        assert (await browser.ask(path=f"/status/{status}")).status == status
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": status}
        assert await is_free(grid, str(browser.cookie))


@ALL
@in_loop
async def test_an_exception_discards_and_unlocks(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        exchange = await browser.ask(path="/raise")
        assert isinstance(exchange.error, ZeroDivisionError)
        assert exchange.set_cookie is None
        assert await is_free(grid, str(browser.cookie))
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 1}


@ALL
@in_loop
async def test_cancellation_discards_and_unlocks(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        with pytest.raises(asyncio.CancelledError):
            await browser.ask(path="/cancel")
        assert await is_free(grid, str(browser.cookie))
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 1}


@in_loop
async def test_no_response_discards_and_unlocks(grid: Spy) -> None:
    async with browsing("asgi", shop, grid) as browser:
        await browser.ask(path="/add")

        async def silent(scope, receive, send):  # type: ignore[no-untyped-def]
            scope["session"]["n"] = 666

        browser.app.app = silent  # type: ignore[attr-defined]
        assert (await browser.ask()).sent == []
        assert await is_free(grid, str(browser.cookie))
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 1}


@ALL
@in_loop
async def test_the_commit_is_there_before_the_headers_leave(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        seen: list[tuple[object, bool]] = []

        class Watching:
            async def __call__(self, scope, receive, send):  # type: ignore[no-untyped-def]
                async def watching_send(message):  # type: ignore[no-untyped-def]
                    if message["type"] == "http.response.start":
                        data = await data_of(browser.provider, str(browser.cookie))
                        seen.append((data["n"], await is_free(grid, str(browser.cookie))))
                    await send(message)

                await inner(scope, receive, watching_send)

        inner, browser.app = browser.app, Watching()
        await browser.ask(path="/add")
        assert seen == [(2, True)]


@in_loop
async def test_an_answer_cancelled_in_its_wait_for_a_block_may_be_given_again(grid: Spy) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: Session = scope["session"]
        session["n"] = 1
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with session.exclusive() as s:
                entered.set()
                await go_on.wait()
                s["n"] += 1

        task = asyncio.create_task(work())
        await entered.wait()
        try:
            async with asyncio.timeout(0):
                await send({"type": "http.response.start", "status": 200, "headers": []})
        except TimeoutError:
            go_on.set()
            await task
            await send({"type": "http.response.start", "status": 504, "headers": []})
        await send({"type": "http.response.body", "body": b"too slow"})

    async with provider_on(grid) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        browser.cookie = await stored(provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.body, answer.error) == (504, b"too slow", None)
        assert await data_of(provider, browser.cookie) == {"n": 2}
        assert await is_free(grid, browser.cookie)


@pytest.mark.parametrize("member", ["save", "release"])
@in_loop
async def test_headers_do_not_wait_for_who_waits_for_the_turn_of_who_sends_them(
    grid: Spy, member: str
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: Session = scope["session"]
        inside = asyncio.Event()

        async def answer() -> None:
            async with session.exclusive() as s:
                inside.set()
                await steps(5)  # the other waits for its turn meanwhile
                s["n"] += 1
                await answer_200(send)

        async def store(s: Session) -> None:
            await inside.wait()
            await getattr(s, member)()

        async with session.exclusive() as s:
            await asyncio.gather(answer(), store(s))

    options = {"access": "read_only", "lock_wait_timeout": 0.5}
    async with provider_on(grid, **options) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        browser.cookie = await stored(provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.body, answer.error) == (200, b"all right", None)
        assert await data_of(provider, browser.cookie) == {"n": 1}
        assert await is_free(grid, browser.cookie)


@ALL
@in_loop
async def test_release_lets_the_next_request_in_while_this_one_goes_on(
    grid: Spy, framework: str
) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        grid.calls.clear()
        assert (await browser.ask(path="/release")).status == 200
        assert grid.asked == ["acquire", "commit"]


# -- an answer that comes when the application has left ------------------------------------------


@pytest.mark.parametrize("how", ["returns", "raises"])
@in_loop
async def test_an_answer_that_is_cancelled_when_the_application_has_left_gives_the_lock_back(
    grid: Spy, how: str
) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: Session = scope["session"]
        session["n"] = 1
        entered = asyncio.Event()

        async def never_end() -> None:
            async with session.exclusive():
                entered.set()
                await asyncio.Event().wait()

        tasks.append(asyncio.create_task(never_end()))
        await entered.wait()
        tasks.append(asyncio.create_task(answer_200(send)))
        await steps(5)  # it waits for the block
        if how == "raises":
            raise ZeroDivisionError

    async with provider_on(grid, lock_lease=0.06) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        browser.cookie = await stored(provider, n=0)
        answer = await browser.start().answered()
        assert isinstance(answer.error, ZeroDivisionError) is (how == "raises")
        assert not await is_free(grid, browser.cookie)  # it may still be answered
        await until(lambda: ("renew", [True]) in grid.outcomes)
        stuck, answering = tasks
        answering.cancel()
        await asyncio.wait((answering,))
        assert answering.cancelled()
        assert not stuck.done()
        assert answer.sent == []
        assert await is_free(grid, browser.cookie)
        grid.outcomes.clear()
        async with provider.open(await stored(provider, n=0)):
            await until(lambda: "renew" in dict(grid.outcomes))
        assert dict(grid.outcomes)["renew"] == [True]  # for the other's lock, and for no more
        stuck.cancel()
        assert await data_of(provider, browser.cookie) == {"n": 0}


@pytest.mark.parametrize("how", ["returns", "raises"])
@in_loop
async def test_nobody_listens_to_an_answer_that_begins_when_the_application_has_left(
    grid: Spy, how: str
) -> None:
    late: list[Send] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["n"] = 1
        late.append(send)
        if how == "raises":
            raise ZeroDivisionError

    async with provider_on(grid) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        browser.cookie = await stored(provider, n=0)
        answer = await browser.start().answered()
        with pytest.raises(OSError, match="returned without an answer"):
            await answer_200(late[0])
        assert answer.sent == []
        assert await data_of(provider, browser.cookie) == {"n": 0}
        assert await is_free(grid, browser.cookie)


# -- a commit that fails -----------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("failure", ["type", "unreachable", "full", "lost", "gone", "read_only"])
@in_loop
async def test_a_commit_that_fails_is_a_500_that_no_proxy_repeats(
    grid: Spy,
    clock: ManualClock,
    framework: str,
    failure: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = {"type": "/bad", "read_only": "/nested"}.get(failure, "/add")

    async def full(name: str) -> None:
        if name == "commit":
            raise GridFull

    async def handler(asked: Asked) -> Reply:
        key = identity_of(str(browser.cookie)).key
        match failure:
            case "unreachable":
                grid.before = Outage("commit", times=1)
            case "full":
                grid.before = full
            case "lost":
                clock.advance(16)
                async with browser.provider.open(browser.cookie):
                    pass
            case "gone":
                await grid.inner.remove(key)
        return await shop(asked)

    rules = {"/nested": "read_only"}
    async with browsing(framework, handler, grid, access=rules) as browser:
        browser.cookie = await stored(browser.provider, n=1, list=[])
        caplog.clear()
        answer = await browser.ask(path=path)
        assert answer.error is None
        assert (answer.status, answer.body) == (500, b"Internal Server Error\n")
        assert answer.header("retry-after") == []
        assert answer.header("cache-control") == ["no-store"]
        assert answer.header("content-type") == ["text/plain; charset=utf-8"]
        assert answer.header("content-length") == ["22"]
        assert answer.set_cookie is None
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert record.name == "gridsession"
        assert "was not stored" in record.getMessage()
        assert record.exc_info
        grid.before = None
        await until(lambda: len(asyncio.all_tasks()) == 1)
        if failure != "gone":
            assert await data_of(browser.provider, str(browser.cookie)) == {"n": 1, "list": []}
        assert await is_free(grid, str(browser.cookie))


@in_loop
async def test_the_applications_own_handlers_never_see_a_commit_fail(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[BaseException] = []

    async def forgiving(request: Request, error: Exception) -> Response:
        seen.append(error)
        return PlainTextResponse("all is well")

    async def plain(request: Request) -> Response:
        request.session["n"] = object()
        return PlainTextResponse("stored")

    async def streamed(request: Request) -> Response:
        request.session["n"] = object()

        async def chunks() -> AsyncIterator[bytes]:
            yield b"stored"

        return StreamingResponse(chunks())

    async with provider_on(grid) as provider:
        app = Starlette(
            routes=[Route("/plain", plain), Route("/streamed", streamed)],
            middleware=[Middleware(SessionMiddleware, provider=provider)],
            exception_handlers={Exception: forgiving, OSError: forgiving, TypeError: forgiving},
        )
        browser = Browser(app, provider)
        for path in ("/plain", "/streamed"):
            answer = await browser.ask(path=path)
            assert (answer.status, answer.error) == (500, None)
            assert answer.body == b"Internal Server Error\n"
    assert not [error for error in seen if not isinstance(error, OSError)]


@in_loop
async def test_after_a_failed_commit_nobody_listens_and_nobody_speaks(grid: Spy) -> None:
    async with browsing("asgi", shop, grid) as browser:
        told: list[object] = []

        async def stubborn(scope, receive, send):  # type: ignore[no-untyped-def]
            scope["session"]["n"] = object()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(2):
                try:
                    await send({"type": "http.response.body", "body": b"all right"})
                except OSError as error:
                    told.append(str(error))
                told.append((await receive())["type"])
            await send({"type": "http.response.body", "body": b"all right"})

        browser.app.app = stubborn  # type: ignore[attr-defined]
        answer = await browser.ask()
        assert (
            told == ["the response was replaced: its session was not stored", "http.disconnect"] * 2
        )
        assert (answer.status, answer.error) == (500, None)


@in_loop
async def test_an_applications_own_errors_are_its_own(grid: Spy) -> None:
    async with browsing("asgi", shop, grid) as browser:
        for moment in ("before", "after", "after a failed commit"):

            async def app(scope, receive, send, moment=moment):  # type: ignore[no-untyped-def]
                if moment == "before":
                    raise ConnectionResetError(moment)
                if "failed" in moment:
                    scope["session"]["n"] = object()
                await send({"type": "http.response.start", "status": 200, "headers": []})
                raise ConnectionResetError(moment)

            browser.app.app = app  # type: ignore[attr-defined]
            answer = await browser.ask()
            assert isinstance(answer.error, ConnectionResetError)


# -- what fails before the handler -------------------------------------------------------------


@ALL
@pytest.mark.parametrize(
    ("failure", "retry_after"),
    [
        ("unreachable", ["1"]),
        ("full", ["10"]),
        ("timeout", ["5"]),
        ("queue", ["5"]),
        ("replaced", ["1"]),
        ("format", []),
    ],
)
@in_loop
async def test_what_fails_before_the_handler_keeps_it_from_running(
    grid: Spy,
    framework: str,
    failure: str,
    retry_after: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ran: list[str] = []

    async def handler(asked: Asked) -> Reply:
        ran.append(asked.path)
        return Reply()

    async def full(name: str) -> None:
        if name == "acquire":
            raise GridFull

    options = {"lock_wait_timeout": 0.02, "request_queue_limit_per_session": 1}
    async with browsing(framework, handler, grid, **options) as browser:
        browser.cookie = session_id = await stored(browser.provider, n=1)
        holding: list[asyncio.Task[None]] = []
        release = asyncio.Event()

        async def hold() -> None:
            async with browser.provider.open(session_id, holder="the holder"):
                await release.wait()

        match failure:
            case "unreachable":
                grid.before = Outage("acquire", times=1)
            case "full":
                grid.before = full
            case "timeout":
                holding.append(asyncio.create_task(hold()))
                await until(lambda: "acquire" in grid.calls)
            case "queue":
                patient = Browser(browser.app, browser.provider)
                async with provider_on(grid) as other:

                    async def queue() -> None:
                        async with other.open(session_id):
                            pass

                    holding.append(asyncio.create_task(hold()))
                    await until(lambda: "acquire" in grid.calls)
                    waiting = asyncio.create_task(queue())
                    await until(lambda: "wait" in grid.calls)
                    patient.cookie = session_id
                    answer = await patient.ask(path="/x")
                    release.set()
                    await waiting
            case "replaced":
                async with browser.provider.open(session_id) as session:
                    session.user = "ann"
                session_id = session.id
            case "format":
                browser.cookie = new_id(bytes(range(48)))
                _, key, secret = identity_of(browser.cookie)
                await grid.inner.create(key, NewRecord(7, secret, b"\xff", 100.0, None, None))
        if failure != "queue":
            caplog.clear()
            answer = await browser.ask(path="/x")
        release.set()
        await asyncio.gather(*holding)
        grid.before = None
        assert ran == []
        assert answer.error is None
        status = 503 if retry_after else 500
        assert answer.status == status
        assert answer.header("retry-after") == retry_after
        assert answer.header("content-type") == ["text/plain; charset=utf-8"]
        assert answer.header("cache-control") == ["no-store"]
        assert answer.body in (
            b"Service Unavailable. Please try again.\n",
            b"Internal Server Error\n",
        )
        assert answer.set_cookie is None
        (record,) = [r for r in caplog.records if "was refused" in r.getMessage()]
        assert record.levelno == (logging.WARNING if status == 503 else logging.ERROR)
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert await is_free(grid, session_id if failure != "format" else str(browser.cookie))


def test_the_errors_of_a_refusal_are_told_apart() -> None:
    assert not issubclass(GridFull, GridUnavailable)
    assert not issubclass(SessionFormatError, GridUnavailable)


# -- access rules ------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize(
    ("method", "path", "calls"),
    [
        ("GET", "/catalog/1", ["read"]),
        ("HEAD", "/catalog/1", ["read"]),
        ("POST", "/catalog/1", ["acquire", "release"]),
        ("OPTIONS", "/catalog/1", ["acquire", "release"]),
        ("GET", "/static/a.css", []),
        ("OPTIONS", "/static/a.css", []),
        ("GET", "/catalog", ["acquire", "release"]),
    ],
)
@in_loop
async def test_access_goes_by_rules(
    grid: Spy, framework: str, method: str, path: str, calls: list[str]
) -> None:
    async def handler(asked: Asked) -> Reply:
        return Reply()

    rules = {"GET /catalog/*": "read_only", "/static/*": "none"}
    async with browsing(framework, handler, grid, access=rules) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        grid.calls.clear()
        assert (await browser.ask(method, path)).status == 200
        assert grid.asked == calls


@pytest.mark.parametrize(
    ("root_path", "path", "access"),
    [
        ("", "/shop/a", "exclusive"),
        ("/shop", "/shop/a", "none"),
        ("/shop", "/a", "none"),  # a proxy took the prefix away
        ("/shop", "/shopping/a", "exclusive"),
        ("/shop/", "/shop/a", "none"),
        ("/shop", "/shop", "read_only"),
        ("/shop", "/shop/", "read_only"),
        ("/a", "/a/a", "none"),
    ],
)
@in_loop
async def test_rules_see_paths_as_the_application_does(
    grid: Spy, root_path: str, path: str, access: str
) -> None:
    accesses: list[str] = []

    async def handler(asked: Asked) -> Reply:
        accesses.append(asked.session.access.value)
        return Reply()

    async with browsing("asgi", handler, grid, access={"/a": "none", "/": "read_only"}) as browser:
        answer = await browser.start(path=path, root_path=root_path).answered()
        assert answer.status == 200
        assert accesses == [access]


@in_loop
async def test_a_mounted_application_has_rules_of_its_own(grid: Spy) -> None:
    async def view(request: Request) -> Response:
        return PlainTextResponse(request.scope["session"].access)

    async with provider_on(grid, access={"/a": "read_only", "/shop/a": "none"}) as provider:
        inner = Starlette(
            routes=[Route("/a", view)],
            middleware=[Middleware(SessionMiddleware, provider=provider)],
        )
        outer = Starlette(routes=[Mount("/shop", inner)])
        assert (await Browser(outer, provider).ask(path="/shop/a")).body == b"read_only"


@ALL
@in_loop
async def test_access_none_says_so_when_the_session_is_touched(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid, access="none") as browser:
        browser.cookie = await stored(browser.provider, n=1)
        grid.calls.clear()
        answer = await browser.ask(path="/read")
        assert isinstance(answer.error, SessionNotAvailable)
        assert grid.asked == []


@ALL
@in_loop
async def test_head_and_options_take_part_as_any_method(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        for method, n in (("HEAD", 1), ("OPTIONS", 2), ("PUT", 3)):
            assert (await browser.ask(method, "/add")).status == 200
            assert await data_of(browser.provider, str(browser.cookie)) == {"n": n}
