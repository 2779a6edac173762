"""User and password, from whoever knows them at the time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Protocol

from gridsession.errors import GridUnavailable

_BASE_ASYNC = "CredentialProvider.get_credentials_async"  # redis-py's own

Credentials = tuple[str | None, str | None]  # user, password


class CredentialProvider(Protocol):
    """Asked at each new connection: redis-py's interface, whose implementations fit.

    One that has `get_credentials_async` is asked by that.
    """

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """(user, password), or (password,)."""
        ...


def asked(provider: CredentialProvider) -> Callable[[], Awaitable[Credentials]]:
    """What a `Server` asks for credentials."""
    under_way: Future[Any] | None = None  # in a thread

    def run(answer: Future[Any]) -> None:
        try:
            answer.set_result(provider.get_credentials())
        except BaseException as error:  # whoever waits is told
            answer.set_exception(error)

    async def given() -> Any:
        nonlocal under_way
        asynchronous = getattr(provider, "get_credentials_async", None)
        # redis-py's own base class has one that only warns, and asks the other on the loop.
        if asynchronous is not None and asynchronous.__qualname__ != _BASE_ASYNC:
            return await asynchronous()
        # It may ask over a network. Never twice at once: one that hangs gathers no threads.
        if under_way is None or under_way.done():
            under_way = Future()
            under_way.set_running_or_notify_cancel()  # else whoever gives up ends it for all
            threading.Thread(target=run, args=(under_way,), daemon=True).start()
        return await asyncio.wrap_future(under_way)

    async def ask() -> Credentials:
        try:
            told = await given()
            user, password = (None, *told) if len(told) == 1 else told
        except Exception as error:  # its text is another's, and may hold a password
            raise GridUnavailable(
                f"the credential provider failed: {type(error).__name__}"
            ) from None
        return user, password

    return ask
