"""A small shop that several worker processes serve, with two session stores side by side.

The shop keeps its cart in `request.session`, from gridsession. Under `/unlocked` the same handlers
run on a store without locks. Left out, since it is a demonstration: CSRF tokens, which a shop
needs, and HTTPS, with which one sets `https_only=True`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from examples.shop.unlocked import COOKIE, UnlockedSessions
from gridsession.web.starlette import SessionMiddleware, session_of

HERE = Path(__file__).parent
CLICKS = 20  # that the page sends at once
PAUSE = 0.05  # seconds that a database or a payment provider takes to answer
COLOURS = 6  # of workers, in static/shop.css


class Product(NamedTuple):
    """Something to buy; the price is in cents."""

    sku: str
    name: str
    cents: int


PRODUCTS = {
    product.sku: product
    for product in (
        Product("lemon", "Lemon", 60),
        Product("apple", "Apple", 45),
        Product("bread", "Bread", 380),
        Product("cheese", "Cheese", 520),
        Product("honey", "Honey", 740),
        Product("tea", "Mint tea", 290),
    )
}

templates = Jinja2Templates(directory=HERE / "templates")
templates.env.filters["price"] = lambda cents: f"€ {cents // 100}.{cents % 100:02}"


# -- the session: the same code for both stores ----------------------------------------------------


def count_request(session: dict[str, Any]) -> None:
    """Remember which worker has served this session, and how often."""
    workers = session.setdefault("workers", {})
    pid = str(os.getpid())
    workers[pid] = workers.get(pid, 0) + 1
    session.setdefault("started", int(time.time()))


def contents(session: dict[str, Any]) -> JSONResponse:
    return JSONResponse(
        {"cart": session.get("cart", {}), "is_new": "started" not in session},
        headers={"cache-control": "no-store"},
    )


async def visit(request: Request) -> Response:
    """Make sure that there is a session, before many requests use it at once."""
    count_request(request.session)
    return contents(request.session)


async def show_cart(request: Request) -> Response:
    return contents(request.session)


async def add_to_cart(request: Request) -> Response:
    """Read the cart, ask somebody else, write the cart."""
    began = time.perf_counter()
    async with request.form() as form:
        sku = str(form.get("sku"))
    if sku not in PRODUCTS:
        return PlainTextResponse("The shop has no such product.\n", status_code=404)
    session = request.session
    cart = session.setdefault("cart", {})
    await asyncio.sleep(PAUSE)
    cart[sku] = cart.get(sku, 0) + 1
    count_request(session)
    if "application/json" not in request.headers.get("accept", ""):
        return RedirectResponse("/#cart", status_code=303)
    return JSONResponse(
        {
            "pid": os.getpid(),
            "quantity": cart[sku],
            "waited": getattr(session, "waited", 0.0),  # a plain dict waits for nobody
            "worked": time.perf_counter() - began,
        },
        headers={"connection": "close"},  # so that any worker may get this browser's next click
    )


# -- the shop --------------------------------------------------------------------------------------


def view(request: Request) -> dict[str, Any]:
    """What the templates show of the session. Its id is not among it: that is a secret."""
    session = session_of(request)
    workers = session.get("workers", {})
    cart = session.get("cart", {})
    lines = [(PRODUCTS[sku], quantity) for sku, quantity in cart.items() if sku in PRODUCTS]
    return {
        "products": PRODUCTS.values(),
        "lines": lines,
        "quantity": sum(quantity for _, quantity in lines),
        "total": sum(product.cents * quantity for product, quantity in lines),
        "pid": os.getpid(),
        "workers": [
            {"pid": pid, "requests": requests, "colour": place % COLOURS}
            for place, (pid, requests) in enumerate(workers.items())
        ],
        "requests": sum(workers.values()),
        "age": max(0, int(time.time()) - session.get("started", int(time.time()))),
        "minutes": round(session.timeout / 60),
        "key": session.key[:12] if workers else None,
        "grid": os.environ.get("GRID_SHOWN"),
        "clicks": CLICKS,
        "pause": round(PAUSE * 1000),
    }


async def page(request: Request) -> Response:
    count_request(request.session)
    return templates.TemplateResponse(
        request,
        "page.html",
        view(request),
        headers={"content-security-policy": "default-src 'self'", "cache-control": "no-store"},
    )


async def live(request: Request) -> Response:
    """The parts of the page that change, for the script to put in their places."""
    return templates.TemplateResponse(
        request, "live.html", view(request), headers={"cache-control": "no-store"}
    )


async def start_over(request: Request) -> Response:
    """An empty session without user is removed, and its cookie with it."""
    request.session.clear()
    response = RedirectResponse("/", status_code=303)
    response.delete_cookie(COOKIE, path="/unlocked")
    return response


store = [
    Route("/visit", visit, methods=["POST"]),
    Route("/cart", show_cart, methods=["GET"]),
    Route("/cart", add_to_cart, methods=["POST"]),
]
unlocked_directory = Path(os.environ.get("UNLOCKED_DIRECTORY") or tempfile.gettempdir())
app = Starlette(
    routes=[
        Route("/", page),
        Route("/live", live),
        Route("/start-over", start_over, methods=["POST"]),
        *store,
        Mount(
            "/unlocked",
            routes=store,
            middleware=[Middleware(UnlockedSessions, directory=unlocked_directory)],
        ),
        Mount("/static", StaticFiles(directory=HERE / "static"), name="static"),
    ]
)
app.add_middleware(
    SessionMiddleware,
    connection_string=os.environ.get("GRID") or "embedded:",
    namespace="shop",
    session_cookie="shop",  # other programs on this machine's 127.0.0.1 may use "session"
    access={
        "/static/*": "none",
        "/unlocked/*": "none",
        "GET /cart": "read_only",
        "GET /live": "read_only",
    },
    request_queue_limit_per_session=100,
)
