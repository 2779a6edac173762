"""How the command line ends: standard output that takes nothing, applications that do not end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gridsession.grids.embedded.files import read_state
from tests.tools.running import COMMAND, SECONDS, Done, environment

SAYS = "error: standard output cannot be written: "
LINGERS = """
import asyncio, atexit, threading
from gridsession.grids import make_grid
from gridsession.web.asgi import SessionMiddleware

left_open = make_grid({other!r})
asyncio.run(left_open.open())
print("said at import")
atexit.register(print, "said at exit")
{lingering}
app = SessionMiddleware(print, connection_string={grid!r}, https_only=True)
"""


def in_shell(order: str, *args: str, cwd: Path) -> Done:
    """`order`, in which "$@" stands for `gridsession …`, on the streams that it says."""
    done = subprocess.run(
        ["sh", "-c", order, "sh", *COMMAND, *args],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    grid = f'connection_string = "embedded://{tmp_path}/grid?max_size=1MiB"\n'
    (tmp_path / "gridsession.toml").write_text(grid + "https_only = true\n")
    (tmp_path / "web.config").write_text('<sessionState timeout="20"/>')
    return tmp_path


@pytest.mark.parametrize(
    ("stream", "why"), [(">&-", "it is closed"), (">/dev/full", "No space left on device")]
)
@pytest.mark.parametrize("command", ["doctor", "doctor --json", "--help", "migrate web.config"])
def test_what_cannot_be_written_is_told_in_a_line(
    stream: str, why: str, command: str, folder: Path
) -> None:
    if stream.endswith("full") and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    for buffered in ("-u", ""):
        order = f'export PYTHONUNBUFFERED={buffered}; exec "$@" {stream}'
        done = in_shell(order, *command.split(), cwd=folder)
        assert (done.status, done.err) == (1, f"{SAYS}{why}\n")


def test_nothing_is_said_where_nothing_can_be(folder: Path) -> None:
    for streams in (">&- 2>&-", ">&- 2>&- <&-"):
        done = in_shell(f'exec "$@" {streams}', "doctor", cwd=folder)
        assert (done.status, done.said) == (1, "")


def test_without_standard_error_it_works(folder: Path) -> None:
    for streams in ("2>&-", "2>&- <&-"):
        done = in_shell(f'exec "$@" {streams}', "doctor", "--json", cwd=folder)
        assert done.status == 0
        assert json.loads(done.out)["measurements"]["hand_off"] is not None
        state = read_state(folder / "grid")
        assert state is not None
        assert state.clean


def test_a_pipe_that_nobody_reads_is_no_word_worth(folder: Path) -> None:
    done = in_shell('{ "$@"; echo "ended with $?" >&2; } | true', "doctor", cwd=folder)
    assert done.err == "ended with 1\n"


@pytest.mark.parametrize(
    "lingering",
    [
        "threading.Thread(target=threading.Event().wait).start()",
        "from concurrent.futures import ThreadPoolExecutor\n"
        "ThreadPoolExecutor().submit(threading.Event().wait)",
        "hanging = threading.Event(); threading._register_atexit(hanging.wait)",
        "",
    ],
)
def test_an_application_that_does_not_end(lingering: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    source = LINGERS.format(
        other=f"embedded://{other}?max_size=1MiB",
        grid=f"embedded://{tmp_path}/grid?max_size=1MiB",
        lingering=lingering,
    )
    (tmp_path / "lingers.py").write_text(source)
    done = in_shell('exec "$@"', "doctor", "--app", "lingers:app", "--json", cwd=tmp_path)
    assert (done.status, done.err) == (0, "said at import\nsaid at exit\n")
    assert json.loads(done.out)["measurements"]["hand_off"] is not None
    for folder in (other, tmp_path / "grid"):
        state = read_state(folder)
        assert state is not None
        assert state.clean


def test_an_exit_handler_that_does_not_end(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(
        "import atexit, threading; atexit.register(threading.Event().wait)\napp = None\n"
    )
    code = "from gridsession import tools; tools._LAST_SECONDS = 0.1; tools.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--app", "hangs:app"],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "no SessionMiddleware" in done.stdout
