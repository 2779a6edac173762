"""Forms that only the application's own pages can send: a CSRF token kept in the session.

    uvicorn examples.csrf.app:app        # in the root of the repository; then open /account

Another site can make a browser send a form here, and the browser adds this site's cookies to it.
What the other site cannot do is read our pages, so each form carries a token that only they show.

- The token lies in the session, made for the first form. Who sees none has no session.
- Every POST is checked, the login's too: `post()` makes the routes that change something.
- It comes as the form field `csrf` or, from scripts, as the header `X-CSRF-Token`.
- A login throws it away, as it does the session's id: who knew them before knows nothing after.

The why of each is in docs/csrf.md.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.templating import Jinja2Templates

from gridsession import Session
from gridsession.web.starlette import SessionMiddleware, session_of

templates = Jinja2Templates(directory=Path(__file__).parent / "templates")


def csrf_token(session: Session) -> str:
    """The session's token; made, and the session with it, when a form first needs it."""
    token: str = session.setdefault("csrf", secrets.token_urlsafe())
    return token


async def field(request: Request, name: str) -> str:
    """What a field of the form holds; empty where it is missing. HTTPException 400: no text."""
    try:
        value = (await request.form()).get(name)
        text = value if isinstance(value, str) else ""
        text.encode()
    except ValueError:  # the charset that a request names may be one that gives no text
        raise HTTPException(400, "This form cannot be read.") from None
    return text


async def check_csrf(request: Request) -> None:
    """Refuse a request without its session's token: HTTPException 403."""
    given = request.headers.get("x-csrf-token")
    if given is None:
        given = await field(request, "csrf")
    expected = str(session_of(request).get("csrf", ""))
    if not expected or not secrets.compare_digest(given.encode(), expected.encode()):
        raise HTTPException(403, "This form is out of date. Please reload the page and try again.")


def post(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    """A route that changes something, and needs the token."""

    async def checked(request: Request) -> Response:
        await check_csrf(request)
        return await endpoint(request)

    return Route(path, checked, methods=["POST"])


async def front_page(request: Request) -> Response:
    return templates.TemplateResponse(request, "front.html", {"user": session_of(request).user})


async def account(request: Request) -> Response:
    session = session_of(request)
    view = {"session": session, "csrf_token": csrf_token(session)}
    headers = {"cache-control": "no-store"}  # a page from a cache would show an old token
    return templates.TemplateResponse(request, "account.html", view, headers=headers)


async def log_in(request: Request) -> Response:
    session = session_of(request)
    name = await field(request, "name")
    if not name:
        raise HTTPException(400, "Who are you?")
    del session["csrf"]  # the next form shows a new one
    session.user = name[:80]  # another user gives the session a new id by itself,
    session.regenerate_id()  # the same one again does not
    return RedirectResponse("/account", status_code=303)


async def set_address(request: Request) -> Response:
    session_of(request)["address"] = (await field(request, "address"))[:200]
    return RedirectResponse("/account", status_code=303)


changes = [post("/login", log_in), post("/address", set_address)]
app = Starlette(routes=[Route("/", front_page), Route("/account", account), *changes])
grid = os.environ.get("GRID") or "embedded:"
app.add_middleware(SessionMiddleware, connection_string=grid, session_cookie="csrf-example")
