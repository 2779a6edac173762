"""What a browser gets when something fails: `docs/errors.md`, and the pages of `on_error`."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import re
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

import fastapi
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.responses import StreamingResponse as Streaming
from starlette.routing import Mount, Route

import gridsession
from gridsession import (
    GridFull,
    GridUnavailable,
    SessionClosed,
    SessionError,
    SessionFormatError,
    SessionLockLost,
    SessionNotAvailable,
    SessionReadOnly,
    SessionReplaced,
    SettingsError,
    payload,
)
from gridsession.grids.contract import NewRecord
from gridsession.identity import new_id
from gridsession.web.answers import Failure, _bare, retry_after
from gridsession.web.asgi import SessionMiddleware
from gridsession.web.types import Message, Receive, Scope, Send
from tests.provider.harness import (
    Spy,
    data_of,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    stored,
    until,
)
from tests.web.driver import FRAMEWORKS, Asked, Browser, Exchange, Reply

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)
DOC = (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8")
ERRORS = {name: cls for name, cls in vars(gridsession).items() if inspect.isclass(cls)}
ERRORS = {name: cls for name, cls in ERRORS.items() if issubclass(cls, SessionError)}


# -- the table ---------------------------------------------------------------------------------


def table(section: str) -> list[dict[str, str]]:
    """The rows of a section's table, by their columns' names."""
    text = DOC.split(f"\n## {section}\n")[1].split("\n#")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert all(len(row) == len(head) for row in rows)
    return [dict(zip(head, row, strict=True)) for row in rows]


BEFORE, IN, AFTER = map(table, ("Before the handler", "In the handler", "After the handler"))


def error_of(row: dict[str, str]) -> Any:
    return ERRORS[row["error"].strip("`")]


def test_the_tables_name_every_error() -> None:
    named = [row["error"].strip("`") for row in (*BEFORE, *IN, *AFTER)]
    assert set(named) == set(ERRORS)
    for rows in (BEFORE, IN, AFTER):
        assert len({row["error"] for row in rows}) == len(rows)
        assert all(row["what to do"] for row in rows)


class Failing:
    """A hook that raises an error at the first call of some name."""

    def __init__(self, name: str, error: Exception) -> None:
        self._name = name
        self._error: Exception | None = error

    async def __call__(self, name: str) -> None:
        if name == self._name and self._error is not None:
            error, self._error = self._error, None
            raise error


def check(answer: Exchange, row: dict[str, str], begins: str, log: list[Any]) -> None:
    """An answer and what was logged, against a row of the table and the lines around it."""
    assert answer.error is None
    assert answer.status == int(row["status"])
    assert answer.header("retry-after") == [row["Retry-After"]] * (row["Retry-After"] != "none")
    assert answer.header("cache-control") == ["no-store"]
    assert answer.header("content-type") == ["text/plain; charset=utf-8"]
    text = answer.body.decode()
    assert text.endswith("\n")
    assert f'"{text.strip()}"' in DOC.replace("\n", " ")
    assert answer.header("content-length") == [str(len(text))]
    assert answer.set_cookie is None
    (record,) = log
    assert record.name == "gridsession"
    assert record.levelname == row["level"]
    assert f'"{begins}"' in DOC.replace("\n", " ")
    assert record.getMessage() == begins + "its text"
    assert bool(record.exc_info) == (row["level"] == "ERROR")


def logged(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [r for r in caplog.records if r.levelno >= logging.WARNING and "memory:" not in r.msg]


@ALL
@pytest.mark.parametrize("row", BEFORE, ids=lambda row: row["error"])
@in_loop
async def test_before_the_handler(
    grid: Spy, framework: str, row: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(asked: Asked) -> Reply:
        raise AssertionError("the handler ran")

    async with provider_on(grid) as provider:
        browser = Browser(FRAMEWORKS[framework](handler, provider=provider), provider)
        browser.cookie = await stored(provider, n=1)
        caplog.clear()
        grid.before = Failing("acquire", error_of(row)("its text"))
        begins = "a request was refused: "
        if error_of(row) is SettingsError:
            begins = "sessions cannot work as they are set: "
        check(await browser.ask(), row, begins, logged(caplog))
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert await is_free(grid, browser.cookie)


@ALL
@pytest.mark.parametrize("row", AFTER, ids=lambda row: row["error"])
@in_loop
async def test_after_the_handler(
    grid: Spy, framework: str, row: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(asked: Asked) -> Reply:
        asked.session["n"] = 2
        return Reply(b"stored", 200, {"x-made-by": "the handler"})

    async with provider_on(grid) as provider:
        browser = Browser(FRAMEWORKS[framework](handler, provider=provider), provider)
        browser.cookie = await stored(provider, n=1)
        caplog.clear()
        grid.before = Failing("commit", error_of(row)("its text"))
        answer = await browser.ask()
        check(answer, row, "a request's session was not stored: ", logged(caplog))
        assert answer.header("x-made-by") == []
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert await is_free(grid, browser.cookie)
        assert await data_of(provider, browser.cookie) == {"n": 1}


@pytest.mark.parametrize("row", IN, ids=lambda row: row["error"])
@in_loop
async def test_in_the_handler(grid: Spy, row: dict[str, str]) -> None:
    error = error_of(row)
    raised: list[BaseException] = []

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        if error is SessionClosed:
            await session.release()
        try:
            if error is SessionReplaced:
                session.user = "ann"
            elif error is SessionFormatError:
                _ = session["n"]
            else:
                session["n"] = 2
        except error as e:
            raised.append(e)
        return Reply()

    access = {SessionReadOnly: "read_only", SessionNotAvailable: "none"}.get(error, "exclusive")
    async with provider_on(grid, access=access) as provider:
        browser = Browser(FRAMEWORKS["asgi"](handler, provider=provider), provider)
        browser.cookie = await stored(provider, n=1)
        if error is SessionReplaced:
            async with provider.open(browser.cookie) as other:
                other.regenerate_id()
        if error is SessionFormatError:
            browser.cookie = new_id(bytes(range(48)))
            _, key, secret = identity_of(browser.cookie)
            no_value = payload.join({"n": b"\xc1"}, 1000)
            await grid.inner.create(key, NewRecord(7, secret, no_value, 100.0, None, None))
        await browser.ask()
        assert len(raised) == 1


# -- pages of the application's own ------------------------------------------------------------


class Site:
    """An application whose requests fail where a test says, and its pages for that.

    Attributes:
        failures: what `on_error` was told.
    """

    def __init__(self, grid: Spy, page: Any) -> None:
        self.grid = grid
        self.page = page
        self.failures: list[Failure] = []

    def on_error(self, failure: Failure) -> Any:
        self.failures.append(failure)
        return self.page(failure)

    async def handler(self, asked: Asked) -> Reply:
        asked.session["n"] = 2
        if asked.path == "/saved":
            await asked.session.save()
            asked.session["n"] = object()
        return Reply(b"stored")

    async def ask(self, framework: str, error: Exception, *, at: str, **options: Any) -> Exchange:
        """One request of a stored session that fails at a call of the grid."""
        async with provider_on(self.grid) as provider:
            app = FRAMEWORKS[framework](self.handler, provider=provider, on_error=self.on_error)
            browser = Browser(app, provider)
            browser.cookie = self.cookie = await stored(provider, n=1)
            self.grid.before = Failing(at, error)
            answer = await browser.start(**options).answered()
            assert answer.error is None
            await until(lambda: len(asyncio.all_tasks()) == 1)
            assert await is_free(self.grid, self.cookie)
            return answer


def page(failure: Failure) -> Response:
    return PlainTextResponse("sorry", failure.status, {"x-page": "ours"})


async def page_later(failure: Failure) -> Response:
    await asyncio.sleep(0)
    return page(failure)


async def plain_page(scope: Scope, receive: Receive, send: Send) -> None:
    """No framework's; in two parts."""
    first, then = await receive(), asyncio.ensure_future(receive())
    assert first == {"type": "http.request", "body": b"", "more_body": False}
    headers = [(b"x-page", b"ours")]
    await send({"type": "http.response.start", "status": 599, "headers": headers})
    await send({"type": "http.response.body", "body": b"sor", "more_body": True})
    assert not then.done()
    await send({"type": "http.response.body", "body": b"ry"})
    assert await then == {"type": "http.disconnect"}


def streamed(failure: Failure) -> Response:
    async def chunks() -> Any:
        yield "sor"
        yield "ry"

    return Streaming(chunks(), failure.status, {"x-page": "ours"})


@ALL
@pytest.mark.parametrize("make", [page, page_later, streamed, lambda _: plain_page])
@pytest.mark.parametrize(
    ("at", "error", "status", "retry_after"),
    [
        ("acquire", GridUnavailable("x"), 503, ["1"]),
        ("acquire", GridFull("x"), 503, ["10"]),
        ("acquire", SessionFormatError("x"), 500, []),
        ("commit", GridUnavailable("x"), 500, []),
        ("commit", SessionLockLost("x"), 500, []),
    ],
)
@in_loop
async def test_a_page_of_the_applications_own(
    *,
    grid: Spy,
    framework: str,
    make: Any,
    at: str,
    error: SessionError,
    status: int,
    retry_after: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = Site(grid, make)
    answer = await site.ask(framework, error, at=at, method="POST", path="/x")
    assert answer.body == b"sorry"
    assert answer.status in (status, 599)
    assert answer.header("x-page") == ["ours"]
    assert answer.header("cache-control") == ["no-store"]
    assert answer.header("retry-after") == retry_after
    assert answer.set_cookie is None
    (failure,) = site.failures
    assert (failure.status, failure.handler_ran) == (status, at == "commit")
    assert failure.retry_after == (int(retry_after[0]) if retry_after else None)
    assert (type(failure.error), str(failure.error)) == (type(error), "x")
    assert failure.scope["path"] == "/x"
    assert len(logged(caplog)) == 1


@in_loop
async def test_a_page_that_declares_its_own_headers(grid: Spy) -> None:
    own = {"retry-after": "77", "cache-control": "public, max-age=9", "set-cookie": "seen=1"}

    def make(failure: Failure) -> Response:
        return PlainTextResponse("sorry", 418, own)

    answer = await Site(grid, make).ask("asgi", GridFull(), at="acquire")
    assert answer.header("retry-after") == ["77"]
    assert answer.header("cache-control") == ["no-store"]
    assert answer.status == 418
    answer = await Site(grid, make).ask("asgi", GridFull(), at="commit")
    assert answer.header("retry-after") == []  # or a proxy repeats a charged card
    assert answer.header("cache-control") == ["no-store"]
    assert answer.header("set-cookie") == ["seen=1"]


@in_loop
async def test_before_the_handler_a_page_may_send_elsewhere(grid: Spy) -> None:
    site = Site(grid, lambda failure: RedirectResponse("/busy", 303))
    answer = await site.ask("starlette", GridUnavailable(), at="acquire")
    assert (answer.status, answer.header("location")) == (303, ["/busy"])
    assert answer.header("retry-after") == ["1"]


@ALL
@in_loop
async def test_the_cookie_that_an_earlier_commit_made_necessary_leaves_with_the_page(
    grid: Spy, framework: str
) -> None:
    site = Site(grid, page)
    async with provider_on(grid) as provider:
        app = FRAMEWORKS[framework](site.handler, provider=provider, on_error=site.on_error)
        browser = Browser(app, provider)
        answer = await browser.ask(path="/saved")
        assert (answer.status, answer.body) == (500, b"sorry")
        assert answer.header("vary") == ["Cookie"]
        assert await data_of(provider, str(browser.cookie)) == {"n": 2}


# -- pages that fail ---------------------------------------------------------------------------


def raises(failure: Failure) -> Response:
    raise ZeroDivisionError("a page's own")


async def raises_later(failure: Failure) -> Response:
    raise ZeroDivisionError("a page's own")


def half(failure: Failure) -> Response:
    async def chunks() -> Any:
        yield "half a p"
        raise ZeroDivisionError("a page's own")

    return Streaming(chunks(), failure.status)


def unending(failure: Failure) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    return app


def headless(failure: Failure) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"no status"})

    return app


async def cancels(failure: Failure) -> Response:
    """Waits for something that is shared, and that somebody gives up."""
    shared = asyncio.ensure_future(asyncio.Event().wait())
    shared.cancel()
    await shared
    raise AssertionError


def cancelled_later(failure: Failure) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        raise asyncio.CancelledError

    return app


def missing_file(failure: Failure) -> Response:
    return FileResponse("/nowhere/at/all.html", failure.status)


@ALL
@pytest.mark.parametrize("at", ["acquire", "commit"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (raises, "a page's own"),
        (raises_later, "a page's own"),
        (half, "a page's own"),
        (unending, "ended before its response did"),
        (headless, "without a status"),
        (missing_file, "does not exist"),
        (cancels, "CancelledError"),
        (cancelled_later, "CancelledError"),
        (lambda _: "sorry", "returned a str, no ASGI application"),
        (lambda _: lambda: None, "positional argument"),
    ],
)
@in_loop
async def test_a_page_that_fails_is_replaced_by_the_plain_one(
    *,
    grid: Spy,
    framework: str,
    make: Any,
    says: str,
    at: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = await Site(grid, make).ask(framework, GridUnavailable(), at=at)
    if at == "acquire":
        assert (answer.status, answer.header("retry-after")) == (503, ["1"])
        assert answer.body == b"Service Unavailable. Please try again.\n"
    else:
        assert (answer.status, answer.header("retry-after")) == (500, [])
        assert answer.body == b"Internal Server Error\n"
    assert answer.header("cache-control") == ["no-store"]
    ours, its = logged(caplog)
    assert ours.levelno == (logging.WARNING if at == "acquire" else logging.ERROR)
    assert its.levelno == logging.ERROR
    assert "the page of on_error failed, the plain one was sent" in its.getMessage()
    assert re.search(says, its.getMessage())
    assert its.exc_info


@ALL
@pytest.mark.parametrize("status", [200, 204, 303, 399])
@in_loop
async def test_no_page_says_that_a_lost_session_is_well(
    grid: Spy, framework: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(grid, lambda failure: Response("fine", status))
    answer = await site.ask(framework, GridUnavailable(), at="commit")
    assert (answer.status, answer.body) == (500, b"Internal Server Error\n")
    assert f"status {status} would say that all went well" in caplog.text


@in_loop
async def test_none_is_the_plain_page(grid: Spy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = await Site(grid, lambda failure: None).ask("asgi", GridFull(), at="acquire")
    assert (answer.status, answer.header("retry-after")) == (503, ["10"])
    assert len(logged(caplog)) == 1
    assert "on_error has no page for GridFull" in caplog.text


@in_loop
async def test_what_a_page_does_after_it_is_sent_changes_nothing(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[int] = []

    def boom() -> None:
        sent.append(len(exchange.sent))
        raise ZeroDivisionError("in the background")

    async def handler(asked: Asked) -> Reply:
        return Reply()

    def on_error(failure: Failure) -> Response:
        return PlainTextResponse("sorry", 503, background=BackgroundTask(boom))

    async with provider_on(grid) as provider:
        app = FRAMEWORKS["starlette"](handler, provider=provider, on_error=on_error)
        browser = Browser(app, provider)
        browser.cookie = await stored(provider, n=1)
        grid.before = Failing("acquire", GridUnavailable())
        exchange = browser.start()
        await exchange.answered()
        assert (exchange.status, exchange.body, exchange.error) == (503, b"sorry", None)
        assert sent == [2]
        assert "failed, after it was sent: in the background" in caplog.text


@pytest.mark.parametrize("make", [page, streamed])
@pytest.mark.parametrize("version", ["2.0", "2.4"])
@in_loop
async def test_a_client_that_leaves_during_its_page_is_the_servers(
    grid: Spy, make: Any, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(grid) as provider:
        site = Site(grid, make)
        app = SessionMiddleware(
            FRAMEWORKS["asgi"](site.handler, provider=provider),
            provider=provider,
            on_error=site.on_error,
        )
        grid.before = Failing("acquire", GridUnavailable())

        async def gone(message: Message) -> None:
            raise ConnectionResetError

        cookie = await stored(provider, n=1)
        headers = [(b"cookie", f"session={cookie}".encode())]
        scope: Scope = {"type": "http", "path": "/", "method": "GET", "headers": headers}
        scope["asgi"] = {"version": "3.0", "spec_version": version}
        with pytest.raises(ConnectionResetError):
            await app(scope, asyncio.Event().wait, gone)  # type: ignore[arg-type]
        assert len(logged(caplog)) == 1


@pytest.mark.parametrize("make", [page, streamed, lambda _: FileResponse(__file__, 503)])
@in_loop
async def test_a_page_that_listens_for_its_clients_leaving_is_sent_whole(
    grid: Spy, make: Any
) -> None:
    """As Starlette's do by an older ASGI: they end at once where the client seems to be gone."""
    sent: list[Message] = []
    async with provider_on(grid) as provider:
        site = Site(grid, make)
        app = SessionMiddleware(
            FRAMEWORKS["asgi"](site.handler, provider=provider),
            provider=provider,
            on_error=site.on_error,
        )
        grid.before = Failing("acquire", GridUnavailable())

        async def slowly(message: Message) -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            sent.append(message)

        cookie = await stored(provider, n=1)
        headers = [(b"cookie", f"session={cookie}".encode())]
        scope: Scope = {"type": "http", "path": "/", "method": "GET", "headers": headers}
        await app(scope, asyncio.Event().wait, slowly)  # type: ignore[arg-type]
    assert not sent[-1].get("more_body")
    body = b"".join(message.get("body", b"") for message in sent)
    assert body in (b"sorry", Path(__file__).read_bytes())


@in_loop
async def test_a_page_that_hangs_can_be_cancelled(grid: Spy) -> None:
    async def hang(failure: Failure) -> Response:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    reached = asyncio.Event()
    site = Site(grid, hang)
    asking = asyncio.create_task(site.ask("asgi", GridUnavailable(), at="commit"))
    await reached.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


# -- what a page is told -----------------------------------------------------------------------


def shop(framework: str, view: Any, **options: Any) -> Any:
    """An application whose routers leave much in the scope."""
    if framework == "starlette":
        within: Any = Starlette(routes=[Route("/{n}", view)])
        app = Starlette(routes=[Mount("/shop", within)])
        app.add_middleware(SessionMiddleware, **options)
        return app
    api = fastapi.FastAPI(openapi_url=None)
    router = fastapi.APIRouter()
    router.add_api_route("/{n}", view)
    api.include_router(router, prefix="/shop")
    api.add_middleware(SessionMiddleware, **options)
    return api


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
@pytest.mark.parametrize("at", ["acquire", "commit"])
@in_loop
async def test_a_page_may_be_an_application_with_routes(
    grid: Spy, framework: str, kind: str, at: str
) -> None:
    async def view(request: Request) -> Response:
        request.session["n"] = 2
        request.scope["noted"] = "by a view"
        return PlainTextResponse("stored")

    async def sorry(request: Request) -> Response:
        path = request.path_params["p"]
        return PlainTextResponse(f"{path} {request.url} {request.url_for('home')}", 500)

    site: Any = Starlette() if kind == "starlette" else fastapi.FastAPI(openapi_url=None)
    site.router.add_route("/home", sorry, name="home")
    site.router.add_route("/{p:path}", sorry)
    told: list[Failure] = []

    def on_error(failure: Failure) -> Any:
        told.append(failure)
        return site

    async with provider_on(grid) as provider:
        app = shop(framework, view, provider=provider, on_error=on_error)
        browser = Browser(app, provider)
        browser.cookie = await stored(provider, n=1)
        grid.before = Failing(at, GridUnavailable())
        answer = await browser.ask(path="/shop/5")
        assert answer.status == 500
        assert answer.body == b"shop/5 http://test/shop/5 http://test/home"
        scope = told[0].scope
        assert scope.get("noted") == ("by a view" if at == "commit" else None)


@in_loop
async def test_a_mounted_application_finds_its_own_prefix_again(grid: Spy) -> None:
    told: list[Any] = []

    async def view(request: Request) -> Response:
        request.session["n"] = object()
        return PlainTextResponse("stored")

    def on_error(failure: Failure) -> None:
        told.append(
            {k: failure.scope.get(k) for k in ("root_path", "app_root_path", "path_params")}
        )

    async with provider_on(grid) as provider:
        app = shop("starlette", view, provider=provider, on_error=on_error)
        browser = Browser(Starlette(routes=[Mount("/{where}", app)]), provider)
        assert (await browser.ask(path="/here/shop/5")).status == 500
    assert told == [{"root_path": "/here", "app_root_path": "", "path_params": {"where": "here"}}]


@ALL
@pytest.mark.parametrize("at", ["acquire", "commit"])
@in_loop
async def test_a_page_is_no_part_of_the_handlers_answer(grid: Spy, framework: str, at: str) -> None:
    site = Site(grid, lambda failure: FileResponse(__file__, failure.status))
    headers = [
        (b"range", b"bytes=4-7"),
        (b"if-range", b"x"),
        (b"if-none-match", b"*"),
        (b"if-modified-since", b"Fri, 01 Jan 2100 00:00:00 GMT"),
        (b"accept", b"text/html"),
    ]
    answer = await site.ask(framework, GridUnavailable(), at=at, headers=headers)
    assert answer.status == (503 if at == "acquire" else 500)
    assert answer.body == Path(__file__).read_bytes()
    assert site.failures[0].scope["headers"] == [(b"host", b"test"), (b"accept", b"text/html")]


# -- what a page is not told -------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("at", ["acquire", "commit"])
@in_loop
async def test_a_page_is_told_no_secret(grid: Spy, framework: str, at: str) -> None:
    def make(failure: Failure) -> Response:
        assert sys.exc_info() == (None, None, None)
        assert failure.error.__traceback__ is None
        assert failure.error.__cause__ is failure.error.__context__ is None
        shown = traceback.TracebackException.from_exception(failure.error, capture_locals=True)
        texts.extend([*shown.format(), repr(failure), repr(failure.scope)])
        return page(failure)

    texts: list[str] = []
    site = Site(grid, make)
    error = GridUnavailable("x")
    error.__cause__ = ConnectionError("redis://ann:hunter2@host")
    headers = [(b"cookie", b"seen=1; theme=dark"), (b"accept-language", b"de")]
    answer = await site.ask(framework, error, at=at, headers=headers)
    assert answer.body == b"sorry"
    (failure,) = site.failures
    assert "session" not in failure.scope
    assert "scope" not in repr(failure)
    assert (b"cookie", b"seen=1; theme=dark") in failure.scope["headers"]
    assert (b"accept-language", b"de") in failure.scope["headers"]
    for text in texts:
        for secret in (site.cookie[:20], site.cookie[-20:], "hunter2"):
            assert secret not in text


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b"session=%s", []),
        (b"a=1; session=%s", [b"a=1"]),
        (b"session=%s; a=1;b=2", [b"a=1;b=2"]),
        (b"a=session=1; session=%s;\tsession=%s; b=2", [b"a=session=1; b=2"]),
        (b"a=1; xsession=2; session =%s", [b"a=1; xsession=2"]),
    ],
)
@in_loop
async def test_other_cookies_are_shown(sent: bytes, shown: list[bytes]) -> None:
    secret = b"s" * 64
    failures: list[Failure] = []
    broken = SessionMiddleware(plain_page, connection_string="memory:", on_error=failures.append)
    broken.provider.start = _fails  # type: ignore[method-assign]
    scope: Scope = {
        "type": "http",
        "path": "/",
        "method": "GET",
        "headers": [(b"cookie", sent.replace(b"%s", secret))],
    }

    async def send(message: Message) -> None:
        pass

    await broken(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
    (failure,) = failures
    assert [value for name, value in failure.scope["headers"] if name == b"cookie"] == shown
    assert secret in scope["headers"][0][1]


async def _fails() -> None:
    raise SettingsError("it will never open")


@in_loop
async def test_where_settings_are_wrong_no_cookie_is_shown() -> None:
    failures: list[Failure] = []

    def on_error(failure: Failure) -> Response:
        failures.append(failure)
        return page(failure)

    async def handler(asked: Asked) -> Reply:
        raise AssertionError("the handler ran")

    app: Any = FRAMEWORKS["asgi"](handler, timeout=-1, on_error=on_error)
    browser = Browser(app, None, "its-own-name")  # type: ignore[arg-type]
    browser.cookie = "s" * 64
    answer = await browser.ask()
    assert (answer.status, answer.body) == (500, b"sorry")
    assert answer.header("retry-after") == []
    (failure,) = failures
    assert isinstance(failure.error, SettingsError)
    assert failure.scope["headers"] == [(b"host", b"test")]


@in_loop
async def test_an_encoders_own_error_is_not_shown(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(grid, page)
    answer = await site.ask("asgi", ValueError("4111 1111 1111 1111"), at="commit")
    assert (answer.status, answer.body) == (500, b"sorry")
    (failure,) = site.failures
    assert type(failure.error) is SessionError
    assert str(failure.error) == "The session was not stored: ValueError."


def test_errors_of_a_grids_own_keep_their_class_and_attributes() -> None:
    class Away(GridUnavailable):
        def __init__(self, node: str) -> None:
            super().__init__(f"{node} is away")
            self.node = node

    bare = _bare(Away("n1"))
    assert (type(bare), str(bare)) == (Away, "n1 is away")
    assert vars(bare) == {"node": "n1"}
    assert retry_after(bare) == 1


@pytest.mark.parametrize("on_error", ["sorry", 5, {}])
def test_on_error_must_be_a_function(on_error: Any) -> None:
    middleware = SessionMiddleware(plain_page, connection_string="memory:", on_error=on_error)
    assert isinstance(middleware.error, SettingsError)
    assert "on_error=" in str(middleware.error)


def test_on_error_is_no_setting() -> None:
    with pytest.raises(SettingsError, match="there is no option 'on_error'"):
        gridsession.SessionSettings.load(on_error=page)


# -- the page's own code -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "at", "status", "text"),
    [
        (GridFull, "acquire", 503, "Please try again in 10 seconds."),
        (SessionFormatError, "acquire", 500, "We are on it."),
        (SessionLockLost, "commit", 500, "may not have been saved"),
    ],
)
@in_loop
async def test_the_pages_code(grid: Spy, error: Any, at: str, status: int, text: str) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "shop"}
    exec(compile(source, "docs/errors.md", "exec"), names)
    app: Starlette = names["app"]
    async with provider_on(grid) as provider:
        options = app.user_middleware[0].kwargs
        del options["connection_string"]
        options["provider"] = provider
        browser = Browser(app, provider)
        browser.cookie = await stored(provider, n=1)
        first = await browser.ask()
        assert (first.error, first.body) == (None, b"added")
        grid.before = Failing(at, error())
        answer = await browser.ask()
        assert answer.status == status
        assert text in answer.body.decode()


# -- what the application raises ------------------------------------------------------------------


class _Passes(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


@pytest.mark.parametrize("depth", [0, 1, 3])
@in_loop
async def test_what_a_handler_raises_arrives_as_it_is(grid: Spy, depth: int) -> None:
    """Also through middleware whose task groups leave an error that is its own context."""
    seen: list[Exception] = []

    async def fails(request: Request) -> Response:
        raise LookupError("the real one")

    async def page(request: Request, error: Exception) -> Response:
        seen.append(error)
        return PlainTextResponse("sorry", 500)

    async with provider_on(grid) as provider:
        app = Starlette(
            routes=[Route("/", fails)],
            middleware=[
                Middleware(SessionMiddleware, provider=provider),
                *[Middleware(_Passes)] * depth,
            ],
            exception_handlers={Exception: page},
        )
        browser = Browser(app, provider)
        browser.cookie = await stored(provider, n=0)
        answer = await browser.ask()
        assert answer.body == b"sorry"
        assert [str(error) for error in (*seen, answer.error)] == ["the real one"] * 2


@pytest.mark.parametrize("swallows", [True, False])
@in_loop
async def test_a_replaced_response_keeps_nothing_until_the_next_collection(
    grid: Spy, swallows: bool
) -> None:
    """While a grid is away every request has one."""
    kept: list[weakref.ref[Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        mine = Response()  # known to this frame, as the session is
        kept.append(weakref.ref(mine))
        scope["session"]["bad"] = object()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await send({"type": "http.response.body", "body": b"x"})
        except OSError:
            if not swallows:
                raise

    async with provider_on(grid) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        browser.cookie = await stored(provider, n=0)
        gc.collect()
        gc.disable()
        try:
            answer = await browser.ask()
            assert answer.status == 500
            del answer
            await asyncio.sleep(0)
            assert [there for there in kept if there() is not None] == []
        finally:
            gc.enable()
