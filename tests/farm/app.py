"""The application that every server of these tests serves, as Starlette's and as FastAPI's.

The environment says how: FARM_APP (`starlette` or `fastapi`), FARM_OPTIONS (the middleware's, as
JSON), FARM_MARKS (a folder through which handlers and tests tell each other where they are).
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gridsession import Session
from gridsession.web.starlette import CurrentSession, SessionMiddleware, session_of

ACCESS = {"/read": "read_only", "/heartbeat": "none"}
LONGEST_GATE = 20.0  # seconds after which a handler stops waiting for its test


def options() -> dict[str, Any]:
    """The middleware's options: the environment's, beside what all tests share."""
    return {"access": ACCESS, **json.loads(os.environ.get("FARM_OPTIONS", "{}"))}


def increment(session: Session, number: int, count: int) -> dict[str, int]:
    """Store one number; `count` was read before the handler paused, as careless code does."""
    session.setdefault("numbers", []).append(number)
    session["count"] = count + 1
    return {"pid": os.getpid(), "count": count + 1}


async def add(request: Request) -> Response:
    session = session_of(request)
    count = session.get("count", 0)
    await asyncio.sleep(float(request.query_params.get("hold", 0)))
    return JSONResponse(increment(session, int(request.query_params["n"]), count))


async def gated(request: Request) -> Response:
    """Say `in-NAME`, wait for `go-NAME`, store a number."""
    name, marks = request.query_params["name"], Path(os.environ["FARM_MARKS"])
    session = session_of(request)
    count = session.get("count", 0)
    (marks / f"in-{name}").touch()
    end = time.monotonic() + LONGEST_GATE
    while not (marks / f"go-{name}").exists():
        if time.monotonic() > end:
            break
        await asyncio.sleep(0.005)
    answer = increment(session, int(request.query_params["n"]), count)
    (marks / f"out-{name}").touch()
    return JSONResponse(answer)


async def read(request: Request) -> Response:
    return JSONResponse(dict(request.session))


async def heartbeat(request: Request) -> Response:
    return PlainTextResponse(str(os.getpid()))


def make_app(kind: str) -> Starlette:
    """The application, without its session middleware."""
    app = FastAPI() if kind == "fastapi" else Starlette()
    if isinstance(app, FastAPI):

        @app.post("/add")
        async def add_by_parameter(
            session: CurrentSession, n: int, hold: float = 0
        ) -> dict[str, int]:
            count = session.get("count", 0)
            await asyncio.sleep(hold)
            return increment(session, n, count)

        @app.post("/sync")
        def add_in_thread(session: CurrentSession, n: int, hold: float = 0) -> dict[str, int]:
            count = session.get("count", 0)
            time.sleep(hold)
            return increment(session, n, count)

    app.add_route("/add", add, methods=["POST"])
    app.add_route("/gated", gated, methods=["POST"])
    app.add_route("/read", read, methods=["GET"])
    app.add_route("/look", read, methods=["GET"])  # with the lock, and stores nothing
    app.add_route("/heartbeat", heartbeat, methods=["GET"])
    return app


app = make_app(os.environ.get("FARM_APP", "starlette"))
app.add_middleware(SessionMiddleware, **options())
