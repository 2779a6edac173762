"""A session store without locks, for comparison.

It does what every session package does that locks nothing, whatever its storage (files, Redis, a
database): load the whole session when a request begins, save the whole of it at the end if it
changed. Two requests at once both load the same session, and the one that saves last wipes out
what the other did. The files are written atomically, so nothing is ever torn; it is lost all the
same.
"""

from __future__ import annotations

import json
import os
import secrets
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "unlocked"


class UnlockedSessions:
    """ASGI middleware: `request.session` from one JSON file a session, with no lock.

    Args:
        app: the application.
        directory: where the files are; all workers share it.
    """

    def __init__(self, app: ASGIApp, directory: Path) -> None:
        self.app = app
        self.directory = directory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        cookie = HTTPConnection(scope).cookies.get(COOKIE, "")
        file = self.file_of(cookie)
        is_new = not file.exists()
        session_id = secrets.token_urlsafe(32) if is_new else cookie
        file = self.file_of(session_id)
        before = "{}" if is_new else file.read_text()
        session: dict[str, Any] = json.loads(before)

        async def save_and_send(message: Message) -> None:
            after = json.dumps(session)
            if message["type"] == "http.response.start" and after != before:
                draft = file.with_suffix(f".{secrets.token_hex(4)}")
                draft.write_text(after)
                os.replace(draft, file)
                if is_new:
                    MutableHeaders(scope=message).append(
                        "set-cookie",
                        f"{COOKIE}={session_id}; Path={scope['root_path']}; HttpOnly; SameSite=Lax",
                    )
            await send(message)

        await self.app({**scope, "session": session}, receive, save_and_send)

    def file_of(self, session_id: str) -> Path:
        return self.directory / sha256(session_id.encode()).hexdigest()
