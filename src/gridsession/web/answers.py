"""The answers that the middleware gives itself, and the pages that an application puts there."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from gridsession.errors import (
    GridFull,
    GridUnavailable,
    SessionError,
    SessionLockTimeout,
    SessionQueueFull,
    SessionReplaced,
)
from gridsession.provider.log import log
from gridsession.web.types import ASGIApp, Message, Scope, Send

Headers = list[tuple[bytes, bytes]]

# What the same request may meet again a moment later with better luck, and how much later.
_RETRY_AFTER: dict[type[SessionError], int] = {
    GridUnavailable: 1,
    GridFull: 10,
    SessionLockTimeout: 5,
    SessionQueueFull: 5,
    SessionReplaced: 1,
}
_NO_STORE = (b"cache-control", b"no-store")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request gets no answer from its handler, as `on_error` is told.

    Attributes:
        scope: the request's ASGI scope, with neither its session nor the session's cookie: an
            error page has no session. Nor with what the application's routers made of it, or with
            headers that were about the handler's answer (`Range`, `If-…`).
        error: what failed, without traceback and causes, which are in the log. Its text is for
            operators.
        status: what the plain page would have: 503 or 500.
        retry_after: seconds after which the same request may have better luck; None: no telling.
        handler_ran: whether the handler ran: what it did beside the session is done, and only
            the session was not stored. Nobody should be invited to send such a request again.
    """

    scope: Scope = field(repr=False)  # it holds the whole path
    error: SessionError
    status: int
    retry_after: int | None
    handler_ran: bool


def comes_of(error: BaseException | None, cause: BaseException | None) -> bool:
    """Whether an exception is another one, or was raised because of it."""
    return cause is not None and _comes_of(error, cause, set())


def _comes_of(error: BaseException | None, cause: BaseException, seen: set[int]) -> bool:
    if error is None or id(error) in seen:  # anyio leaves errors whose context is their own group
        return False
    if error is cause:
        return True
    seen.add(id(error))
    if isinstance(error, BaseExceptionGroup):
        return all(_comes_of(one, cause, seen) for one in error.exceptions)
    return _comes_of(error.__cause__ or error.__context__, cause, seen)


OnError = Callable[[Failure], ASGIApp | Awaitable[ASGIApp | None] | None]
"""What `on_error` may be: a function, or an async one, that returns any ASGI application (each
Starlette `Response` is one), or None for the plain page."""


def retry_after(error: SessionError) -> int | None:
    """The seconds after which to try again, where that may help."""
    # By all of its classes: a grid may raise errors of its own that are one of ours.
    kinds = (_RETRY_AFTER.get(kind) for kind in type(error).__mro__)
    return next((after for after in kinds if after is not None), None)


async def answer(
    send: Send,
    scope: Scope,
    error: Exception,
    *,
    handler_ran: bool,
    on_error: OnError | None,
    cookie_name: str | None,
) -> None:
    """Answer in the handler's place: with the page that `on_error` has for it, or a plain one.

    Args:
        send: where to.
        scope: the request's.
        error: what failed.
        handler_ran: whether the handler did, so that nobody may be told to try again.
        on_error: the application's function, if it has one.
        cookie_name: of the session's cookie, which `on_error` is not shown; None: of no cookie.
    """
    after = None if handler_ran or not isinstance(error, SessionError) else retry_after(error)
    status = 500 if after is None else 503
    if on_error is not None:
        if not isinstance(error, SessionError):  # its text is another's, and may hold a value
            error = SessionError(f"The session was not stored: {type(error).__name__}.")
        failure = Failure(
            scope=_without_session(scope, cookie_name),
            error=_bare(error),
            status=status,
            retry_after=after,
            handler_ran=handler_ran,
        )
        if await _Page(failure, send).answers(on_error):
            return
    await _answer_plainly(send, status, after)


async def _answer_plainly(send: Send, status: int, after: int | None) -> None:
    if after is None:
        body = b"Internal Server Error\n"
    else:
        body = b"Service Unavailable. Please try again.\n"
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        _NO_STORE,
    ]
    if after is not None:
        headers.append((b"retry-after", str(after).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Page:
    """An answer of the application's own, kept back until it is whole: half of one cannot be
    replaced any more.

    Args:
        failure: what the page is for.
        send: where it goes.
    """

    def __init__(self, failure: Failure, send: Send) -> None:
        self._failure = failure
        self._send = send
        self._kept: list[Message] = []
        self._whole = False
        self._sent = asyncio.Event()
        self._asked = False
        self._unsent: BaseException | None = None  # what the way to the client failed with

    async def answers(self, on_error: OnError) -> bool:
        """Whether the page was sent. What is wrong with it is logged."""
        try:
            page = on_error(self._failure)
            if inspect.isawaitable(page):
                page = await page
            if page is None:
                log.info("on_error has no page for %s", type(self._failure.error).__name__)
                return False
            if not callable(page):
                raise TypeError(f"on_error returned a {type(page).__name__}, no ASGI application")
            await page(self._failure.scope, self._receive, self._take)
            if not self._whole:
                raise RuntimeError("the page of on_error ended before its response did")
        except (Exception, asyncio.CancelledError) as error:
            if self._unsent is not None and comes_of(error, self._unsent):
                raise self._unsent  # noqa: B904 - what the page made of it is of no interest
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise  # the request is; else the page awaited something that was
            outcome = "after it was sent" if self._whole else "the plain one was sent"
            text = str(error) or type(error).__name__
            log.error("the page of on_error failed, %s: %s", outcome, text, exc_info=error)
        return self._whole

    async def _receive(self) -> Message:
        """No body: the handler has read it, or part of it, or nobody ever will."""
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._sent.wait()  # Starlette's responses stop sending when they hear of it
        return {"type": "http.disconnect"}

    async def _take(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            message = self._checked(message)
        self._kept.append(message)
        if not self._whole:
            if kind not in _LAST or message.get("more_body"):
                return
            if all(kept["type"] != "http.response.start" for kept in self._kept):
                raise RuntimeError("the page of on_error sent a body without a status")
            self._whole = True
        messages, self._kept = self._kept, []
        try:
            for kept in messages:
                await self._send(kept)
        except BaseException as error:
            self._unsent = error
            raise
        self._sent.set()

    def _checked(self, message: Message) -> Message:
        """The start of a page, with what our own answers carry."""
        status, failure = message["status"], self._failure
        if failure.handler_ran and status < 400:
            raise RuntimeError(
                f"status {status} would say that all went well, but the session was not stored"
            )
        replaced = {b"cache-control"}
        if failure.handler_ran:
            replaced.add(b"retry-after")  # or a proxy repeats a charged card
        headers = [h for h in message.get("headers", ()) if h[0].lower() not in replaced]
        headers.append(_NO_STORE)
        after = failure.retry_after
        if after is not None and all(name.lower() != b"retry-after" for name, _ in headers):
            headers.append((b"retry-after", str(after).encode()))
        return {**message, "headers": headers}


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


_LAST = ("http.response.body", "http.response.zerocopysend", "http.response.pathsend")


def _bare(error: SessionError) -> SessionError:
    """The same error without traceback and causes: their frames hold ids and payloads."""
    bare = type(error).__new__(type(error), *error.args)
    bare.__dict__.update(error.__dict__)
    return bare


def _without_session(scope: Scope, cookie_name: str | None) -> Scope:
    headers: Headers = []
    for name, value in scope["headers"]:
        if name == b"range" or name.startswith(b"if-"):
            continue  # they are about the handler's answer: no 304, and no part of a page
        if name != b"cookie":
            headers.append((name, value))
        elif cookie_name is not None and (kept := _other_cookies(value, cookie_name.encode())):
            headers.append((name, kept))
    shown = {**scope, "headers": headers}
    shown.pop("session", None)
    return shown


_ROUTERS = {
    *("app", "app_root_path", "endpoint", "path", "path_params", "root_path", "route", "router")
}


def unrouted(scope: Scope, before: Scope) -> Scope:
    """A request's scope without what the application's routers left in it, so that others, those
    of an error page, find it as they would have.

    Args:
        scope: as it is.
        before: as it was when it came.
    """
    kept = {k: v for k, v in scope.items() if k not in _ROUTERS and not k.startswith("fastapi")}
    return kept | {k: v for k, v in before.items() if k not in kept}


def _other_cookies(value: bytes, name: bytes) -> bytes:
    parts = value.split(b";")
    return b";".join(p for p in parts if p.partition(b"=")[0].strip() != name).lstrip()


def varying_by_cookie(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers with `Cookie` among what the response varies by, and everything else kept."""
    kept: Headers = []
    vary = b""
    for header in headers:
        if header[0].lower() == b"vary":
            vary = vary + b", " + header[1] if vary else header[1]
        else:
            kept.append(header)
    if not {b"cookie", b"*"} & {name.strip().lower() for name in vary.split(b",")}:
        vary = vary + b", Cookie" if vary else b"Cookie"
    kept.append((b"vary", vary))
    return kept
