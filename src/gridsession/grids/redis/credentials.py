"""User and password, from whoever knows them at the time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Protocol

from gridsession.errors import GridUnavailable

_HANGS_AFTER, _MOST_HANGING = 30.0, 5  # seconds; threads
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
    under_way: list[Future[Any]] = []  # in threads, the latest last
    began = 0.0

    def run(answer: Future[Any]) -> None:
        try:
            answer.set_result(provider.get_credentials())
        except BaseException as error:  # whoever waits is told
            answer.set_exception(error)

    async def given() -> Any:
        nonlocal began
        asynchronous = getattr(provider, "get_credentials_async", None)
        # redis-py's own base class has one that only warns, and asks the other on the loop.
        if asynchronous is not None and getattr(asynchronous, "__qualname__", "") != _BASE_ASYNC:
            return await asynchronous()
        # It may ask over a network. Another is begun only where one seems to hang, and a provider
        # that always hangs gathers few threads.
        under_way[:] = [answer for answer in under_way if not answer.done()]
        hangs = time.monotonic() > began + _HANGS_AFTER and len(under_way) < _MOST_HANGING
        if not under_way or hangs:
            began = time.monotonic()
            answer: Future[Any] = Future()
            answer.set_running_or_notify_cancel()  # else whoever gives up ends it for all
            under_way.append(answer)
            threading.Thread(target=run, args=(answer,), daemon=True).start()
        return await asyncio.wrap_future(under_way[-1])

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
