"""A `gridsession.toml` that says what another source says."""

from __future__ import annotations

import tomli_w

from gridsession.sources.given import TABLES, Given, Source


def to_toml(source: Source) -> str:
    """The text of a `gridsession.toml` with the options of a source.

    Its notes become comments at the head. Of the source's entries only those come along that an
    option names as the place of the connection string; the others are the application's own.

    Args:
        source: what was read, for instance from a web.config.

    Returns:
        TOML, which holds what is secret wherever the source does; its comments hold no values.
    """
    document: dict[str, object] = {name: given.value for name, given in source.options.items()}
    for option, table in TABLES.items():
        entries: dict[str, Given] = getattr(source, table)
        name = document.get(option)
        if isinstance(name, str) and name in entries:
            document[table] = {name: entries[name].value}
    lines = [_comment(f"Settings of gridsession, from {source.name}.")]
    if source.notes:
        lines += ["#", "# Not heeded, or to be looked at:", *map(_comment, source.notes)]
    return "\n".join([*lines, "", tomli_w.dumps(document)])


def _comment(text: str) -> str:
    """One line: what a file or an element is called may hold an end of line."""
    return "# " + "".join(c if c.isprintable() else " " for c in text)
