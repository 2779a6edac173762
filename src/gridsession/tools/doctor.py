"""`gridsession doctor`: settings, grid and measured times of an application, and what they mean.

Asks of the grid what the application would ask, on a record of its own. It never changes the
application's records, and of session ids, payloads and passwords nothing comes into its report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gridsession.errors import GridUnavailable, SessionError, SettingsError
from gridsession.grids.contract import Grid
from gridsession.provider import SessionProvider
from gridsession.settings import SessionSettings, seconds
from gridsession.sources.connection_string import (
    Address,
    EmbeddedAddress,
    MemoryAddress,
    OtherAddress,
    RedisAddress,
    shown,
)
from gridsession.sources.given import CONFIG_VARIABLE
from gridsession.tools.find_app import AppError, find_middleware, import_app
from gridsession.tools.findings import of_place, of_server, of_settings, of_times
from gridsession.tools.hand_off import NotMeasured, hand_offs, why
from gridsession.tools.measure import RECORD_SECONDS, Left, OwnRecord, WrongAnswer, own_record
from gridsession.tools.place import Facts, look, look_inside
from gridsession.tools.redis_server import ask, cure
from gridsession.tools.report import Report, settings_of

_LOG = logging.getLogger("gridsession")
_MEND = "mend the setting; the application does not start with it"
_ON_MEMORY = "memory://"  # what its own log lines begin with; the report says it in its own words
Tell = Callable[[str], None]


def _say_nothing(text: str) -> None:
    pass


def examine(
    config: Path | None = None, app: str | None = None, tell: Tell = _say_nothing
) -> Report:
    """Look at what an application's sessions are made of.

    Args:
        config: a file of settings, as `SessionSettings.load` takes it. With `app` it is the one
            that `GRIDSESSION_CONFIG` names while the application is imported.
        app: `module:app`, whose own middleware is looked at; None for the settings that an
            application would find here.
        tell: is told what is being done.

    Returns:
        The report. What is wrong is a finding in it, never an exception.
    """
    report = Report(version("gridsession"))
    if not _has_folder(report):
        return report
    with _quiet(report), _config(config if app is not None else None):
        if app is None:
            provider = _from_settings(report, config)
        else:
            tell(f"importing {app.partition(':')[0]}")
            provider = _from_app(report, app)
        if provider is not None:
            _look_at_grid(report, provider, tell)
    return report


def _has_folder(report: Report) -> bool:
    """Files of settings, the default store and the application are looked for from there."""
    try:
        os.getcwd()  # fails where it was deleted
        os.stat(".")  # fails where this user may not search it
    except OSError as error:
        report.say(
            "error",
            f"the working directory cannot be used: {error.strerror}",
            "run the doctor in the folder from which the server is started, as its user",
        )
        return False
    return True


# -- settings ---------------------------------------------------------------------------------


def _from_settings(report: Report, config: Path | None) -> SessionProvider | None:
    try:
        settings = SessionSettings.load(config)
    except SettingsError as error:
        report.say("error", str(error), _MEND)
        return None
    except OSError as error:
        report.say(
            "error",
            f"the files of settings cannot be looked for: {error.strerror}",
            "run the doctor in the folder from which the server is started, as its user",
        )
        return None
    _take_settings(report, settings)
    try:
        provider = SessionProvider(settings)
        _take_namespace(report, provider)
        return provider
    except SettingsError as error:
        is_of_the_grid = error.option in (None, "connection_string")
        do = "mend connection_string, or install its package"
        report.say("error", str(error), do if is_of_the_grid else _MEND)
    except ImportError as error:
        report.say(
            "error",
            f"connection_string: the grid's package needs {error.name!r}, which is not there",
            "install it",
        )
    except Exception as error:  # of another package's grid; its text may hold a password
        report.say(
            "error",
            f"connection_string: making the grid failed: {type(error).__name__}",
            "look at the documentation of the grid's package",
        )
    return None


def _from_app(report: Report, app: str) -> SessionProvider | None:
    try:
        found = find_middleware(import_app(app))
    except AppError as error:
        report.say("error", error.what, error.do)
        return None
    if found.settings is not None:
        _take_settings(report, found.settings)
    if found.count > 1:
        report.say(
            "warning",
            f"the application has {found.count} SessionMiddlewares around it; this is about the "
            "outermost",
            "keep one",
        )
    if found.middleware.error is not None:
        report.say(
            "error",
            f"the application's SessionMiddleware cannot work: {found.middleware.error}",
            "mend the setting; until then the server does not start, or answers 500",
        )
        return None
    _take_namespace(report, found.middleware.provider)
    return found.middleware.provider


def _take_namespace(report: Report, provider: SessionProvider) -> None:
    report.settings = settings_of(provider.settings, provider.namespace)


def _take_settings(report: Report, settings: SessionSettings) -> None:
    report.settings = settings_of(settings)
    report.findings += of_settings(settings)
    address = settings.address()
    report.grid = {"kind": _kind(address)}
    if isinstance(address, RedisAddress):
        report.grid |= {"where": shown(address), "form": address.kind, "tls": address.tls}


def _kind(address: Address) -> str:
    match address:
        case MemoryAddress():
            return "memory"
        case EmbeddedAddress():
            return "embedded"
        case RedisAddress():
            return "redis"
        case OtherAddress(scheme=scheme, is_url=is_url):
            # Without the slashes it may be a user's name, or half of a password.
            return scheme if is_url else "other"


# -- the grid ---------------------------------------------------------------------------------


def _look_at_grid(report: Report, provider: SessionProvider, tell: Tell) -> None:
    if isinstance(provider.settings.address(), MemoryAddress) and provider.owns_grid:
        report.grid = {"kind": "memory", "where": provider.grid.where}
        report.say(
            "warning",
            "memory:// keeps sessions in each process for itself: nothing of it can be measured "
            "from here, no other worker sees them, and they end with the process",
            "use embedded: for more than one worker, or for sessions that outlive a restart",
        )
        return
    if not provider.owns_grid:
        report.grid = {"kind": type(provider.grid).__name__, "made_by": "the application"}
    if _redis(provider.grid) is not None:
        report.grid |= {"kind": "redis", "where": provider.grid.where}
    embedded = _embedded(provider.grid)
    facts = None
    if embedded is not None:
        try:
            facts = look(embedded)
        except SettingsError as error:
            report.say("error", str(error), "mend connection_string")
            return
        except OSError as error:
            report.say(
                "error",
                f"the folder of the embedded grid cannot be looked at: {error.strerror}",
                "run the doctor as the user that the application runs as",
            )
            return
        report.grid = {"kind": "embedded", **facts.shown()}
        report.findings += of_place(facts)
        if facts.reasons_to_stay_out():
            return
    asyncio.run(_measure(report, provider, facts, tell))


def _embedded(grid: Grid) -> Any:
    """The grid where it is an embedded one, as itself."""
    try:
        from gridsession.grids.embedded import EmbeddedGrid
    except ImportError:  # no such grid on this system
        return None
    return grid if isinstance(grid, EmbeddedGrid) else None


def _redis(grid: Grid) -> Any:
    """The grid where it is one in Redis, as itself."""
    try:
        from gridsession.grids.redis import RedisGrid
    except ImportError:  # its package is not there
        return None
    return grid if isinstance(grid, RedisGrid) else None


async def _measure(
    report: Report, provider: SessionProvider, facts: Facts | None, tell: Tell
) -> None:
    grid, redis = provider.grid, _redis(provider.grid)
    try:
        tell("opening the grid")
        if redis is None:
            await grid.open()
        elif not await _open_redis(report, redis):
            return
        try:
            if redis is not None:
                tell("asking the server about itself")
                await _take_server(report, redis)
            elif facts is not None:
                _take_inside(report, grid, facts)
            else:
                report.grid["where"] = grid.where
            async with own_record(grid) as record:
                await _ask(report, record, tell)
            await _hand_off(report, provider, tell)
            is_farm = redis is not None
            report.findings += of_times(report.round_trip, report.hand_off, is_farm=is_farm)
        finally:
            await grid.close()
    except Left:
        report.say(
            "warning",
            "the grid did not let the doctor remove its record",
            f"nothing: it expires by itself within {RECORD_SECONDS:g} s",
        )
    except WrongAnswer as error:
        report.say("error", str(error), "report it: that must not happen")
    except SettingsError as error:
        report.say("error", str(error), _MEND)
    except GridUnavailable as error:
        report.say(
            "error",
            str(error),
            "until the grid answers, the application answers 503; docs/errors.md says more",
        )
    except SessionError as error:
        report.say("error", str(error), "docs/errors.md says what to do")
    except Exception as error:  # its text is another's, and may hold a password
        report.say("error", f"the grid failed: {type(error).__name__}", "look at its own log")


async def _open_redis(report: Report, grid: Any) -> bool:
    """Whether the server lets us in; what keeps us out is said, and what to do about it."""
    try:
        await grid.open()
    except (SettingsError, GridUnavailable) as error:
        what = str(error)
        heals = "" if isinstance(error, SettingsError) else "; until then requests get 503"
        do = cure(what) or "docs/errors.md says more"
        report.say("error", what, do + heals)
        await grid.close()
        return False
    return True


async def _take_server(report: Report, grid: Any) -> None:
    facts = await ask(grid)
    report.grid |= facts.shown()
    report.ping = facts.ping
    report.findings += of_server(facts)


def _take_inside(report: Report, grid: Any, before: Facts) -> None:
    """What is known of an embedded grid now that it is open, in place of what was known before."""
    facts = look_inside(grid)
    report.grid |= facts.shown()
    outdated = of_place(before)
    report.findings = [one for one in report.findings if one not in outdated] + of_place(facts)
    if not before.exists:
        report.grid["created_just_now"] = True
        report.say(
            "warning",
            f"there was no store; it was made just now, by the user {facts.user}, as the "
            "application would have made it",
            "nothing, if the application runs as that user; else remove the folder before it "
            "starts",
        )


async def _ask(report: Report, record: OwnRecord, tell: Tell) -> None:
    tell("asking the grid for all that a request needs")
    await record.call_all()
    report.say("ok", "the grid answered create, acquire, renew, read, commit and release")
    tell("measuring the round trip")
    report.round_trip = await record.round_trips()


async def _hand_off(report: Report, provider: SessionProvider, tell: Tell) -> None:
    tell("measuring the hand-off between two processes")
    settings = provider.settings
    try:
        if not provider.owns_grid:
            raise NotMeasured("the application made its grid itself, and only it can make another")
        report.hand_off = await hand_offs(
            connection_string=settings.connection_string,
            namespace=provider.namespace,
            timeout=seconds(settings.grid_timeout),
        )
    except (NotMeasured, OSError) as error:
        reason = str(error) if isinstance(error, NotMeasured) else why(error)
        report.say(
            "warning",
            f"the hand-off between two processes was not measured: {reason}",
            "run the doctor again on a quiet machine; if it stays, look whether a second process "
            "can open the grid",
        )


# -- around it --------------------------------------------------------------------------------


class _Collected(logging.Handler):
    """What is logged on our logger is said in the report."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not text.startswith((_ON_MEMORY, *self._of_redis())):
            self._report.say(
                "error" if record.levelno >= logging.ERROR else "warning",
                text,
                "the application logs the same when it starts",
            )

    def _of_redis(self) -> tuple[str, ...]:
        """What a grid in Redis logs of its server; the report says it in its own words."""
        if self._report.grid.get("kind") != "redis":
            return ()
        return (f"{self._report.grid['where']}: ", "sessions cannot be reached: ")


@contextlib.contextmanager
def _quiet(report: Report) -> Iterator[None]:
    """What we, and an application that is imported, have to say goes elsewhere than to stdout."""
    handler, propagate, path = _Collected(report), _LOG.propagate, list(sys.path)
    _LOG.addHandler(handler)
    _LOG.propagate = False
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)  # also for what it starts, and for what is written in C
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        sys.path[:] = path
        _LOG.propagate = propagate
        _LOG.removeHandler(handler)


@contextlib.contextmanager
def _config(path: Path | None) -> Iterator[None]:
    """While an application is imported, its file of settings."""
    if path is None:
        yield
        return
    before = os.environ.get(CONFIG_VARIABLE)
    os.environ[CONFIG_VARIABLE] = str(path.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ[CONFIG_VARIABLE]
        else:
            os.environ[CONFIG_VARIABLE] = before
