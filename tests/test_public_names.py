"""What users may import, and what type checkers say of it."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gridsession
from gridsession import errors

PROMISED = {
    "gridsession": {
        "ABSENT",
        "Access",
        "GridFull",
        "GridUnavailable",
        "Session",
        "SessionClosed",
        "SessionEncryptionError",
        "SessionError",
        "SessionFormatError",
        "SessionGone",
        "SessionLockLost",
        "SessionLockTimeout",
        "SessionNotAvailable",
        "SessionProvider",
        "SessionQueueFull",
        "SessionReadOnly",
        "SessionReplaced",
        "SessionSettings",
        "SessionTooLarge",
        "SessionTypeError",
        "SettingsError",
        "register_type",
    },
    "gridsession.web.starlette": {
        *("CurrentSession", "Failure", "SessionMiddleware", "session_access", "session_of"),
    },
}
ALSO_THERE = {
    "gridsession.web.answers": {"Failure"},
    "gridsession.web.asgi": {"SessionMiddleware"},
    "gridsession.grids": {"open_grid", "Grid"},
    "gridsession.testing": {"GridContract", "ManualClock"},
}
ERRORS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize(("module", "names"), PROMISED.items())
def test_exactly_the_promised_names(module: str, names: set[str]) -> None:
    there = importlib.import_module(module)
    assert set(there.__all__) == names
    assert len(there.__all__) == len(names)
    for name in names:
        assert getattr(there, name) is not None


@pytest.mark.parametrize(("module", "names"), ALSO_THERE.items())
def test_names_that_are_there(module: str, names: set[str]) -> None:
    there = importlib.import_module(module)
    assert names <= set(getattr(there, "__all__", vars(there)))


def test_nothing_else_looks_public() -> None:
    shown = {name for name in vars(gridsession) if not name.startswith("_")}
    modules = {name for name in shown if inspect.ismodule(getattr(gridsession, name))}
    assert shown - modules == PROMISED["gridsession"]


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_says_what_it_means(error: type[errors.SessionError]) -> None:
    assert issubclass(error, errors.SessionError)
    assert error.__name__ in gridsession.__all__
    assert error.__doc__ is not None
    assert str(error()) == inspect.getdoc(error)
    assert str(error())[-1] == "."
    assert str(error("other words")) == "other words"


@pytest.mark.parametrize("module", [*PROMISED, *ALSO_THERE])
def test_every_public_name_is_explained(module: str) -> None:
    there = importlib.import_module(module)
    for name in (PROMISED | ALSO_THERE)[module] - {"CurrentSession"}:  # a type, and no class
        assert getattr(there, name).__doc__, name


@pytest.mark.parametrize("cls", [gridsession.Session, gridsession.SessionProvider])
def test_every_public_member_is_explained_but_those_of_a_dict(cls: type) -> None:
    for name, member in inspect.getmembers(cls):
        if name == "mark_accessed":  # Starlette's
            continue
        if not name.startswith("_") and not hasattr(dict, name) and not _is_slot(member):
            assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def _is_slot(member: object) -> bool:
    return inspect.ismemberdescriptor(member)  # explained in the class's docstring


def test_an_unknown_name_is_an_attribute_error() -> None:
    starlette = importlib.import_module("gridsession.web.starlette")
    with pytest.raises(AttributeError, match="has no attribute 'Sessions'"):
        _ = starlette.Sessions


# -- types ----------------------------------------------------------------------------------------

USES = """
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from typing import Any, assert_type

from fastapi import APIRouter, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from gridsession import Access, Session, SessionProvider, SessionSettings, register_type
from gridsession.grids import Grid, open_grid
from gridsession.testing import ManualClock
from gridsession.web.asgi import SessionMiddleware as Plain
from gridsession.web.starlette import (
    CurrentSession, Failure, SessionMiddleware, session_access, session_of
)
from gridsession.web.types import ASGIApp

settings = SessionSettings(
    connection_string="memory://", timeout=timedelta(minutes=5), access={"/a": "none"}, max_age=60
)
app = FastAPI()
app.add_middleware(SessionMiddleware, namespace="shop", https_only=True, same_site="strict")
app.add_middleware(SessionMiddleware, settings=settings)
app.add_middleware(SessionMiddleware, provider=SessionProvider(settings))
starlette = Starlette(middleware=[Middleware(SessionMiddleware, timeout=5)])
router = session_access("none")(APIRouter())
assert_type(router, APIRouter)


async def sorry(failure: Failure) -> Response | None:
    assert_type(failure.retry_after, int | None)
    assert_type(failure.handler_ran, bool)
    return PlainTextResponse(str(failure.error), failure.status)


def sorry_now(failure: Failure) -> ASGIApp:
    return PlainTextResponse("sorry", failure.status)


app.add_middleware(SessionMiddleware, on_error=sorry)
plain = Plain(starlette, namespace="shop", on_error=sorry_now)


@app.get("/catalog")
@session_access("read_only", wait_for_writer=True)
async def catalog(n: int) -> int:
    return n


as_it_came: Callable[[int], Coroutine[Any, Any, int]] = session_access(Access.NONE)(catalog)


@app.get("/")
async def view(session: CurrentSession, request: Request) -> None:
    assert_type(session, Session)
    assert_type(session["a"], Any)
    assert_type(session.id, str)
    assert_type(session.key, str)
    assert_type(session.user, str | None)
    assert_type(session.timeout, float)
    assert_type(session.access, Access)
    assert_type(session.is_new, bool)
    assert_type(session.waited, float)
    assert_type(session.copy(), dict[str, Any])
    assert_type(session_of(request), Session)
    session.timeout = timedelta(hours=1)
    session.user = "ann"
    session.user = None
    session["cart"] = ["tea"]
    as_dict: dict[str, Any] = session
    await session.save()
    async with session.exclusive() as s:
        assert_type(s, Session)


@app.websocket("/ws")
async def socket(ws: WebSocket) -> None:
    assert_type(session_of(ws), Session)


async def without_framework() -> None:
    async with SessionProvider(settings) as provider:
        assert_type(provider, SessionProvider)
        async with provider.open(None, access="read_only", wait_for_writer=True) as session:
            assert_type(session, Session)
        async with provider.open("id", access=Access.EXCLUSIVE, holder="job 7") as session:
            assert_type(session, Session)
    async with open_grid("memory:", namespace="shop") as grid:
        assert_type(grid, Grid)


clock = ManualClock()
"""
MISUSES = """
from gridsession import Session, SessionProvider, SessionSettings
from gridsession.web.starlette import SessionMiddleware, session_access, session_of
from starlette.applications import Starlette

session_access("readonly")  # E: arg-type
SessionMiddleware(Starlette(), on_error="sorry")  # E: arg-type
SessionSettings(timout=5)  # E: call-arg
SessionSettings(same_site="Lax")  # E: arg-type
SessionSettings("memory:")  # E: call-arg misc
SessionMiddleware(Starlette(), timout=5)  # E: call-arg
SessionMiddleware(Starlette(), timeout="5")  # E: arg-type


def use(session: Session, provider: SessionProvider) -> None:
    session.user = 5  # E: assignment
    session.id = "x"  # E: misc
    session[5] = 1  # E: index
    session.timeout = "5"  # E: assignment
    with session.exclusive():  # E: attr-defined
        pass
    provider.open()  # E: call-arg
    session_of("request")  # E: arg-type
"""


@pytest.mark.timeout(200)
def test_type_checkers_know_the_api(tmp_path: Path) -> None:
    (tmp_path / "uses.py").write_text(USES)
    (tmp_path / "misuses.py").write_text(MISUSES)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    done = subprocess.run(
        [
            *command,
            f"--cache-dir={tmp_path}/cache",
            "--hide-error-context",
            "uses.py",
            "misuses.py",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    found: dict[int, set[str]] = {}
    others = []
    for line in done.stdout.splitlines():
        place, _, text = line.partition(": error: ")
        if text and place.startswith("misuses.py"):
            found.setdefault(int(place.split(":")[1]), set()).add(text.rpartition("[")[2][:-1])
        elif ": note: " not in line:
            others.append(line)
    assert others == []
    expected = {
        number: set(line.partition("# E: ")[2].split())
        for number, line in enumerate(MISUSES.splitlines(), 1)
        if "# E: " in line
    }
    assert found.keys() == expected.keys(), done.stdout
    for number, codes in expected.items():
        assert found[number] & codes, done.stdout
