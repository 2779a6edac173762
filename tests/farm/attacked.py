"""The application of `tests.farm.app`, with streams, and with every error that can be provoked.

FARM_DEBUG makes each logger say all that it has to say, asyncio's among them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from gridsession import Session
from gridsession.web.starlette import SessionMiddleware, session_of
from tests.farm.app import LONGEST_GATE, make_app, options

CHUNK = b"x" * 65_536


def mark(kind: str, name: str) -> None:
    (Path(os.environ["FARM_MARKS"]) / f"{kind}-{name}").touch()


async def gate(name: str) -> None:
    """Say `in-NAME`, wait for `go-NAME`, say `out-NAME`; or `cut-NAME`, when cancelled there."""
    mark("in", name)
    go = Path(os.environ["FARM_MARKS"]) / f"go-{name}"
    end = time.monotonic() + LONGEST_GATE
    try:
        while not go.exists():
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.005)
    except asyncio.CancelledError:
        mark("cut", name)
        raise
    mark("out", name)


def add(session: Session, request: Request) -> None:
    session.setdefault("numbers", []).append(int(request.query_params["n"]))


async def gated_stream(request: Request) -> Response:
    """Stores a number, once let through the gate, and answers by a stream."""
    session = session_of(request)
    await gate(request.query_params["name"])
    add(session, request)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"stored"

    return StreamingResponse(chunks())


async def big(request: Request) -> Response:
    """Stores a number, and answers by so many MiB, as a stream or in one piece."""
    add(session_of(request), request)
    parts = int(request.query_params["mib"]) * 16
    if "whole" in request.query_params:
        return Response(CHUNK * parts)

    async def chunks() -> AsyncIterator[bytes]:
        for number in range(parts):
            yield CHUNK
            if not number:
                mark("in", request.query_params["name"])
        mark("out", request.query_params["name"])

    return StreamingResponse(chunks())


async def locking_stream(request: Request) -> Response:
    """A stream that stops in the middle of a block of `exclusive()`."""
    session = session_of(request)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"begun "
        async with session.exclusive() as s:
            add(s, request)
            await gate(request.query_params["name"])
        yield b"done"

    return StreamingResponse(chunks())


class Unstorable:
    def __repr__(self) -> str:
        return os.environ["FARM_SECRET"]


async def fails(request: Request) -> Response:
    """Whatever the last segment of the path asks for."""
    session, secret = session_of(request), os.environ["FARM_SECRET"]
    match request.path_params["how"]:
        case "store":
            session.update(card=secret, list=[secret])
            session.user = f"{secret}@example.com"
        case "type":
            session["list"].append([secret, Unstorable()])
        case "large":
            session["big"] = secret * 1_000
        case "raise":
            session["card"] = secret * 2
            raise ZeroDivisionError
        case "nested":
            session["list"].append(secret)
        case "shown":
            return PlainTextResponse(f"{session!r} {session} {[session]}")
        case "stream":

            async def chunks() -> AsyncIterator[bytes]:
                yield b"."
                session["list"].append(secret)
                yield b"."

            return StreamingResponse(chunks())
        case "task":

            async def work() -> None:
                async with session.exclusive() as s:
                    s["card"] = Unstorable()

            asyncio.get_running_loop().create_task(work())  # that nobody looks after
        case "gated":
            session["card"] = secret * 2
            await gate(request.query_params["name"])
        case _:
            session["card"] = secret * 3
    return PlainTextResponse("ok")


@asynccontextmanager
async def _lifespan(_: Starlette) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0  # each callback is told, with its arguments
    yield


app = make_app("starlette")
if "FARM_DEBUG" in os.environ:
    logging.basicConfig(level=logging.DEBUG)
    logging.getLogger(__name__).debug("all is told")
    app.router.lifespan_context = _lifespan
app.add_route("/gated-stream", gated_stream, methods=["POST"])
app.add_route("/big", big, methods=["POST"])
app.add_route("/locking-stream", locking_stream, methods=["POST"])
app.add_route("/{place}/{token}/{how}", fails, methods=["POST"])
app.add_middleware(SessionMiddleware, **options())
