"""The same application over a provider that was opened, and used, when this module was imported."""

from __future__ import annotations

import asyncio
import os

from gridsession import SessionProvider, SessionSettings
from gridsession.web.starlette import SessionMiddleware
from tests.farm.app import make_app, options

provider = SessionProvider(SessionSettings.load(options=options()))


async def open_and_use() -> None:
    await provider.start()
    async with provider.open(None) as session:
        session["made_by"] = os.getpid()


asyncio.run(open_and_use())
app = make_app(os.environ.get("FARM_APP", "starlette"))
app.add_middleware(SessionMiddleware, provider=provider)
