"""What the doctor shows: the values in force, and of a connection string nothing secret."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gridsession import SessionSettings
from gridsession.tools import show
from gridsession.tools.cli import make_cli
from gridsession.tools.doctor import examine
from gridsession.tools.report import settings_of
from tests.tools.running import on_terminal

SECRET = "hunter2"
HALF = "0f-the-gr1d"
KEY, OTHER_KEY = bytes(range(32)).hex(), bytes(range(32, 64)).hex()
MOUNTED = """
import warnings
from fastapi import FastAPI
from gridsession.web.starlette import SessionMiddleware

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    app = FastAPI(root_path="/shop")
app.add_middleware(SessionMiddleware, connection_string={given!r})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mounted_app", raising=False)
    return tmp_path


# -- in force -------------------------------------------------------------------------------------


def in_force(settings: SessionSettings, namespace: str | None, name: str) -> tuple[Any, str]:
    (one,) = (one for one in settings_of(settings, namespace) if one.name == name)
    return one.value, one.source


@pytest.mark.parametrize(
    ("given", "namespace", "value", "source"),
    [
        (None, "/", "/", "default"),
        (None, "/shop", "/shop", "where the application is mounted"),
        (None, None, None, "default"),
        ("shop", "shop", "shop", "argument"),
        (None, f"/x://{SECRET}@h", "***", "where the application is mounted"),
    ],
)
def test_the_namespace(given: str | None, namespace: str | None, value: Any, source: str) -> None:
    settings = SessionSettings(namespace=given)
    assert in_force(settings, namespace, "namespace") == (value, source)


def test_the_cookies_name() -> None:
    plain, secure = SessionSettings(), SessionSettings(https_only=True)
    assert in_force(plain, "/", "session_cookie") == ("session", "worked out")
    assert in_force(secure, "/", "session_cookie") == ("__Host-session", "worked out")
    named = SessionSettings(session_cookie="sid")
    assert in_force(named, "/", "session_cookie") == ("sid", "argument")


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ([], None),
        ([KEY], "1 key"),
        ([OTHER_KEY, KEY], "2 keys"),
        (["plain", KEY], "plain and 1 key"),
        ([KEY, "plain"], "1 key and plain"),
    ],
)
def test_of_encryption_keys_only_how_many(given: list[str], value: str | None) -> None:
    settings = SessionSettings(encryption_keys=given)
    assert in_force(settings, "/", "encryption_keys")[0] == value


@pytest.mark.parametrize("keys", [["plain", KEY], [KEY, KEY], [OTHER_KEY, KEY[:63]]])
def test_no_report_shows_a_key(keys: list[str], folder: Path) -> None:
    lines = (f"encryption_keys = {json.dumps(keys)}", 'connection_string = "memory://"')
    (folder / "gridsession.toml").write_text("\n".join(lines))
    for options in ([], ["--json"]):
        shown = CliRunner().invoke(make_cli(), ["doctor", *options])
        assert "encryption_keys" in shown.output
        for part in (KEY[:12], KEY[-12:], OTHER_KEY[:12], str(bytes.fromhex(KEY))[2:-1]):
            assert part not in shown.output


def test_a_mounted_applications_namespace(folder: Path) -> None:
    (folder / "mounted_app.py").write_text(MOUNTED.format(given="memory://"))
    settings = {one.name: one for one in examine(app="mounted_app:app").settings}
    namespace = settings["namespace"]
    assert (namespace.value, namespace.source) == ("/shop", "where the application is mounted")


def test_without_an_application(folder: Path) -> None:
    (folder / "gridsession.toml").write_text('connection_string = "memory://"\n')
    settings = {one.name: one for one in examine().settings}
    assert (settings["namespace"].value, settings["namespace"].source) == ("/", "default")


# -- nothing secret -------------------------------------------------------------------------------

LEAKING = [
    f"{SECRET}:{HALF}",
    f"{SECRET.upper()}:{HALF}",
    f"{SECRET}:{HALF}@cache",
    f"{SECRET}:/{HALF}",
    f"{SECRET}:?{HALF}//x",
    f"{SECRET}.{HALF}:x//y",
    f"otherdb://{SECRET}:{HALF}@h",
    f"otherdb:{SECRET}:{HALF}",
    f"memory:{SECRET}",
    f"embedded:{SECRET}?{HALF}=1",
    f"embedded:///proc/no?max_size=1MiB&{SECRET}={HALF}",
    f"redis://{SECRET}:{HALF}@h/1?client_name={SECRET}",
    f"redis:{SECRET}:{HALF}",
    f"Password={SECRET};User={HALF}",
    f"bootstrapGateways=h:1;username={SECRET};password={HALF}",
]


@pytest.mark.parametrize("how", ["file", "app"])
@pytest.mark.parametrize("form", ["", "--json"])
@pytest.mark.parametrize("given", LEAKING)
def test_no_part_of_a_connection_string_that_may_be_secret_is_shown(
    given: str, form: str, how: str, folder: Path
) -> None:
    args = ["doctor", *form.split()]
    if how == "app":
        (folder / "mounted_app.py").write_text(MOUNTED.format(given=given))
        args += ["--app", "mounted_app:app"]
    else:
        (folder / "gridsession.toml").write_text(f"connection_string = {json.dumps(given)}\n")
    result = CliRunner().invoke(make_cli(), args)
    assert result.exit_code == 1
    shown = (result.stdout + result.stderr).lower()
    assert SECRET not in shown
    assert HALF not in shown


@pytest.mark.parametrize("given", LEAKING[:2])
def test_nor_on_a_terminal(given: str, tmp_path: Path) -> None:
    given_in = {"GRIDSESSION_CONNECTION_STRING": given}
    done = on_terminal("doctor", cwd=tmp_path, env=given_in)
    assert done.status == 1
    assert SECRET not in done.said.lower()
    assert HALF not in done.said


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("memory:", "memory"),
        ("embedded:///proc/no", "embedded"),
        ("rediss://h", "redis"),
        ("bootstrapGateways=h:1", "redis"),
        ("OtherDB://h", "otherdb"),
        ("otherdb:h", "other"),
        ("otherdb:/h", "other"),
    ],
)
def test_the_kind_of_grid(given: str, kind: str, folder: Path) -> None:
    (folder / "gridsession.toml").write_text(f"connection_string = {json.dumps(given)}\n")
    assert examine().grid["kind"] == kind


# -- the working directory ------------------------------------------------------------------------


@pytest.mark.parametrize("app", [None, "mounted_app:app"])
def test_a_working_directory_that_is_gone(
    app: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    report = examine(app=app)
    assert report.exit_status == 1
    (error,) = report.findings
    assert error.what == "the working directory cannot be used: No such file or directory"
    assert error.do
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("app", [None, "mounted_app:app"])
def test_a_working_directory_that_cannot_be_searched(
    app: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> Any:
        if path == ".":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patched:  # root may search all, and tests may run as root
        patched.setattr(os, "stat", stat)
        report = examine(app=app)
    assert report.exit_status == 1
    (error,) = report.findings
    assert error.what == "the working directory cannot be used: Permission denied"


def test_files_of_settings_that_cannot_be_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(SessionSettings, "load", load)
    report = examine()
    assert report.exit_status == 1
    assert "cannot be looked for: Permission denied" in report.findings[0].what


# -- the page -------------------------------------------------------------------------------------


def test_the_pages_example_shows_what_is_shown(folder: Path) -> None:
    given = f"embedded://{folder}/grid?max_size=1MiB"
    (folder / "mounted_app.py").write_text(MOUNTED.format(given=given))
    examine(app="mounted_app:app")  # the store is there from now on
    shown = show.as_text(examine(app="mounted_app:app"))
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    example = page[page.index("```\ngridsession") + 4 :].partition("```")[0]
    assert names(example) == names(shown)


def names(text: str) -> list[str]:
    """What stands before two spaces, up to the findings."""
    lines = text.partition("\nFindings")[0].splitlines()
    return [line.strip().partition("  ")[0] for line in lines]
