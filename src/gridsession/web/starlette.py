"""Starlette and FastAPI: `app.add_middleware(SessionMiddleware, namespace="shop")`.

Takes the place of `starlette.middleware.sessions.SessionMiddleware`; handlers keep writing
`request.session["cart"]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

try:
    from starlette.requests import HTTPConnection
except ImportError as error:
    raise ImportError(
        "gridsession.web.starlette needs Starlette: pip install gridsession[starlette]"
    ) from error

from gridsession.session import Session
from gridsession.web.asgi import SessionMiddleware

__all__ = ["CurrentSession", "SessionMiddleware", "session_of"]


def session_of(connection: HTTPConnection) -> Session:
    """The session of a request or a WebSocket.

    Raises:
        SessionNotAvailable: the path's access is `none`.
        RuntimeError: no `SessionMiddleware` is installed, or another one.
    """
    session = connection.scope.get("session")
    if not isinstance(session, Session):
        raise RuntimeError(
            "there is no gridsession session here: "
            "app.add_middleware(gridsession.web.starlette.SessionMiddleware)"
        )
    session.mark_accessed()
    return session


if TYPE_CHECKING:
    from fastapi import Depends

    CurrentSession = Annotated[Session, Depends(session_of)]
    """The session as a FastAPI parameter: `async def add(session: CurrentSession): …`."""
else:

    def __getattr__(name: str) -> Any:
        # FastAPI is asked for only by who uses it; Starlette alone is enough for the rest.
        if name != "CurrentSession":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            from fastapi import Depends
        except ImportError as error:
            raise ImportError(
                "CurrentSession needs FastAPI: pip install gridsession[fastapi]"
            ) from error
        return Annotated[Session, Depends(session_of)]
