"""Prints docs/settings.md, made from the docstrings of `SessionSettings`: see `make docs`."""

from __future__ import annotations

import dataclasses
import inspect

import griffe

from gridsession.settings import KINDS, SessionSettings
from gridsession.sources.given import PREFIX

HEAD = """\
# Settings

<!-- Made by `make docs` from the docstrings of gridsession.SessionSettings. -->

An option is set, the strongest first, by

1. an argument: `SessionMiddleware(timeout=1800)`, `SessionSettings(timeout=1800)`;
2. the framework's own settings, where it has some;
3. the environment: `GRIDSESSION_TIMEOUT=1800`. An empty variable sets nothing. Words for True and
   False are `true`, `1`, `yes`, `on` and `false`, `0`, `no`, `off`; `none` is None; access rules
   are a JSON object;
4. TOML: `timeout = 1800` in `gridsession.toml`, or in the table `[tool.gridsession]` of
   `pyproject.toml`, in the working directory;
5. `web.config` in the working directory: [coming from ASP.NET](coming-from-aspnet.md).

Each option for itself: the environment can set one that a file sets too, and leaves the others.
`GRIDSESSION_CONFIG` names another file to read, instead of all those in the working directory.
`gridsession doctor` shows every option, its value, and the place that won.

```toml
# gridsession.toml
timeout = 1800
https_only = true
connection_string_environment_variable = "SESSION_STORE"

[access]
"GET /catalog/*" = "read_only"
"/static/*" = "none"
```

A value of the wrong kind, and a name that is none of these options, keep the server from starting,
with an error that says which one, where it was set and what is allowed. (Of an environment
variable that is no slip of an option's name there is a warning only: Kubernetes sets
`GRIDSESSION_PORT` for a service of that name.)

## Where the connection string is

It may hold a password, and need not stand in a file beside the others. Instead of
`connection_string`, name the place that holds it, by one of

- `connection_string_environment_variable`: an environment variable of this name;
- `connection_string_app_setting`: an entry of this name in the framework's settings, in the table
  `[app_settings]` of the TOML file, or in the `appSettings` of web.config;
- `connection_string_element`: the same in `[connection_strings]` or `connectionStrings`.

Two of the four in one place are an error that names both; a stronger place overrules a weaker one.

## All options

"""


def reference() -> str:
    """The page's text."""
    docstring = griffe.Docstring(inspect.getdoc(SessionSettings) or "", lineno=1)
    sections = docstring.parse("google", warn_missing_types=False)
    (parameters,) = (
        section.value
        for section in sections
        if section.kind is griffe.DocstringSectionKind.parameters
    )
    described = {item.name: " ".join(item.description.split()) for item in parameters}
    return HEAD + "\n".join([*_table(described), ""])


def _table(described: dict[str, str]) -> list[str]:
    lines = ["| option | what it does | allowed | default |", "|---|---|---|---|"]
    for field in dataclasses.fields(SessionSettings):
        if field.name in KINDS:
            what = described[field.name]
            allowed = KINDS[field.name].allowed
            cells = (f"`{field.name}`", what, allowed, f"`{field.default!r}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", f"In the environment, `timeout` is `{PREFIX}TIMEOUT`, and so on."]
    return lines


if __name__ == "__main__":
    print(reference(), end="")
