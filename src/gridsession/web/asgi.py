"""The middleware for every ASGI framework.

It takes the session from the grid before the application runs and puts it back before the
response's headers leave, so that the browser's next request sees what this one stored.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Unpack

from gridsession.errors import GridUnavailable, SessionError, SettingsError
from gridsession.grids.contract import Busy
from gridsession.identity import CookieReader, CookieWriter
from gridsession.provider import SessionProvider
from gridsession.provider.bearer import Cookie
from gridsession.provider.log import Seldom, log
from gridsession.provider.visit import Visit
from gridsession.session import Session
from gridsession.settings import Access, SessionOptions, SessionSettings, Use
from gridsession.web import access as declarations
from gridsession.web.answers import OnError, answer, retry_after, varying_by_cookie
from gridsession.web.holders import holder
from gridsession.web.replay import Replay
from gridsession.web.types import ASGIApp, Message, Receive, Scope, Send

# Looked at in each request, and an Enum's members are slow to find.
_NONE, _KEEP, _SET, _REMOVE = Access.NONE, Cookie.KEEP, Cookie.SET, Cookie.REMOVE


class SessionMiddleware:
    """Sessions for an ASGI application: `app = SessionMiddleware(app, namespace="shop")`.

    The session is `scope["session"]`, a `gridsession.Session`.

    Args:
        app: the application.
        settings: what an operator can set; or the same as keywords; or `provider`.
        provider: a ready provider. The middleware opens it where it is not open, and closes what
            it opened.
        on_error: gives the page of a request that gets no answer from its handler, from a
            `Failure`: an ASGI application, or None for the plain page. Headers of ours are added;
            a page that fails, or that is below 400 for a session that was not stored, is replaced
            by the plain one. WebSockets are not asked for.
        **options: as `SessionSettings`.

    Never raises: a server takes an exception here for an application without lifespan. What is
    wrong stops the server at its lifespan's start, or answers each request where there is none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: SessionSettings | None = None,
        provider: SessionProvider | None = None,
        on_error: OnError | None = None,
        **options: Unpack[SessionOptions],
    ) -> None:
        self.app = app
        self.error: SettingsError | None = None
        self._said_broken = False
        self._several = Seldom()
        self._on_error = on_error if callable(on_error) else None
        try:
            if sum((settings is not None, provider is not None, bool(options))) > 1:
                raise SettingsError(
                    "SessionMiddleware takes options, or settings=, or provider=; one of the three"
                )
            if on_error is not self._on_error:
                raise SettingsError(f"on_error={on_error!r} cannot be used: it must be a function")
            self.provider = provider or SessionProvider(settings or SessionSettings.of(options))
        except SettingsError as error:
            self.error = error
            return
        except ImportError as error:  # a grid's package
            self.error = SettingsError(f"connection_string: {error}")
            return
        except Exception as error:  # its text is another's, and may hold a password
            self.error = SettingsError(
                f"connection_string or settings: what they ask for failed: {type(error).__name__}"
            )
            return
        settings = self.provider.settings
        self._reader = CookieReader(settings.cookie_name)
        self._writer = CookieWriter(
            settings.cookie_name,
            max_age=settings.max_age,
            path=settings.path,
            domain=settings.domain,
            same_site=settings.same_site,
            https_only=settings.https_only,
            partitioned=settings.partitioned,
        )
        self._rules = settings.access_rules()
        self._rolling = settings.rolling and settings.max_age is not None

    # -- start and stop -------------------------------------------------------------------

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await receive()
        ours = self.error is None and not self.provider.is_started
        if first["type"] == "lifespan.startup" and (failure := await self._start()) is not None:
            await send({"type": "lifespan.startup.failed", "message": f"gridsession: {failure}"})
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete" and ours:
                await self.provider.close()
            await send(message)

        await self.app(scope, Replay([first], receive), send_and_close)

    async def _start(self) -> SessionError | None:
        """Open the provider. What is returned keeps the server from starting."""
        try:
            if self.error is not None:
                raise self.error
            await self.provider.start()
        except SettingsError as error:
            self._say_broken(error)
            return error
        except GridUnavailable as error:
            log.error("the session grid is not there yet: %s", error, exc_info=error)
            if self.provider.settings.if_unreachable_at_start == "fail":
                return error
        return None

    def _say_broken(self, error: SettingsError) -> None:
        if not self._said_broken:
            self._said_broken = True
            log.error("sessions cannot work as they are set: %s", error, exc_info=error)

    # -- requests -------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            others = {"websocket": self._websocket, "lifespan": self._lifespan}
            await others.get(scope["type"], self.app)(scope, receive, send)
            return
        try:
            visit = self._visit(scope)
            if not self.provider.is_started and visit.use.access is not _NONE:
                await self.provider.start()
            busy = await visit.ask()
            if busy is not None:
                replay = await self._wait_turn(visit, busy, receive)
                if replay is None:
                    return  # the client is gone; nobody is left to be answered
                receive = replay
        except SessionError as error:
            refused = error  # on_error is called where nothing leads to what was raised
        else:
            scope["session"] = visit.session
            exchange = _Exchange(self, visit, scope, receive, send)
            try:
                await self.app(scope, exchange.receive, exchange.send)
            except Exception as error:
                if not exchange.has_told(error):
                    raise
                # It comes of what we told the application: that nobody listens any more.
            finally:
                if isinstance(receive, Replay):
                    receive.drop()
                visit.cookie_can_be_sent = False
                exchange.left = True
                try:
                    if not exchange.started:
                        await visit.discard()
                    elif exchange.streamed:
                        _report_late_changes(visit.session)
                finally:
                    visit.let_session_go()
            if declarations.in_use:
                self.check_declared(scope, visit.use)
            return
        try:
            self._log_refusal(refused)
            await self.answer(refused, scope, send, handler_ran=False)
        finally:
            del refused  # it knows this frame, which knew it

    def _visit(self, scope: Scope, *, lock: bool = True) -> Visit:
        if self.error is not None:
            raise self.error.with_traceback(None)  # else it grows, and keeps all it passed through
        method = scope.get("method", "GET")
        path = scope["path"]
        root = scope.get("root_path")
        if root and f"{path}/".startswith(root := root.rstrip("/") + "/"):
            path = path[len(root) - 1 :] or "/"
        # Looked for only where there is one, for its route match costs; it overrules path rules.
        use = (declarations.in_use and self.declared_use(scope)) or self._rules.use_of(method, path)
        access = use.access
        if not lock and access is Access.EXCLUSIVE:
            use = Use(Access.READ_ONLY)
        session_id = None
        if access is not _NONE and (values := self._reader.values(scope["headers"])):
            if len(values) == 1:
                session_id = values[0]
            else:  # which one is meant can't be known: a neighbouring domain may have planted one
                name, times = self._reader.name, len(values)
                self._several.warning("the cookie %s came %d times; none counts", name, times)
        return Visit(self.provider, session_id, use, holder(method, path))

    async def _wait_turn(self, visit: Visit, busy: Busy, receive: Receive) -> Receive | None:
        """Wait for the lock, or until the client is gone: then None. What came is replayed."""
        turn = visit.wait_in_line(busy)
        replay = Replay([], receive)
        try:
            try:
                while not turn.done():
                    under_way: set[asyncio.Future[Any]] = {turn, *replay.ahead()}
                    await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    if replay.client_has_left() and not turn.done():
                        replay.drop()
                        return None
                if turn.cancelled():
                    raise GridUnavailable("the server stops; this request waited for its turn")
                await turn
                return replay
            finally:
                turn.cancel()
                await asyncio.wait((turn,))
        except BaseException:
            replay.drop()
            visit.leave()  # cancelled before the turn's task began, or after its turn had come
            raise

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A snapshot at connect; no lock while the socket lives, but in `session.exclusive()`.

        What such blocks make of the session's id leaves with the accept, or with the response that
        the application sends in its place (ASGI's `websocket.http.response`).
        """
        try:
            visit = self._visit(scope, lock=False)
            if visit.use.access is not Access.NONE:
                await self.provider.start()
            await visit.begin()
        except SessionError as error:
            self._log_refusal(error)
            # 1013, "try again later"; servers answer a close before accept with HTTP 403.
            await send({"type": "websocket.close", "code": 1013})
            return
        scope["session"] = session = visit.session

        async def send_with_cookie(message: Message) -> None:
            if visit.cookie_can_be_sent:  # the first one: it opens the socket, or refuses to
                await visit.wait_for_what_is_under_way()
                visit.cookie_can_be_sent = False
                message = self._answering_handshake(message, visit, session)
            await send(message)

        try:
            await self.app(scope, receive, send_with_cookie)
        finally:
            visit.cookie_can_be_sent = False
            visit.let_session_go()
            _report_late_changes(session)

    def _answering_handshake(self, message: Message, visit: Visit, session: Session) -> Message:
        if message["type"] == "websocket.close":  # servers answer 403, with headers of their own
            if visit.cookie is _SET:
                log.warning(
                    "session %s: a WebSocket was closed before its accept, and the browser did not "
                    "get the new session id; refuse it with a response (send_denial_response), "
                    "which carries the cookie",
                    session.key,
                )
        elif visit.cookie is not _KEEP or (
            session.accessed and message["type"] == "websocket.http.response.start"
        ):  # an accept is kept by no cache: what it varies by is of no interest
            message = self.with_cookie(message, visit, session)
        return message

    # -- answers of our own ---------------------------------------------------------------

    def with_cookie(self, message: Message, visit: Visit, session: Session) -> Message:
        """A response's start, with what the session has to say in its headers."""
        cookie = visit.cookie_to_send(session, rolling=self._rolling)
        headers = list(message.get("headers", ()))
        if b"vary" in b"\n".join(dict(headers)).lower():
            headers = varying_by_cookie(headers)
        else:
            headers.append((b"vary", b"Cookie"))
        if cookie is _SET:
            headers.append((b"set-cookie", self._writer.set(visit.session_id)))
        elif cookie is _REMOVE:
            headers.append((b"set-cookie", self._writer.remove()))
        return {**message, "headers": headers}

    async def answer(
        self, error: Exception, scope: Scope, send: Send, *, handler_ran: bool
    ) -> None:
        """Answer for a handler that did not run, or whose session was not stored."""
        name = None if self.error is not None else self._reader.name
        await answer(
            send,
            scope,
            error,
            handler_ran=handler_ran,
            on_error=self._on_error,
            cookie_name=name,
        )

    def _log_refusal(self, error: SessionError) -> None:
        if isinstance(error, SettingsError):
            self._say_broken(error)
        elif retry_after(error) is None:
            log.error("a request was refused: %s", error, exc_info=error)
        else:
            log.warning("a request was refused: %s", error)

    # -- what a framework's adapter knows better -------------------------------------------

    def declared_use(self, scope: Scope) -> Use | None:
        """What `session_access` declares for the view that a request will reach; None: nothing.

        Asked only in a process where something is declared. Never raises.
        """
        return None

    def check_declared(self, scope: Scope, use: Use) -> None:
        """Told, once the application is through, what a request was given. Never raises."""


class _Exchange:
    """The application's side of one request: its `receive` and its `send`."""

    __slots__ = (
        *("_middleware", "_receive", "_scope", "_send", "_visit"),
        *("failed", "left", "started", "streamed"),
    )

    def __init__(
        self,
        middleware: SessionMiddleware,
        visit: Visit,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._middleware = middleware
        self._visit = visit
        self._scope = scope
        self._receive = receive
        self._send = send
        self.started = False
        self.streamed = False
        self.left = False  # the application has returned
        self.failed: OSError | None = None

    def has_told(self, error: BaseException | None) -> bool:
        """Whether an exception is, or comes of, the one that we raised into the application."""
        if isinstance(error, BaseExceptionGroup):
            return all(map(self.has_told, error.exceptions))
        return error is not None and (
            error is self.failed or self.has_told(error.__cause__ or error.__context__)
        )

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
                    message = self._middleware.with_cookie(message, visit, session)
                await self._send(message)
                return
            try:
                send = partial(self._send_failure, session)
                await self._middleware.answer(not_stored, self._scope, send, handler_ran=True)
            finally:
                del not_stored  # it knows this frame, which knew it
            return
        if message.get("more_body"):
            self.streamed = True
        await self._send(message)

    async def _send_failure(self, session: Session, message: Message) -> None:
        """With the cookie that what was committed before the failure made necessary."""
        visit = self._visit
        visit.cookie_can_be_sent = False
        if message["type"] == "http.response.start" and visit.cookie is not _KEEP:
            message = self._middleware.with_cookie(message, visit, session)
        await self._send(message)


def _report_late_changes(session: Session) -> None:
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
