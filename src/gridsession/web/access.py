"""`session_access`: what a view says of how it uses its session. Free of any framework.

A declaration is an attribute of what it is about: a view, a route, a router, an application. Who
serves requests finds it before the view runs; see `docs/access.md` for who wins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, TypeVar

from gridsession.access import Access, Use
from gridsession.errors import SettingsError

_ATTRIBUTE = "__gridsession_access__"
_MAX_WRAPPED = 64  # decorators around one view, after which they are taken for going in a circle
_T = TypeVar("_T")

in_use = False
"""Whether this process has any declaration: where there is none, no request looks for one."""


def session_access(
    access: Literal["exclusive", "concurrent", "read_only", "none"] | Access,
    *,
    wait_for_writer: bool = False,
) -> Callable[[_T], _T]:
    """Declare how a view, or all views of a router or an application, use their session.

    What is decorated is returned as it came, with an attribute. The declaration nearest to the
    view wins: its own, that of its route, of its routers and mounted applications from the inside
    out. Path rules (`access={…}`) speak only for requests that no declaration covers, a rule of
    `none` too: it is there to spare the grid, protects nothing, and a view that says that it needs
    its session would only fail under it.

    Args:
        access: `exclusive`, `concurrent`, `read_only` or `none`, as in path rules. A WebSocket gets
            a read-only snapshot for the first two, as it does without any declaration.
        wait_for_writer: with `read_only`: wait for a request that holds the lock, and see what it
            leaves. Otherwise what the last commit left.

    Raises:
        SettingsError: at decoration: the arguments make no sense, or what is decorated cannot
            carry an attribute or carries another declaration already.
    """
    if callable(access):
        raise SettingsError(
            'session_access needs to be told which access: @session_access("read_only")'
        )
    if not isinstance(wait_for_writer, bool):
        raise SettingsError(
            f"session_access: wait_for_writer={wait_for_writer!r} must be True or False"
        )
    use = Use.parse(f"{access} wait_for_writer" if wait_for_writer else access)

    def declare(view: _T) -> _T:
        global in_use  # noqa: PLW0603 - one flag, since each request asks for it
        if isinstance(view, staticmethod | classmethod):  # what a class makes of it has no mark
            kind = type(view).__name__
            raise SettingsError(
                f"session_access goes below @{kind}: write @{kind} above @session_access(…)"
            )
        if not callable(view):
            raise SettingsError(f"session_access goes on views and applications, not on {view!r}")
        was = getattr(view, "__dict__", {}).get(_ATTRIBUTE)
        # functools.wraps copies attributes: what a wrapper was given so may be overruled.
        if was not in (None, use, declared(getattr(view, "__wrapped__", None))):
            raise SettingsError(
                f"session_access: {_name(view)} is declared {was.access} already; where two "
                "routes use one view differently, declare them: session_access(…)(Route(…))"
            )
        try:
            setattr(view, _ATTRIBUTE, use)
        except (AttributeError, TypeError):
            raise SettingsError(
                f"session_access: {_name(view)} cannot carry a declaration; decorate the function "
                "(of a bound method, where its class defines it)"
            ) from None
        in_use = True
        return view

    return declare


def declared(view: object) -> Use | None:
    """What is declared for a view; looks through `functools.wraps`, `partial` and methods, and of
    a callable object at its `__call__`.
    """
    for _ in range(_MAX_WRAPPED):
        use = getattr(view, _ATTRIBUTE, None)
        if isinstance(use, Use):
            return use
        inner = getattr(view, "__wrapped__", None)
        if inner is None and isinstance(view, functools.partial):
            inner = view.func
        if inner is None:
            call = getattr(type(view), "__call__", None)  # noqa: B004 - not asked whether, but which
            use = getattr(call, _ATTRIBUTE, None)
            return use if isinstance(use, Use) else None
        view = inner
    return None


def _name(view: object) -> str:
    return getattr(view, "__qualname__", None) or f"a {type(view).__name__}"
