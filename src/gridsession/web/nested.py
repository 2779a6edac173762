"""Sessions inside of sessions: a middleware around another one, for one request."""

from __future__ import annotations

from gridsession.access import Access
from gridsession.provider.log import log
from gridsession.provider.visit import Visit
from gridsession.session import Session
from gridsession.web.types import Scope


class Nested:
    """What a middleware knows of others around it.

    Two with one cookie cannot both work: the inner one would wait for the lock that its own request
    holds, and each would overwrite the other's cookie.

    Args:
        cookie_name: of the middleware that asks.
    """

    def __init__(self, cookie_name: str) -> None:
        self._cookie_name = cookie_name
        self._said = False

    def has_session(self, scope: Scope) -> bool:
        """Whether a request has its session already, of another middleware with this cookie.

        Not where that one's access is `none`: it leaves the path to this one.
        """
        session = scope.get("session")
        if not isinstance(session, Session) or session.access is Access.NONE:
            return False
        visit = session._bound
        # A middleware that is through lets go of the session: a scope may be used again.
        if not isinstance(visit, Visit) or getattr(visit, "session", None) is not session:
            return False
        if visit._provider.settings.cookie_name != self._cookie_name:
            return False
        if not self._said:
            self._said = True
            log.warning(
                "a SessionMiddleware is inside of another one whose cookie is %s as well, and uses "
                "its session: remove one of the two, or give the inner one another "
                "session_cookie, or the outer one the access none for this path",
                self._cookie_name,
            )
        return True
