"""What the middleware adds to responses, and the responses that it makes itself."""

from __future__ import annotations

from gridsession.identity import CookieWriter
from gridsession.provider.bearer import Cookie
from gridsession.provider.visit import Visit
from gridsession.session import Session
from gridsession.web.answers import OnError, answer, varying_by_cookie
from gridsession.web.types import Message, Scope, Send

# Looked at in each request, and an Enum's members are slow to find.
_SET, _REMOVE = Cookie.SET, Cookie.REMOVE


class Replies:
    """One middleware's way to answer.

    Args:
        on_error: the application's own pages, or None.

    Attributes:
        cookie_name: the session's cookie; None where the settings are broken.
        writer: of that cookie.
        rolling: it is sent with each response that used the session.
    """

    writer: CookieWriter

    def __init__(self, on_error: OnError | None) -> None:
        self.on_error = on_error
        self.cookie_name: str | None = None
        self.rolling = False

    def with_cookie(self, message: Message, visit: Visit, session: Session) -> Message:
        """A response's start, with what the session has to say in its headers."""
        cookie = visit.cookie_to_send(session, rolling=self.rolling)
        headers = list(message.get("headers", ()))
        if b"vary" in b"\n".join(dict(headers)).lower():
            headers = varying_by_cookie(headers)
        else:
            headers.append((b"vary", b"Cookie"))
        if cookie is _SET:
            headers.append((b"set-cookie", self.writer.set(visit.session_id)))
        elif cookie is _REMOVE:
            headers.append((b"set-cookie", self.writer.remove()))
        return {**message, "headers": headers}

    async def answer(
        self, error: Exception, scope: Scope, send: Send, *, handler_ran: bool
    ) -> None:
        """Answer for a handler that did not run, or whose session was not stored."""
        await answer(
            send,
            scope,
            error,
            handler_ran=handler_ran,
            on_error=self.on_error,
            cookie_name=self.cookie_name,
        )
