"""What a namespace's keys are called at a server."""

from __future__ import annotations

from urllib.parse import quote

_KEPT = 16  # bytes of a key: as many bits as a session's handle has, and 32 bytes less to be stored
PARTS = 64  # of the index of deadlines: what is due at one second lies on several nodes of a farm


class Names:
    """The names of one namespace.

    Args:
        namespace: sets the records of several applications apart.

    Attributes:
        prefix: what all of them begin with, channels too.
        flag: of the key that says how many seconds the ends of sessions are kept for handlers.
    """

    def __init__(self, namespace: str) -> None:
        # Without what means something in a name of the server's or in a pattern of its ACLs.
        self.prefix = b"gs:%b:" % quote(namespace, safe="/").encode()
        self.flag = self.prefix + b"ends"

    def record(self, key: bytes) -> bytes:
        """Of a record, and of the channel of its lock; `key` may be its entry in the index."""
        return self.prefix + key[:_KEPT]

    def entry(self, key: bytes) -> bytes:
        """What stands for a record in the index."""
        return key[:_KEPT]

    def part(self, key: bytes) -> bytes:
        """Of the part of the index in which a record's deadline is."""
        return self.part_at(key[0])

    def part_at(self, number: int) -> bytes:
        return b"%bdue:%d" % (self.prefix, number % PARTS)
