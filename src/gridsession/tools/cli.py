"""The commands, as Typer has them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from gridsession.errors import SettingsError
from gridsession.sources import keys
from gridsession.tools import show
from gridsession.tools.doctor import examine

_APP = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_EXAMPLES = """\
Examples:

gridsession doctor

gridsession doctor --app shop.main:app

gridsession doctor --json

gridsession migrate web.config -o gridsession.toml

gridsession new-key
"""
_DOCTOR_EXAMPLES = """\
Exit status: 0 nothing is wrong (warnings are not), 1 something is, 2 wrong usage.

Examples:

gridsession doctor --app shop.main:app

gridsession doctor --config /etc/shop/gridsession.toml --json
"""
_MIGRATE_EXAMPLES = """\
Examples:

gridsession migrate web.config

gridsession migrate web.config -o gridsession.toml
"""
_NEW_KEY_EXAMPLES = """\
Examples:

gridsession new-key

export GRIDSESSION_ENCRYPTION_KEYS="$(gridsession new-key)"
"""


def make_cli() -> typer.Typer:
    """The command line, with colours and boxes where a terminal shows them."""
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    cli = typer.Typer(
        name="gridsession",
        help="Server-side sessions for Python web farms: look at them, and move in.",
        epilog=_EXAMPLES,
        no_args_is_help=True,
        rich_markup_mode="rich" if on_terminal else None,
        pretty_exceptions_enable=False,  # it would show what stands in variables
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    cli.callback()(_about)
    cli.command(short_help="Look at settings, grid and speed.", epilog=_DOCTOR_EXAMPLES)(doctor)
    cli.command(short_help="Move from a web.config.", epilog=_MIGRATE_EXAMPLES)(migrate)
    cli.command(short_help="Make an encryption key.", epilog=_NEW_KEY_EXAMPLES)(new_key)
    return cli


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gridsession {version('gridsession')}")
        raise typer.Exit


def _about(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Taken by every command."""


def _app_name(name: str | None) -> str | None:
    if name is not None and not _APP.fullmatch(name):
        raise typer.BadParameter("write module:app, as for a server: shop.main:app")
    return name


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            readable=True,
            help="A file of settings, TOML or web.config. With --app: what GRIDSESSION_CONFIG "
            "names while the application is imported.",
        ),
    ] = None,
    app: Annotated[
        str | None,
        typer.Option(
            "--app",
            metavar="MODULE:APP",
            callback=_app_name,
            help="The application whose SessionMiddleware to look at, as a server is told it. "
            "Without it: the settings that an application would find here.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, and nothing else on standard output.")
    ] = False,
) -> None:
    """Tell which settings are in force, whether the grid works, and how fast."""
    try:
        with _spinner() as tell:
            report = examine(config, app, tell)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(show.as_json(report))
    elif show.is_terminal():
        show.print_rich(report)
    else:
        typer.echo(show.as_text(report))
    raise typer.Exit(report.exit_status)


@contextlib.contextmanager
def _spinner() -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is being done; elsewhere it says nothing."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with show.terminal(stderr=True).status("looking") as status:
        yield status.update


def migrate(
    web_config: Annotated[
        Path,
        typer.Argument(
            metavar="WEB.CONFIG",
            exists=True,
            dir_okay=False,
            readable=True,
            help="The file of an ASP.NET application.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            dir_okay=False,
            help="Write it there, readable by you only; else it is printed.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Turn the session settings of a web.config into a gridsession.toml."""
    from gridsession.sources.web_config import read
    from gridsession.tools.migrate import to_toml

    try:
        source = read(web_config)
        text = to_toml(source)
    except SettingsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if output is None:
        typer.echo(text, nl=False)
    else:
        _write(output, text, force=force)
    for note in source.notes:
        typer.echo(f"note: {note}", err=True)


def new_key() -> None:
    """Print a new key for the option encryption_keys. It is kept nowhere."""
    typer.echo(keys.new_key(os.urandom))


def _write(path: Path, text: str, *, force: bool) -> None:
    """All of it or nothing; for its owner only, since it may hold a password."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            if force:
                os.replace(name, path)
            else:
                os.link(name, path)  # fails where something is there, whoever was faster
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    except FileExistsError:
        typer.echo(f"error: {path.name} is there already; --force overwrites it", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"error: {path.name} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(1) from None
