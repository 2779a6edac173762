"""An application's session middleware is found where a server would meet it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import Receive, Scope, Send

from gridsession import SessionProvider, SessionSettings
from gridsession.tools.find_app import AppError, find_middleware, import_app
from gridsession.web import asgi
from gridsession.web.starlette import SessionMiddleware

SECRET = "hunter2-of-the-grid"
OPTIONS = {"connection_string": "memory://"}


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    pass


class Wraps:
    def __init__(self, app: object) -> None:
        self.app = app


class Endless:
    @property
    def app(self) -> Endless:
        return self


class Broken:
    @property
    def app(self) -> object:
        raise RuntimeError(SECRET)


def added() -> FastAPI:
    app = FastAPI()
    app.add_middleware(SessionMiddleware, timeout=77, connection_string="memory://")
    app.add_middleware(GZipMiddleware)
    return app


@pytest.mark.parametrize(
    "app",
    [
        asgi.SessionMiddleware(plain, timeout=77, connection_string="memory://"),
        Wraps(Wraps(SessionMiddleware(plain, timeout=77, connection_string="memory://"))),
        GZipMiddleware(SessionMiddleware(plain, timeout=77, connection_string="memory://")),
        added(),
        Wraps(added()),
        Starlette(
            middleware=[
                Middleware(
                    SessionMiddleware,
                    settings=SessionSettings(timeout=77, connection_string="memory://"),
                )
            ]
        ),
        SessionMiddleware(
            plain,
            provider=SessionProvider(SessionSettings(timeout=77, connection_string="memory://")),
        ),
    ],
)
def test_it_is_found(app: object) -> None:
    found = find_middleware(app)
    assert found.middleware.error is None
    assert found.settings is not None
    assert found.settings.timeout == 77
    assert found.count == 1


def test_settings_are_known_of_one_that_cannot_work() -> None:
    app = Starlette()
    app.add_middleware(SessionMiddleware, connection_string="redis+cluster://a,b", timeout=77)
    found = find_middleware(app)
    assert found.middleware.error is not None
    assert found.settings is not None
    assert found.settings.timeout == 77
    wrong = SessionMiddleware(plain, timeout=-1)
    assert find_middleware(wrong).settings is None


@pytest.mark.parametrize(
    "wrong",
    [{"provider": SessionSettings(timeout=77)}, {"settings": "redis://cache"}, {"provider": 5}],
)
def test_settings_are_unknown_of_one_that_was_given_a_wrong_object(wrong: dict[str, Any]) -> None:
    app = Starlette()
    app.add_middleware(SessionMiddleware, **wrong)
    for found in (find_middleware(app), find_middleware(SessionMiddleware(plain, **wrong))):
        assert found.middleware.error is not None
        assert found.settings is None


def test_one_that_cannot_be_made() -> None:
    app = Starlette()
    app.add_middleware(SessionMiddleware, SECRET)  # type: ignore[call-arg, arg-type]
    with pytest.raises(AppError, match="SessionMiddleware failed: TypeError") as raised:
        find_middleware(app)
    assert "add_middleware" in raised.value.do
    assert SECRET not in raised.value.what + raised.value.do


def test_two_are_counted() -> None:
    assert find_middleware(SessionMiddleware(added(), connection_string="memory://")).count == 2


@pytest.mark.parametrize("app", [plain, Starlette(), Wraps(plain), Endless(), Broken(), 5])
def test_there_is_none(app: object) -> None:
    with pytest.raises(AppError, match="no SessionMiddleware") as raised:
        find_middleware(app)
    assert "add_middleware" in raised.value.do


@pytest.mark.parametrize("factory", [added, Starlette])
def test_a_factory_is_no_application(factory: object) -> None:
    with pytest.raises(AppError, match="makes an application") as raised:
        find_middleware(factory)
    assert "app = make_app()" in raised.value.do


@pytest.mark.parametrize(
    ("source", "what", "do"),
    [
        (None, "there is no module 'imported_app'", "folder"),
        ("import not_installed_here", "'not_installed_here', which is not there", "environment"),
        (f"raise ValueError('{SECRET}')", "ValueError in imported_app.py, line 1", "python -c"),
        (f"\nimport sys; sys.exit('{SECRET}')", "SystemExit in imported_app.py, line 2", "python"),
        (f"x = = '{SECRET}'", "SyntaxError in imported_app.py, line 1", "python -c"),
        ("app = 1", "imported_app has no 'make.app'", "module:app"),
    ],
)
def test_what_cannot_be_imported(
    source: str | None,
    what: str,
    do: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    if source is not None:
        (tmp_path / "imported_app.py").write_text(source)
    try:
        with pytest.raises(AppError) as raised:
            import_app("imported_app:make.app")
    finally:
        sys.modules.pop("imported_app", None)
    assert what in raised.value.what
    assert do in raised.value.do
    assert SECRET not in raised.value.what + raised.value.do
    assert raised.value.__cause__ is None


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
def test_the_namespace_is_the_one_that_the_application_will_have(tmp_path: Path) -> None:
    app = FastAPI(root_path="/shop")
    app.add_middleware(SessionMiddleware, connection_string=f"embedded://{tmp_path}/grid")
    assert find_middleware(app).middleware.provider.namespace == "/shop"
