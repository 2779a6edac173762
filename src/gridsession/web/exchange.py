"""One request's response, on its way from the application to the server."""

from __future__ import annotations

from functools import partial

from gridsession.errors import SessionError
from gridsession.provider.bearer import Cookie
from gridsession.provider.log import log
from gridsession.provider.visit import Visit
from gridsession.session import Session
from gridsession.web.answers import unrouted
from gridsession.web.replies import Replies
from gridsession.web.types import Message, Receive, Scope, Send

# Looked at in each request, and an Enum's members are slow to find.
_KEEP = Cookie.KEEP


class Exchange:
    """The application's side of one request: its `receive` and its `send`.

    Args:
        replies: the middleware's way to answer.
        visit: the request's session.
        scope, receive, send: the server's.

    Attributes:
        started: a response has been begun, or ours in its place.
        streamed: its body comes in parts.
        left: the application has returned.
        failed: what is raised into the application, whose response was replaced.
    """

    __slots__ = (
        *("_came", "_receive", "_replies", "_scope", "_send", "_visit"),
        *("failed", "left", "started", "streamed"),
    )

    def __init__(
        self,
        replies: Replies,
        visit: Visit,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._replies = replies
        self._visit = visit
        self._scope = scope
        # Routers write into the scope; an error page is to find it as it came.
        self._came = None if replies.on_error is None else dict(scope)
        self._receive = receive
        self._send = send
        self.started = False
        self.streamed = False
        self.left = False
        self.failed: OSError | None = None

    def leave(self) -> None:
        """Told when the application returns, or fails."""
        self.left = True
        if self.failed is not None:  # raised meanwhile, it knows frames that know it
            self.failed.with_traceback(None)

    async def receive(self) -> Message:
        if self.failed:
            return {"type": "http.disconnect"}
        return await self._receive()

    async def send(self, message: Message) -> None:
        if self.failed:
            raise self.failed.with_traceback(None)
        if message["type"] == "http.response.start" and not self.started:
            left = self.left
            if left:
                raise OSError("the application has returned without an answer")
            self.started = True
            visit = self._visit
            session = visit.session  # the visit's is let go when the application returns
            try:
                await visit.end()
            except Exception as error:
                # Not raised into the application: a handler of its own might answer 200 to it.
                self.failed = OSError("the response was replaced: its session was not stored")
                log.error("a request's session was not stored: %s", error, exc_info=error)
                not_stored = error
            except BaseException:
                self.started = False  # cancelled; if the application answers after all, so do we
                if self.left:  # nobody else gives it up
                    await visit.discard(session)
                raise
            else:
                visit.cookie_can_be_sent = False
                if session.accessed or visit.cookie is not _KEEP:
                    message = self._replies.with_cookie(message, visit, session)
                await self._send(message)
                return
            try:
                send = partial(self._send_failure, session)
                scope = self._scope if self._came is None else unrouted(self._scope, self._came)
                await self._replies.answer(not_stored, scope, send, handler_ran=True)
            finally:
                del not_stored  # it knows this frame, which knew it
            return
        if message.get("more_body"):
            self.streamed = True
        await self._send(message)

    async def _send_failure(self, session: Session, message: Message) -> None:
        """With the cookie that what was committed before the failure made necessary."""
        visit = self._visit
        if visit.cookie_can_be_sent:  # another task's block may be storing a new id
            await visit.wait_for_ids_under_way()
            visit.cookie_can_be_sent = False
        if message["type"] == "http.response.start" and visit.cookie is not _KEEP:
            message = self._replies.with_cookie(message, visit, session)
        await self._send(message)


def report_late_changes(session: Session) -> None:
    """Log what a stream or a socket changed inside its session: nobody is left to be raised at."""
    try:
        delta = session._delta()
    except SessionError as error:
        log.error("session %s was changed without its lock: %s", session.key, error)
        return
    if delta.changes:
        keys = ", ".join(map(repr, (*delta.set, *delta.removed)))
        log.error(
            "session %s was changed without its lock, under %s, and that is not stored; a stream "
            "or a WebSocket changes its session inside `async with session.exclusive()`",
            session.key,
            keys,
        )
