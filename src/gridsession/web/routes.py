"""Which view a request will reach, found ahead of Starlette's router and the way it does.

One match of routes, on a copy of the scope, so that what the router will do is not touched. Routes
are asked themselves (`route.matches`), from the routers as they are at that moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.routing import BaseRoute, Host, Match, Mount, Router

from gridsession.access import Use
from gridsession.web.access import declared
from gridsession.web.asgi import SessionMiddleware
from gridsession.web.types import ASGIApp, Scope

_MAX_DEPTH = 64  # middleware around one application, after which it is taken for a circle


class RouterNotFound(Exception):
    """No router is known behind the middleware, so which view will run is not known either."""


def use_ahead(app: ASGIApp, scope: Scope, middleware: SessionMiddleware) -> Use | None:
    """What is declared for the view that a request will reach; None: nothing.

    Args:
        app: what the middleware of sessions wraps.
        scope: the request's, as it came there.
        middleware: who asks.

    Raises:
        RouterNotFound: middleware between here and the router does not show what it wraps.
    """
    outermost: Any = scope.get("app")
    around, route = declared(outermost), declared(scope.get("route"))
    # Before any router has run it is an application's own middleware; after one it may be that of
    # a mounted application, or that of a route or a mount, which then are nearer.
    is_its = isinstance(outermost, Starlette) and (
        "router" not in scope
        or any(one is middleware for one in _stack(outermost.middleware_stack))
    )
    way = _Way(dict(scope), (around or route) if is_its else (route or around))
    router = way.inward(app)
    if way.ended:
        return way.use
    if router is None and is_its:
        router = outermost.router
    if router is None:
        if "endpoint" not in scope:  # else this is middleware of a route, whose view is known
            raise RouterNotFound
        return use_of_endpoint(scope["endpoint"], scope) or way.use
    way.go(router)
    return way.use


def _stack(app: object) -> Iterator[object]:
    """Middleware and what it wraps, from the outside in, as far as they show it."""
    for _ in range(_MAX_DEPTH):
        if app is None:
            return
        yield app
        app = getattr(app, "app", None)


def _has_sessions(app: object) -> bool:
    """Whether an application brings sessions of its own, as far as it shows its middleware."""
    if isinstance(app, Starlette):
        classes = [one.cls for one in app.user_middleware]
        return any(isinstance(cls, type) and issubclass(cls, SessionMiddleware) for cls in classes)
    if isinstance(app, Router):
        return any(map(_has_sessions, _stack(app.middleware_stack)))
    return isinstance(app, SessionMiddleware)


def use_of_endpoint(endpoint: object, scope: Scope) -> Use | None:
    """What is declared for a view: of an `HTTPEndpoint` the method's own, else the class's."""
    if isinstance(endpoint, type) and issubclass(endpoint, HTTPEndpoint):
        method = str(scope.get("method", "GET")).lower()
        if method == "head" and not hasattr(endpoint, "head"):
            method = "get"
        use = declared(getattr(endpoint, method, None))
        if use is not None:
            return use
    return declared(endpoint)


class _Way:
    """A request's way through applications and routers.

    Attributes:
        use: what was declared last on it: the innermost counts.
        ended: it came to sessions of another middleware: what is declared there is about those.
    """

    __slots__ = ("_scope", "ended", "use")

    def __init__(self, scope: dict[str, Any], use: Use | None) -> None:
        self._scope = scope
        self.use = use
        self.ended = False

    def inward(self, app: object) -> Router | None:
        """The router inside of an application and its middleware, where they show it."""
        for _ in range(_MAX_DEPTH):
            self.use = declared(app) or self.use
            self.ended = _has_sessions(app)
            if self.ended:
                return None
            if isinstance(app, Router):
                return app
            if isinstance(app, Starlette):
                if root_path := getattr(app, "root_path", None):  # FastAPI's
                    self._scope["root_path"] = root_path
                app = app.router
            else:
                around = getattr(app, "__self__", None)
                if isinstance(around, Router):  # its `app`, which its own middleware wraps
                    self.use = declared(around) or self.use
                    return around
                app = getattr(app, "app", None)  # Starlette's convention for middleware
                if app is None:
                    return None
        return None

    def go(self, router: Router | None) -> None:
        """Through routers, to the end."""
        while router is not None:
            picked = _picked(router.routes, self._scope)
            router = self._default(router) if picked is None else self._through(*picked)

    def _default(self, router: Router) -> Router | None:
        """What a router hands over to where no route matches."""
        if getattr(router.default, "__func__", None) is Router.not_found:
            return None
        path = self._scope["path"]
        if router.redirect_slashes and self._scope["type"] == "http" and path != "/":
            other = path.rstrip("/") if path.endswith("/") else path + "/"
            if _picked(router.routes, self._scope | {"path": other}) is not None:
                return None  # it redirects
        late = getattr(router, "_match_low_priority", None)  # FastAPI's frontend()
        if late is not None and late(self._scope)[0] is not Match.NONE:
            return None
        return self.inward(router.default)

    def _through(self, route: BaseRoute, child: Scope) -> Router | None:
        """Into a route; the next router, if it leads to one."""
        scope = self._scope
        while (included := getattr(route, "original_router", None)) is not None:
            # FastAPI's include_router: such a route matches for its router, and tells only the
            # router what it found.
            self.use = declared(route) or self.use
            self.use = declared(included) or self.use
            _, child, route, context = route._match(scope)  # type: ignore[attr-defined]
            original = getattr(context, "original_route", None)
            self.use = declared(original) or self.use
        scope.update(child)
        self.use = declared(route) or self.use
        if isinstance(route, Mount | Host):
            within = self.inward(route.app)
            base = getattr(route, "_base_app", None)
            if within is None and not self.ended and base is not route.app:
                # It is behind middleware that does not show it.
                within = self.inward(base)
            return within
        if any(map(_has_sessions, _stack(getattr(route, "app", None)))):
            return None
        endpoint = child.get("endpoint", getattr(route, "endpoint", None))
        self.use = use_of_endpoint(endpoint, scope) or self.use
        return None


def _picked(routes: Sequence[BaseRoute], scope: Scope) -> tuple[BaseRoute, Scope] | None:
    """The first route that matches, else the first that does but for the method."""
    partial = None
    for route in routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            return route, child
        if match is Match.PARTIAL and partial is None:
            partial = route, child
    return partial
