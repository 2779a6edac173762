"""The command line: help, version, completion, wrong usage, `migrate`."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gridsession import SessionSettings
from gridsession.tools.cli import make_cli
from tests.tools.running import SECONDS, environment, on_terminal, piped

SECRET = "hunter2-of-the-grid"
WEB_CONFIG = f"""<configuration>
 <system.web>
  <sessionState mode="Custom" customProvider="P" timeout="20" sqlCommandTimeout="9">
   <add name="P" connectionString="redis://:{SECRET}@cache"/>
  </sessionState>
 </system.web>
</configuration>"""


@pytest.fixture
def web_config(tmp_path: Path) -> Path:
    path = tmp_path / "web.config"
    path.write_text(WEB_CONFIG)
    return path


def run(*args: str | Path) -> tuple[int, str, str]:
    """In this process: exit status, stdout, stderr."""
    result = CliRunner().invoke(make_cli(), [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


# -- itself ---------------------------------------------------------------------------------------


def test_version(tmp_path: Path) -> None:
    from importlib.metadata import version

    done = piped("--version", cwd=tmp_path)
    assert (done.status, done.out, done.err) == (0, f"gridsession {version('gridsession')}\n", "")


def test_help_is_plain_in_a_pipe() -> None:
    for command in ("", "doctor", "migrate", "new-key"):
        status, out, err = run(*command.split(), "--help")
        assert (status, err) == (0, "")
        assert "Examples:" in out
        assert "\n  gridsession" in out  # each on a line of its own
        assert out.replace("…", "").isascii()  # no boxes
        assert "\x1b" not in out


def test_help_has_colours_on_a_terminal(tmp_path: Path) -> None:
    done = on_terminal("--help", cwd=tmp_path)
    assert done.status == 0
    assert "╭" in done.out
    assert "\x1b[" in done.out
    assert "gridsession doctor" in done.out


def test_completion(tmp_path: Path) -> None:
    asked = {
        "_GRIDSESSION_COMPLETE": "complete_bash",
        "COMP_WORDS": "gridsession doctor --j",
        "COMP_CWORD": "2",
    }
    assert piped(cwd=tmp_path, env=asked).out.split() == ["--json"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "Usage"),
        (["doctr"], "Did you mean 'doctor'?"),
        (["doctor", "--jsn"], "--json"),
        (["doctor", "--app", "shop"], "module:app"),
        (["doctor", "--app", "shop.py:app"], "no module"),
        (["doctor", "--app", f"redis://:{SECRET}@cache"], "module:app"),
        (["doctor", "--config", "nowhere.toml"], "does not exist"),
        (["migrate", "nowhere.config"], "does not exist"),
        (["migrate"], "WEB.CONFIG"),
    ],
)
def test_wrong_usage(args: list[str], says: str) -> None:
    status, out, err = run(*args)
    assert status == (1 if says == "no module" else 2)
    assert says in out + err
    assert SECRET not in out + err
    assert "Traceback" not in out + err


def test_without_its_packages_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "import gridsession.tools\n"
        "print('imported', flush=True); gridsession.tools.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == "imported\n"
    assert done.stderr == "the command line needs: pip install gridsession[cli]\n"


# -- new-key --------------------------------------------------------------------------------------


def test_new_key_prints_a_key_and_nothing_else(tmp_path: Path) -> None:
    made = [piped("new-key", cwd=tmp_path) for _ in range(2)]
    for done in made:
        assert (done.status, done.err) == (0, "")
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", done.out)
        assert SessionSettings.load(None, {"GRIDSESSION_ENCRYPTION_KEYS": done.out}).encryption_keys
    assert made[0].out != made[1].out
    assert os.listdir(tmp_path) == []


# -- migrate --------------------------------------------------------------------------------------


def test_migrate_prints(web_config: Path) -> None:
    status, out, err = run("migrate", web_config)
    assert status == 0
    settings = tomllib.loads(out)
    assert settings["timeout"] == 1200
    assert settings["connection_string"] == f"redis://:{SECRET}@cache"
    assert "sqlCommandTimeout" in err  # cannot be heeded
    assert all(line.startswith("note: ") for line in err.splitlines())
    assert SECRET not in err


def test_migrate_writes_a_file_that_nobody_else_reads(web_config: Path, tmp_path: Path) -> None:
    file = tmp_path / "gridsession.toml"
    before = os.umask(0)
    try:
        status, out, err = run("migrate", web_config, "-o", file)
    finally:
        os.umask(before)
    assert (status, out) == (0, "")
    assert "note: " in err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert tomllib.loads(file.read_text())["timeout"] == 1200
    assert sorted(os.listdir(tmp_path)) == ["gridsession.toml", "web.config"]


def test_migrate_overwrites_nothing_unless_forced(web_config: Path, tmp_path: Path) -> None:
    file = tmp_path / "gridsession.toml"
    file.write_text("timeout = 5\n")
    file.chmod(0o644)
    status, out, err = run("migrate", web_config, "-o", file)
    assert (status, out) == (1, "")
    assert "--force" in err
    assert file.read_text() == "timeout = 5\n"
    status, out, err = run("migrate", web_config, "-o", file, "--force")
    assert status == 0
    assert tomllib.loads(file.read_text())["timeout"] == 1200
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["gridsession.toml", "web.config"]


def test_migrate_says_what_is_wrong(web_config: Path, tmp_path: Path) -> None:
    status, out, err = run("migrate", web_config, "-o", tmp_path / "no" / "such" / "folder")
    assert (status, out) == (1, "")
    assert err == "error: folder cannot be written: No such file or directory\n"
    web_config.write_text(f"<configuration><{SECRET}")
    status, out, err = run("migrate", web_config)
    assert (status, out) == (1, "")
    assert err.startswith("error: web.config")
    assert SECRET not in err
