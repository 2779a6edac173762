"""What a server says of itself, and what of it endangers sessions."""

from __future__ import annotations

from collections.abc import Mapping


def told(info: bytes | str) -> Mapping[str, str]:
    """The fields of an `INFO` reply."""
    text = info.decode("utf-8", "replace") if isinstance(info, bytes) else info
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}


def concerns(info: bytes | str) -> list[str]:
    """What an operator should know of a server that sessions are kept in, a sentence each."""
    fields, found = told(info), []
    policy = fields.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(
            f"maxmemory-policy is {policy}: a full server throws sessions away without a word; "
            "set noeviction, and it answers 503 instead"
        )
    if fields.get("aof_enabled") == "0" and fields.get("role", "master") == "master":
        replicas = fields.get("connected_slaves", "0")
        found.append(
            "appendonly is off: a restart of the server takes back what came after its last "
            "snapshot, or all" + (f" (it has {replicas} replicas)" if replicas != "0" else "")
        )
    if fields.get("rdb_last_bgsave_status", "ok") != "ok":
        found.append("its last snapshot failed (rdb_last_bgsave_status); its log says why")
    if fields.get("aof_last_write_status", "ok") != "ok":
        found.append("its last write to the append-only file failed; its log says why")
    return found
