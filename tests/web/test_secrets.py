"""Promise 9: ids, payloads, passwords and whole paths are in no log, answer, error or repr."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import traceback
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gridsession import (
    GridFull,
    SessionLockTimeout,
    SessionProvider,
    SessionSettings,
    SettingsError,
)
from gridsession.access import Access, Use
from gridsession.grids.contract import NewRecord
from gridsession.identity import new_id
from gridsession.provider.visit import Visit
from gridsession.testing import ManualClock
from gridsession.web.asgi import SessionMiddleware
from gridsession.web.holders import _holder, holder
from tests.provider.harness import Outage, Spy, identity_of, run, stored, until
from tests.web.driver import Asked, Browser, Exchange, Reply, browsing, start_of_lifespan

PAYLOAD = "pl4yl04d-m4rk3r"
USER = "us3r-m4rk3r@example.com"
PASSWORD = "p4ssw0rd-m4rk3r"
TOKEN = "t0k3n-m4rk3r"
PATH = f"/reset/{TOKEN}/x?"


class Scene:
    """One failing scenario, with everything that came out of it.

    Attributes:
        texts: what was answered, raised and shown; the log is added to it at the end.
        ids: the session ids that were used in it.
    """

    def __init__(self, browser: Browser, grid: Spy, clock: ManualClock) -> None:
        self.browser = browser
        self.provider = browser.provider
        self.grid = grid
        self.clock = clock
        self.ids: list[str] = []
        self.texts: list[str] = []

    async def session(self) -> str:
        session_id = await stored(self.provider, user=USER, card=PAYLOAD, list=[PAYLOAD])
        self.ids.append(session_id)
        self.browser.cookie = session_id
        return session_id

    async def ask(self, path: str = PATH, **options: Any) -> None:
        exchange = await self.browser.start("POST", path, **options).answered()
        if exchange.set_cookie is not None:
            self.ids.append(exchange.set_cookie.partition("=")[2].partition(";")[0])
        self.note(exchange)

    def note(self, exchange: Exchange) -> None:
        for message in exchange.sent:
            headers = message.get("headers", ())
            kept = [h for h in headers if h[0].lower() != b"set-cookie"]
            self.texts.append(repr({**message, "headers": kept}))
        if exchange.error is not None:
            self.texts += traceback.format_exception(exchange.error)


async def handler(asked: Asked) -> Reply:
    session = asked.session
    match asked.path.rstrip("?").rpartition("/")[2]:
        case "bad":
            session["list"].append(object())
        case "large":
            session["big"] = PAYLOAD * 200
        case "nested":
            session["list"].append(PAYLOAD)
        case "stream":

            async def chunks() -> Any:
                yield b"."
                session["list"].append(PAYLOAD)
                yield b"."

            return Reply(chunks=chunks)
        case "shown":
            shown = [repr(session), str(session), f"{session!s}", repr([session])]
            return Reply(" ".join(shown).encode())
        case "raise":
            session["card"] = PAYLOAD * 2
            raise ZeroDivisionError
        case "hold":
            await asked.body()
        case "closed":
            await session.release()
            session["card"] = PAYLOAD
        case _:
            session["card"] = PAYLOAD * 2
    return Reply()


async def commit_fails(scene: Scene) -> None:
    for leaf in ("bad", "large", "raise", "closed", "stream"):
        await scene.session()
        await scene.ask(f"/reset/{TOKEN}/{leaf}")


async def shown(scene: Scene) -> None:
    session_id = await scene.session()
    await scene.ask("/shown")
    visit = Visit(scene.provider, session_id.encode(), Use(Access.EXCLUSIVE), "test")
    await visit.begin()
    visit.session["card"] = PAYLOAD * 2
    work = scene.provider.work()
    things: list[object] = [visit, visit.session, visit.session._delta(), work, scene.provider]
    things += [visit.session._bound, *work._book.due(0.0)[0], identity_of(session_id)]
    things += [scene.provider.settings, scene.browser.app, asyncio.all_tasks()]
    scene.texts += [repr(thing) for thing in things] + [str(thing) for thing in things]
    await visit.discard()


async def read_only_changed(scene: Scene) -> None:
    await scene.session()
    await scene.ask(f"/ro/{TOKEN}/nested")
    await scene.ask(f"/ro/{TOKEN}/stream")


async def grid_away(scene: Scene) -> None:
    for names in (("acquire",), ("commit",), ("release", "acquire"), ("create",)):
        await scene.session()
        if "create" in names:
            scene.browser.cookie = None
        scene.grid.before = away = Outage(*names, times=3)
        await scene.ask()
        await scene.ask()
        away.over()
        await until(lambda: len(asyncio.all_tasks()) == 1)


async def grid_full(scene: Scene) -> None:
    async def full(name: str) -> None:
        if name in ("commit", "create"):
            raise GridFull

    await scene.session()
    scene.grid.before = full
    await scene.ask()
    scene.browser.cookie = None
    await scene.ask()
    scene.grid.before = None


async def lock_lost(scene: Scene) -> None:
    session_id = await scene.session()

    async def steal(name: str) -> None:
        if name == "commit":
            scene.grid.before = None
            scene.clock.advance(100)
            async with scene.provider.open(session_id):
                pass

    scene.grid.before = steal
    await scene.ask()


async def session_gone(scene: Scene) -> None:
    session_id = await scene.session()

    async def end(name: str) -> None:
        if name == "commit":
            await scene.grid.inner.remove(identity_of(session_id).key)

    scene.grid.before = end
    await scene.ask()
    scene.grid.before = None


async def lock_held(scene: Scene) -> None:
    session_id = await scene.session()
    scene.grid.calls.clear()
    holding = scene.browser.start("POST", f"/reset/{TOKEN}/hold", body=None)
    await until(lambda: "acquire" in scene.grid.calls)
    await scene.ask()
    with pytest.raises(SessionLockTimeout, match="POST /reset ·") as raised:  # no more of the path
        await scene.provider.open(session_id).__aenter__()
    scene.texts.append(str(raised.value))
    holding.upload(b"", more=False)
    scene.note(await holding.answered())


async def id_replaced(scene: Scene) -> None:
    session_id = await scene.session()
    async with scene.provider.open(session_id) as session:
        session.user = f"new {USER}"
    scene.ids.append(session.id)
    await scene.ask()


async def cookie_twice(scene: Scene) -> None:
    session_id = await scene.session()
    headers = [(b"cookie", f"session={new_id(bytes(48))}; session={session_id}".encode())]
    await scene.ask(headers=headers)
    scene.browser.cookie = session_id[:-1] + "!"
    scene.ids.append(session_id[:-1])
    await scene.ask()


async def unreadable(scene: Scene) -> None:
    for garbage in (PAYLOAD.encode(), b"\x01\x00" + PAYLOAD.encode(), b"\x09" + PAYLOAD.encode()):
        session_id = new_id(garbage.ljust(48, b"."))
        scene.ids.append(session_id)
        _, key, secret = identity_of(session_id)
        await scene.grid.inner.create(key, NewRecord(7, secret, garbage, 100.0, None, USER))
        scene.browser.cookie = session_id
        await scene.ask()


async def cancelled(scene: Scene) -> None:
    for call in ("acquire", "commit", "release", "remove"):
        session_id = await scene.session()
        reached = asyncio.Event()

        async def hang(name: str, call: str = call, reached: asyncio.Event = reached) -> None:
            if name == call:
                reached.set()
                await asyncio.Event().wait()

        scene.grid.before = hang

        async def use(sid: str = session_id, call: str = call) -> None:
            async with scene.provider.open(sid) as session:
                if call == "commit":
                    session["card"] = PAYLOAD * 2
                elif call == "remove":
                    session.clear()

        running = asyncio.create_task(use())
        await reached.wait()
        running.cancel()
        scene.grid.before = away = Outage("commit", "release", "remove")
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await until(lambda away=away: away.failed >= 2)  # type: ignore[misc]
        away.over()
        await until(lambda: len(asyncio.all_tasks()) == 1)


SCENES: list[Callable[[Scene], Awaitable[None]]] = [
    commit_fails,
    shown,
    read_only_changed,
    grid_away,
    grid_full,
    lock_lost,
    session_gone,
    lock_held,
    id_replaced,
    cookie_twice,
    unreadable,
    cancelled,
]


def spellings(secret: str) -> set[str]:
    return {secret, repr(secret)[1:-1], urllib.parse.quote(secret), secret.encode().hex()}


def everything(caplog: pytest.LogCaptureFixture) -> list[str]:
    """All that was logged, by anybody, with arguments, attributes and tracebacks."""
    texts = [caplog.text]
    for record in caplog.records:
        texts += [repr(record.args), repr(vars(record)), record.getMessage()]
    return texts


@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.__name__)
def test_nothing_secret_gets_out(
    grid: Spy,
    clock: ManualClock,
    scene: Callable[[Scene], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[Scene] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(True)
        loop.slow_callback_duration = 0.0  # asyncio then logs what it runs, with its arguments
        options: dict[str, Any] = {
            "lock_wait_timeout": 0.05,
            "max_payload_bytes": 1000,
            "access": {"/ro/*": "read_only"},
        }
        async with browsing("starlette", handler, grid, **options) as browser:
            seen.append(Scene(browser, grid, clock))
            await scene(seen[0])

    run(main())
    gc.collect()  # asyncio logs exceptions that nobody fetched when their task is collected
    texts = [*seen[0].texts, *everything(caplog)]
    assert len(" ".join(texts)) > 500  # there was something to look through
    halves = [half for sid in seen[0].ids for half in (sid, sid[:22], sid[22:])]
    for secret in (PAYLOAD, USER, TOKEN, *halves):
        for spelling in spellings(secret):
            for text in texts:
                assert spelling not in text


@pytest.mark.parametrize(
    "connection_string",
    [
        f"redis://ann:{PASSWORD}@host:6379/x",
        f"redis://ann:{PASSWORD}/#?@host",
        f"embedded://ann:{PASSWORD}@host/path",
        f"embedded://[{PASSWORD}",
        f"memory://{PASSWORD}",
        f"redis://host?password={PASSWORD}&db=x",
    ],
)
def test_no_password_gets_out_of_a_connection_string(
    connection_string: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []

    async def main() -> None:
        app = SessionMiddleware(_nothing, connection_string=connection_string)
        answer, _ = await start_of_lifespan(app)
        texts.append(repr(answer))
        assert answer["type"] == "lifespan.startup.failed"
        assert app.error is not None
        texts.extend(traceback.format_exception(app.error))
        async with SessionProvider(SessionSettings(connection_string="memory:")) as other:
            exchange = await Browser(app, other).ask()
            texts.append(repr(exchange.sent))

    run(main())
    try:
        settings = SessionSettings(connection_string=connection_string)
        if "@" in connection_string or "?" in connection_string:  # elsewhere are no passwords
            texts.append(repr(settings))
        SessionProvider(settings)
    except SettingsError as error:
        texts.extend(traceback.format_exception(error))
    texts += everything(caplog)
    for text in texts:
        assert PASSWORD not in text


@pytest.mark.parametrize(
    "connection_string",
    [f"redis://ann:{PASSWORD}@127.0.0.1:1/0", f"redis://127.0.0.1:1?password={PASSWORD}"],
)
def test_no_password_gets_out_of_a_grid_that_is_away(
    connection_string: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []

    async def main() -> None:
        async def app_itself(scope: Any, receive: Any, send: Any) -> None:
            for _ in range(2):
                message = await receive()
                await send({"type": message["type"] + ".complete"})

        app = SessionMiddleware(app_itself, connection_string=connection_string, namespace="shop")
        answer, stop = await start_of_lifespan(app)
        assert answer["type"] == "lifespan.startup.complete"
        browser = Browser(app, app.provider)
        browser.cookie = new_id(bytes(48))
        exchange = await browser.ask()
        assert exchange.status == 503
        texts.extend(map(repr, (exchange.sent, app.provider.grid, app.provider.settings)))
        texts.append(app.provider.grid.where)
        await stop()

    run(main())
    texts += everything(caplog)
    assert any("refuses connections" in text for text in texts)
    for text in texts:
        assert PASSWORD not in text


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("the application ran")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/", "/"),
        ("", "/"),
        ("/cart", "/cart"),
        ("/cart/4711", "/cart"),
        ("/api.v1~x_y-z", "/api.v1~x_y-z"),
        ("/users123", "/users123"),
        ("/a1b2c3", "/a1b2c3"),
        ("/a1b2c3d4", "/…"),
        ("/1234", "/…"),
        ("/deadbeefdeadbeefdead", "/deadbeefdeadbeefdead"),
        ("/deadbeefdeadbeefdeadb", "/…"),
        ("/9f86d081884c7d65", "/…"),
        ("/ann@example.com", "/…"),
        ("/\u0661\u0662", "/…"),
        ("//x", "/"),
        ("/x\n", "/…"),
    ],
)
def test_of_a_path_only_a_word_is_shown_to_those_who_wait(path: str, shown: str) -> None:
    assert holder("GET", path).startswith(f"GET {shown} · ")


def test_no_long_method_is_remembered() -> None:
    _holder.cache_clear()
    for number in range(100):
        assert holder(f"{'M' * 16}{number:0900}", "/").startswith(f"{'M' * 16} / · ")
        assert holder("GET", f"/{'p' * 21}{number:0900}").startswith("GET /… · ")
    assert _holder.cache_info().currsize == 2
