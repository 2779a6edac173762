"""The middleware for every ASGI framework.

It takes the session from the grid before the application runs and puts it back before the
response's headers leave, so that the browser's next request sees what this one stored.
"""

from __future__ import annotations

import asyncio
from typing import Any, Unpack

from gridsession.access import Access, Use
from gridsession.changes import OnConflict
from gridsession.errors import GridUnavailable, SessionError, SettingsError
from gridsession.grids.contract import Busy
from gridsession.identity import CookieReader, CookieWriter
from gridsession.provider import SessionProvider
from gridsession.provider.bearer import Cookie
from gridsession.provider.log import Seldom, log
from gridsession.provider.visit import Visit
from gridsession.session import Session
from gridsession.settings import SessionOptions, SessionSettings
from gridsession.web import access as declarations
from gridsession.web.answers import OnError, comes_of, retry_after
from gridsession.web.exchange import Exchange, report_late_changes
from gridsession.web.holders import holder
from gridsession.web.nested import Nested
from gridsession.web.replay import Replay
from gridsession.web.replies import Replies
from gridsession.web.types import ASGIApp, Message, Receive, Scope, Send

# Looked at in each request, and an Enum's members are slow to find.
_NONE, _KEEP, _SET = Access.NONE, Cookie.KEEP, Cookie.SET


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
        on_conflict: as `SessionProvider`'s; with `provider`, give it to that.
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
        on_conflict: OnConflict | None = None,
        **options: Unpack[SessionOptions],
    ) -> None:
        self.app = app
        self.error: SettingsError | None = None
        self._is_placed = True
        self._said_broken = False
        self._several = Seldom()
        self._replies = Replies(on_error if callable(on_error) else None)
        try:
            if sum((settings is not None, provider is not None, bool(options))) > 1:
                raise SettingsError(
                    "SessionMiddleware takes options, or settings=, or provider=; one of the three"
                )
            if on_error is not self._replies.on_error:
                raise SettingsError(f"on_error={on_error!r} cannot be used: it must be a function")
            if on_conflict is not None and (provider is not None or not callable(on_conflict)):
                raise SettingsError(
                    "on_conflict cannot be used: it must be a function, and where there is a "
                    "provider= it is the provider's"
                )
            for name, given, kind in (
                ("provider", provider, SessionProvider),
                ("settings", settings, SessionSettings),
            ):
                if given is not None and not isinstance(given, kind):
                    what = given.__name__ if isinstance(given, type) else type(given).__name__
                    raise SettingsError(
                        f"{name}=<{what}> cannot be used: it must be a {kind.__name__} that has "
                        "been made"
                    )
            if provider is None:
                if settings is None:
                    settings = SessionSettings.load(options=options)
                provider = SessionProvider(settings, on_conflict=on_conflict)
                self._is_placed = settings.namespace is not None
            self.provider = provider
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
        self._nested = Nested(settings.cookie_name)
        self._reader = CookieReader(settings.cookie_name)
        self._replies.cookie_name = settings.cookie_name
        self._replies.writer = CookieWriter(
            settings.cookie_name,
            max_age=settings.max_age,
            path=settings.path,
            domain=settings.domain,
            same_site=settings.same_site,
            https_only=settings.https_only,
            partitioned=settings.partitioned,
        )
        self._rules = settings.access_rules()
        self._replies.rolling = settings.rolling and settings.max_age is not None

    # -- start and stop -------------------------------------------------------------------

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await receive()
        ours = self.error is None and not self.provider.is_started
        if ours:
            self.place(scope)
        if first["type"] == "lifespan.startup" and (failure := await self._start()) is not None:
            await send({"type": "lifespan.startup.failed", "message": f"gridsession: {failure}"})
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete" and ours:
                await self.provider.close()
            await send(message)

        await self.app(scope, Replay([first], receive), send_and_close)

    def place(self, scope: Scope) -> None:
        """Take the namespace from where the application knows to be mounted; once."""
        placed, self._is_placed = self._is_placed, True
        if not placed and (path := self.mount_path(scope)) is not None:
            provider = self.provider
            self.provider = SessionProvider(
                provider.settings, mount_path=path, on_conflict=provider.on_conflict
            )

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
        except Exception as error:  # a server takes it for an application without lifespan
            broken = SettingsError(f"the grid cannot be opened: {type(error).__name__}")
            broken.__cause__ = error
            self._say_broken(broken)
            return broken
        return None

    async def _start_late(self, visit: Visit) -> None:
        """Without lifespan, or where the grid was not there at the start."""
        try:
            await self.provider.start()
        except GridUnavailable:
            if visit.asks_first:  # else it may store nothing, and needs no grid
                raise

    def _say_broken(self, error: SettingsError) -> None:
        if not self._said_broken:
            self._said_broken = True
            log.error("sessions cannot work as they are set: %s", error, exc_info=error)

    # -- requests -------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or ("session" in scope and self._has_session(scope)):
            others = {"websocket": self._websocket, "lifespan": self._lifespan}
            await others.get(scope["type"], self.app)(scope, receive, send)
            return
        try:
            visit = self._visit(scope)
            if not self.provider.is_started and visit.use.access is not _NONE:
                await self._start_late(visit)
            busy = await visit.ask()
            if busy is not None:
                replay = await self._wait_turn(visit, busy, receive)
                if replay is None:
                    return  # the client is gone; nobody is left to be answered
                receive = replay
        except SessionError as error:
            refused = error  # on_error is called where nothing leads to what was raised
        else:
            exchange = Exchange(self._replies, visit, scope, receive, send)
            scope["session"] = session = visit.session
            try:
                await self.app(scope, exchange.receive, exchange.send)
            except Exception as error:
                if not comes_of(error, exchange.failed):
                    raise
                # It comes of what we told the application: that nobody listens any more.
            finally:
                if isinstance(receive, Replay):
                    receive.drop()
                visit.cookie_can_be_sent = False
                exchange.leave()
                try:
                    if not exchange.started:
                        await visit.discard()
                        self._report_unsent_id(visit, session, scope)
                    elif exchange.streamed:
                        report_late_changes(session)
                finally:
                    visit.let_session_go()
                    if declarations.in_use and scope.get("session") is session:
                        self.check_declared(scope, visit.use)
            return
        try:
            self._log_refusal(refused)
            await self._replies.answer(refused, scope, send, handler_ran=False)
        finally:
            del refused  # it knows this frame, which knew it

    def _has_session(self, scope: Scope) -> bool:
        return self.error is None and self._nested.has_session(scope)

    def _visit(self, scope: Scope, *, lock: bool = True) -> Visit:
        if self.error is not None:
            raise self.error.with_traceback(None)  # else it grows, and keeps all it passed through
        if not self._is_placed:
            self.place(scope)
        method = scope.get("method", "GET")
        path = scope["path"]
        root = scope.get("root_path")
        if root and f"{path}/".startswith(root := root.rstrip("/") + "/"):
            path = path[len(root) - 1 :] or "/"
        # Looked for only where there is one, for its route match costs; it overrules path rules.
        use = (declarations.in_use and self.declared_use(scope)) or self._rules.use_of(method, path)
        access = use.access
        if not lock and access is not _NONE:
            use = Use(Access.READ_ONLY, use.wait_for_writer)
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
        if self._has_session(scope):
            await self.app(scope, receive, send)
            return
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
            if visit.cookie_can_be_sent:
                visit.cookie_can_be_sent = False
                self._report_unsent_id(visit, session, scope)
            visit.let_session_go()
            report_late_changes(session)
            if declarations.in_use and scope.get("session") is session:
                self.check_declared(scope, visit.use)

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
            message = self._replies.with_cookie(message, visit, session)
        return message

    def _report_unsent_id(self, visit: Visit, session: Session, scope: Scope) -> None:
        """Log that a browser was not told its session's new id. (One without loses nothing.)"""
        if visit.cookie is _SET and self._reader.values(scope["headers"]):
            log.warning(
                "session %s: its new id was stored, and no response of this request carried it: "
                "what changed the user or the id in a `release()` or in a block of "
                "`session.exclusive()` failed afterwards; the browser has the old one",
                session.key,
            )

    def _log_refusal(self, error: SessionError) -> None:
        if isinstance(error, SettingsError):
            self._say_broken(error)
        elif retry_after(error) is None:
            log.error("a request was refused: %s", error, exc_info=error)
        else:
            log.warning("a request was refused: %s", error)

    # -- what a framework's adapter knows better -------------------------------------------

    def mount_path(self, scope: Scope) -> str | None:
        """Where the application was told at its making that it is mounted; None: nowhere.

        Asked once, at the lifespan's start or at the first request. Never raises.
        """
        return None

    def declared_use(self, scope: Scope) -> Use | None:
        """What `session_access` declares for the view that a request will reach; None: nothing.

        Asked only in a process where something is declared. Never raises.
        """
        return None

    def check_declared(self, scope: Scope, use: Use) -> None:
        """Told, once the application is through, what a request was given. Never raises.

        Not of a request that other sessions inside of these took over.
        """
