"""Looking into a Redis that sessions are kept in from outside, without taking part in it."""

from __future__ import annotations

from typing import Any

from tests.provider.harness import identity_of
from tests.redis_server import RedisServer


class Peek:
    """Looking into the records of a Redis from outside, without taking part.

    Args:
        server: where they are.
        namespace: as in the settings, of letters and digits alone.
    """

    def __init__(self, server: RedisServer, namespace: str) -> None:
        self._server = server
        self._prefix = f"gs:{namespace}:".encode()

    def _head(self, session_id: str, expression: str) -> Any:
        key = identity_of(session_id).key
        return self._server.admin.eval(
            "local raw = redis.call('GET', KEYS[1]) "
            "if not raw then return -1 end "
            f"local _, record = cmsgpack.unpack_one(raw, 5) return {expression}",
            1,
            self._prefix + key[:16],
        )

    def tickets(self, session_id: str) -> int:
        """How many wait for a session; -1: there is none."""
        return int(self._head(session_id, "#record[16]"))

    def is_locked(self, session_id: str) -> bool:
        return bool(self._head(session_id, "record[11] and 1 or 0") == 1)

    def calls(self) -> int:
        """Scripts that the server was asked to run since it began, those of this class too."""
        stats = self._server.admin.info("commandstats")
        return sum(
            int(stats.get(f"cmdstat_{x}", {"calls": 0})["calls"]) for x in ("eval", "evalsha")
        )

    def ears(self) -> list[dict[str, str]]:
        """The connections that listen for notices, as CLIENT LIST tells of them."""
        listed: list[dict[str, str]] = self._server.admin.client_list(_type="pubsub")
        return listed
