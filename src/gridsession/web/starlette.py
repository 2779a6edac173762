"""Starlette and FastAPI: `app.add_middleware(SessionMiddleware, namespace="shop")`.

Takes the place of `starlette.middleware.sessions.SessionMiddleware`; handlers keep writing
`request.session["cart"]`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

try:
    from starlette.requests import HTTPConnection
    from starlette.routing import Host, Mount
except ImportError as error:
    raise ImportError(
        "gridsession.web.starlette needs Starlette: pip install gridsession[starlette]"
    ) from error

from gridsession.access import Access, Use
from gridsession.provider.log import Seldom, log
from gridsession.session import Session
from gridsession.web import asgi
from gridsession.web.access import session_access
from gridsession.web.answers import Failure
from gridsession.web.routes import RouterNotFound, use_ahead, use_of_endpoint
from gridsession.web.types import Scope

__all__ = ["CurrentSession", "Failure", "SessionMiddleware", "session_access", "session_of"]


class SessionMiddleware(asgi.SessionMiddleware):
    """Sessions for a Starlette or FastAPI application, whose views' `session_access` it heeds.

    Args: as `gridsession.web.asgi.SessionMiddleware`.
    """

    _said_unknown = False
    _said_missed = False

    @cached_property
    def _failed_matches(self) -> Seldom:
        return Seldom()

    def mount_path(self, scope: Scope) -> str | None:
        # FastAPI's; not the scope's root_path, which a server or a proxy may set for each request.
        root = getattr(scope.get("app"), "root_path", None)
        return f"/{root.strip('/')}" if isinstance(root, str) else None

    def declared_use(self, scope: Scope) -> Use | None:
        try:
            return use_ahead(self.app, scope, self)
        except RouterNotFound:
            if not self._said_unknown:
                self._said_unknown = True
                log.warning(
                    "which view a request will reach cannot be known, and what session_access "
                    "declares has no effect there: access goes by path rules. Middleware hides "
                    "the router: let it keep what it wraps as its attribute `app`, or install "
                    "SessionMiddleware with app.add_middleware"
                )
        except Exception as error:
            # It fails in the router too, inside of the application, whose own handlers answer to
            # it and log it. Any client may cause it: `{n:int}` takes no 5,000 digits.
            self._failed_matches.warning(
                "a route failed to match (%s); access went by path rules", type(error).__name__
            )
        return None

    def check_declared(self, scope: Scope, use: Use) -> None:
        # Starlette's routers leave in the scope what they came to.
        if self._said_missed or self._said_unknown or isinstance(scope.get("route"), Mount | Host):
            return  # a mount's "endpoint" is an application, in which another may have been nearer
        endpoint = scope.get("endpoint")
        wanted = use_of_endpoint(endpoint, scope)
        if wanted is None:
            return
        if scope["type"] == "websocket" and wanted.access is not Access.NONE:
            wanted = Use(Access.READ_ONLY, wanted.wait_for_writer)
        if wanted != use:
            self._said_missed = True
            log.warning(
                "the view %s declares session_access %r and was run with %r: middleware inside of "
                "SessionMiddleware changed the path, hides a router, or is another "
                "SessionMiddleware",
                getattr(endpoint, "__qualname__", type(endpoint).__name__),
                str(wanted.access),
                str(use.access),
            )


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
