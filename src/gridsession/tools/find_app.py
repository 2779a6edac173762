"""The session middleware of an application, found as a server would start it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gridsession.errors import SettingsError
from gridsession.settings import SessionSettings
from gridsession.web.asgi import SessionMiddleware
from gridsession.web.types import Receive, Scope, Send

_MAX_DEPTH = 64  # middleware around one application, after which it is taken for a circle
_NOT_SETTINGS = ("settings", "provider", "on_error")


class AppError(Exception):
    """An application whose sessions cannot be looked at.

    Attributes:
        what: what is wrong, without anything that the application itself said.
        do: what to do about it.
    """

    def __init__(self, what: str, do: str) -> None:
        super().__init__(what)
        self.what = what
        self.do = do


@dataclass
class Found:
    """An application's session middleware.

    Attributes:
        middleware: the one that meets a request first.
        settings: its own; None where they cannot be known, because they are wrong.
        count: how many the application has around it.
    """

    middleware: SessionMiddleware
    settings: SessionSettings | None
    count: int


def import_app(name: str) -> object:
    """The object that `module:app` names, imported with the working directory on the path.

    Raises:
        AppError: it cannot be had. Of what an exception says only its kind and place are told:
            the text is another's, and may hold a password.
    """
    module_name, _, attributes = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise AppError(
                f"there is no module {missing!r}",
                "run the doctor in the folder from which the server is started, and name the "
                "module as its command line does",
            ) from None
        raise AppError(
            f"{module_name} imports {missing!r}, which is not there",
            "run the doctor with the Python environment of the application",
        ) from None
    except (Exception, SystemExit) as error:
        raise AppError(
            f"importing {module_name} failed: {type(error).__name__}{_place(error)}",
            f'python -c "import {module_name}" shows the whole of it',
        ) from None
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise AppError(
                f"{module_name} has no {attributes!r}",
                "name the application as the server's command line does: module:app",
            ) from None
    return found


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f" in {os.path.basename(error.filename or '?')}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((one for one in reversed(frames) if not one.filename.startswith("<")), None)
    if frame is None or os.path.abspath(frame.filename) == os.path.abspath(__file__):
        return ""
    return f" in {os.path.basename(frame.filename)}, line {frame.lineno}"


def find_middleware(app: object) -> Found:
    """The session middleware around an application.

    Looked for: the object itself, what it wraps as its attribute `app` and so on, and what
    Starlette and FastAPI are told by `add_middleware` or `middleware=[…]`. The latter is made
    from its arguments, around nothing.

    Raises:
        AppError: there is none.
    """
    _refuse_factory(app)
    found = list(_middlewares(app))
    if not found:
        raise AppError(
            "the application has no SessionMiddleware of gridsession around it",
            "app.add_middleware(gridsession.web.starlette.SessionMiddleware); where a mounted "
            "application has it, name that one: --app module:mounted; where other middleware hides "
            "it, let that keep what it wraps as its attribute `app`",
        )
    middleware, settings = found[0]
    return Found(middleware, settings, len(found))


def _refuse_factory(app: object) -> None:
    if not (inspect.isroutine(app) or inspect.isclass(app)):
        return
    try:
        inspect.signature(app).bind()
    except (TypeError, ValueError):
        if inspect.isroutine(app):
            return  # a plain ASGI application
    raise AppError(
        "this is a function or a class that makes an application, and no application",
        "name an application; where the server calls a factory, write `app = make_app()` into a "
        "module of its own, and name that",
    )


def _middlewares(app: object) -> Iterator[tuple[SessionMiddleware, SessionSettings | None]]:
    """From the outside in."""
    for _ in range(_MAX_DEPTH):
        if isinstance(app, SessionMiddleware):
            provider = getattr(app, "provider", None)
            yield app, None if provider is None else provider.settings
        for declared in _declared(app):
            cls = getattr(declared, "cls", None)
            if isinstance(cls, type) and issubclass(cls, SessionMiddleware):
                middleware = _made(cls, declared, app)
                yield middleware, _settings_of(middleware, declared.kwargs)
        app = _attribute(app, "app") or _attribute(app, "middleware_stack")
        if app is None:
            return


def _made(cls: type[SessionMiddleware], declared: Any, app: object) -> SessionMiddleware:
    try:
        middleware = cls(_nothing, *declared.args, **declared.kwargs)
        middleware.place({"type": "lifespan", "app": app})
    except Exception as error:  # its text is another's, and may hold a password
        raise AppError(
            f"making the application's {cls.__name__} failed: {type(error).__name__}",
            "mend what add_middleware or middleware=[…] gives it; the server does not start, or "
            "answers 500, until then",
        ) from None
    return middleware


def _declared(app: object) -> list[Any]:
    declared = _attribute(app, "user_middleware")
    return declared if isinstance(declared, list) else []


def _settings_of(
    middleware: SessionMiddleware, kwargs: Mapping[str, Any]
) -> SessionSettings | None:
    """Also of a middleware that cannot work with them, such as for want of a grid."""
    provider = getattr(middleware, "provider", None)
    if provider is not None:
        settings: SessionSettings = provider.settings
        return settings
    given = kwargs.get("settings")
    if isinstance(given, SessionSettings):
        return given
    if given is not None or kwargs.get("provider") is not None:  # whatever they were to say
        return None
    options: Any = {name: value for name, value in kwargs.items() if name not in _NOT_SETTINGS}
    try:
        return SessionSettings.load(options=options)
    except (SettingsError, OSError):
        return None


def _attribute(app: object, name: str) -> Any:
    try:
        return getattr(app, name, None)
    except Exception:  # a property of somebody else's
        return None


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The application that a middleware is made around, to be looked at."""
