"""What a server's user may do, asked before the first session needs it."""

from __future__ import annotations

from gridsession.errors import GridUnavailable
from gridsession.grids.redis.connections import Connections
from gridsession.grids.redis.names import Names
from gridsession.grids.redis.replies import ServerReply
from gridsession.grids.redis.scripts import PERMITTED

_PROBE = bytes(32)  # no session's key: SHA-256 of nothing known


async def refused(connections: Connections, names: Names) -> list[str]:
    """The commands that the server's user may not run, of all that the grid has use for.

    None of them is run on what is stored.

    Raises:
        GridUnavailable: the server cannot be reached.
        ServerReply: it refuses for another reason.
    """
    link, record = connections.ends().link, names.record(_PROBE)
    part = names.part(_PROBE)
    try:
        found = await link.call(
            *(b"EVAL", PERMITTED.source, b"1", record, part, names.flag),
        )
        if type(found) is not list:
            raise GridUnavailable(
                f"{connections.server.where} does not run scripts as a Redis does"
            )
        return sorted(command.decode() for command in found)
    except ServerReply as reply:
        if reply.code != "NOPERM":
            raise
    # Who may run no script, or not on such a name, is asked one by one.
    denied = []
    for words in (
        (b"PING",),
        (b"TIME",),
        (b"GET", names.flag),
        (b"EVALSHA", b"0" * 40, b"1", record),
        (b"EVAL", b"return 0", b"1", record),
    ):
        try:
            await link.call(*words)
        except ServerReply as reply:
            if reply.code == "NOPERM":
                denied.append(words[0].decode())
    return sorted(denied)
