"""A request's way through: life cycle, locks, leases, and the work beside them."""

from gridsession.provider.core import SessionProvider

__all__ = ["SessionProvider"]
