"""Who holds a lock, in words for those who wait for it."""

from __future__ import annotations

import os
import platform
import re
from functools import lru_cache

_KEPT = 512
_LONGEST_SEGMENT = 20  # characters
_LONGEST_METHOD = 16
_HOST = platform.node().partition(".")[0] or "localhost"
# At most three digits: what has more of them, or is longer, may be a key.
_SEGMENT = re.compile(rf"(?!(?:\D*\d){{4}})[A-Za-z0-9._~-]{{1,{_LONGEST_SEGMENT}}}")


def holder(method: str, path: str) -> str:
    """`POST /cart · web-3 · pid 71`: of the path its first segment, never the whole, which may
    hold secrets; and that only where it looks like a word.
    """
    # Cut here, since what is asked for is remembered, and anybody may ask for anything.
    first = (path + "/").split("/", 2)[1][: _LONGEST_SEGMENT + 1]
    return _holder(method[:_LONGEST_METHOD], first)


@lru_cache(maxsize=_KEPT)
def _holder(method: str, first: str) -> str:
    shown = first if not first or _SEGMENT.fullmatch(first) else "…"
    return f"{method} /{shown} · {_HOST} · pid {os.getpid()}"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_holder.cache_clear)  # another pid
