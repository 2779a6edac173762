"""`gridsession doctor` beside real grids and real applications, as processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest

from gridsession import SessionProvider, SessionSettings
from gridsession.grids.embedded.files import read_state, write_state
from gridsession.identity import name_of, parse_id
from gridsession.tools import doctor
from gridsession.tools.doctor import examine
from gridsession.tools.report import Report, Timing
from tests.farm.peek import peek
from tests.farm.servers import free_port, wait_for
from tests.tools.running import SECONDS, environment, on_terminal, piped

SECRET = "hunter2-of-the-grid"
PAYLOAD = "pl4yl04d-m4rk3r"
ADDED = """
from starlette.applications import Starlette
from gridsession.web.starlette import SessionMiddleware

app = Starlette()
app.add_middleware(
    SessionMiddleware, connection_string={grid!r}, namespace="shop", https_only=True
)
"""
WRAPPED = """
import os, subprocess, sys
from gridsession.web.asgi import SessionMiddleware

print("said at import")
sys.stdout.write("said again")
os.system("echo said by another")
subprocess.run(["echo", "and another"])

async def plain(scope, receive, send):
    pass

class Wraps:
    def __init__(self, app):
        self.app = app

app = Wraps(SessionMiddleware(plain, connection_string={grid!r}, lock_wait_timeout=90))
import atexit; atexit.register(print, "said at exit")
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return tmp_path / "grid"


def address(grid: Path) -> str:
    return f"embedded://{grid}?max_size=4MiB"


def configured(tmp_path: Path, **settings: Any) -> list[str]:
    """`--config` with a file of these settings."""
    lines = (f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    (tmp_path / "gridsession.toml").write_text("".join(lines))
    return ["--config", "gridsession.toml"]


def is_left_alone(grid: Path) -> bool:
    """Nobody has it open, and nobody has left anything in it."""
    state = read_state(grid)
    return state is not None and state.clean and not entries(grid) and not list_bells(grid)


def list_bells(grid: Path) -> list[str]:
    return os.listdir(grid / "bells")


def entries(grid: Path) -> int:
    with peek(grid) as looking:
        return looking.entries()


def said(report: Report, severity: str) -> str:
    return "\n".join(
        f"{one.what} -> {one.do}" for one in report.findings if one.severity == severity
    )


def store(grid: Path, namespace: str = "/") -> str:
    """A session of the application's own; its id."""

    async def run() -> str:
        settings = SessionSettings(connection_string=address(grid), namespace=namespace)
        async with SessionProvider(settings) as provider, provider.open(None) as session:
            session["card"] = PAYLOAD
            session.user = PAYLOAD
            assert session.id is not None
            return session.id

    return asyncio.run(run())


# -- the whole of it ------------------------------------------------------------------------------


def test_in_a_pipe(tmp_path: Path, grid: Path) -> None:
    options = configured(tmp_path, connection_string=address(grid), https_only=True)
    done = piped("doctor", *options, cwd=tmp_path, env={"GRIDSESSION_ROLLING": "yes"})
    assert (done.status, done.err) == (0, "")
    assert "\x1b" not in done.out
    lines = {" ".join(line.split()) for line in done.out.splitlines()}
    assert f"connection_string embedded://{grid}?*** gridsession.toml: connection_string" in lines
    assert "rolling yes environment variable GRIDSESSION_ROLLING" in lines
    assert "timeout 1200 default" in lines
    assert "size 4.0 MiB" in lines
    assert "permissions 0700" in lines
    assert "created just now yes" in lines
    assert "ok the grid answered create, acquire, renew, read, commit and release" in lines
    assert lines & {"no errors, 1 warning"}
    assert "granted in another process" in done.out
    assert is_left_alone(grid)


def test_on_a_terminal(tmp_path: Path, grid: Path) -> None:
    options = configured(tmp_path, connection_string=address(grid), namespace="[red]x[/red]")
    done = on_terminal("doctor", *options, cwd=tmp_path)
    assert done.status == 0
    assert "\x1b[33mwarning" in done.out
    assert "\x1b[32mok" in done.out
    assert "measuring the hand-off" in done.out  # the spinner
    assert "[red]x[/red]" in done.out  # no markup
    assert "no errors, 2 warnings" in done.out
    plain = on_terminal("doctor", *options, cwd=tmp_path, env={"NO_COLOR": "1"}).out
    assert "\x1b[3" not in plain
    assert "no errors, 1 warning" in plain


def test_json(tmp_path: Path, grid: Path) -> None:
    (tmp_path / "shop.py").write_text(ADDED.format(grid=address(grid)))
    session_id = store(grid, "shop")
    with peek(grid, "shop") as looking:
        before = looking.record(session_id)
    done = piped("doctor", "--app", "shop:app", "--json", cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    report = json.loads(done.out)
    assert list(report) == ["version", "settings", "grid", "measurements", "findings"]
    settings = {one.pop("name"): one for one in report["settings"]}
    assert settings["namespace"] == {"value": "shop", "source": "argument"}
    assert settings["timeout"] == {"value": 1200.0, "source": "default"}
    found = report["grid"]
    assert (found["kind"], found["path"]) == ("embedded", str(grid))
    assert found["path_from"] == "connection_string"
    assert (found["size_bytes"], found["layout"], found["durable"]) == (4 << 20, 1, False)
    assert (found["records"], found["locks"]) == (1, 0)
    assert found["used_bytes"] > 0
    assert found["disk_free_bytes"] > 0
    assert found["boot_id_fits"] is True
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert [key for key in (*report, *found) if f"`{key}`" not in page] == []
    times = report["measurements"]
    assert list(times) == ["ping", "round_trip", "hand_off"]
    assert times.pop("ping") is None
    assert (times["round_trip"]["count"], times["hand_off"]["count"]) == (200, 20)
    for time in times.values():
        assert 0 < time["median_ms"] <= time["p99_ms"]
    for finding in report["findings"]:
        assert list(finding) == ["severity", "what", "do"]
        assert finding["severity"] == "ok"
    assert len(report["findings"]) == 3
    # The application's own record is as it was, and is all that there is.
    with peek(grid, "shop") as looking:
        assert looking.record(session_id) == before
        assert looking.entries() == 3  # record, payload, deadline
    identity = parse_id(session_id.encode())
    assert identity is not None
    for secret in (PAYLOAD, session_id, name_of(identity.key), identity.key.hex()):
        assert secret not in done.out


def test_json_is_all_that_an_application_lets_onto_stdout(tmp_path: Path, grid: Path) -> None:
    (tmp_path / "noisy.py").write_text(WRAPPED.format(grid=address(grid)))
    done = piped("doctor", "--app", "noisy:app", "--json", cwd=tmp_path)
    assert done.status == 0
    report = json.loads(done.out)
    assert "said at exit" in done.err
    assert "said by another" in done.err
    whats = [one["what"] for one in report["findings"] if one["severity"] == "warning"]
    assert [what.split(" ")[0] for what in whats] == ["https_only", "lock_wait_timeout=90", "there"]
    assert is_left_alone(grid)


def test_an_error_is_told_by_the_exit_status(tmp_path: Path) -> None:
    given = f"redis://user:{SECRET}@127.0.0.1:{free_port()}/2?client_name={SECRET}"
    done = piped("doctor", "--json", cwd=tmp_path, env={"GRIDSESSION_CONNECTION_STRING": given})
    assert (done.status, done.err) == (1, "")
    report = json.loads(done.out)
    assert report["grid"]["kind"] == "redis"
    assert report["grid"]["where"].startswith("redis://***@127.0.0.1:")
    assert report["measurements"] == {"ping": None, "round_trip": None, "hand_off": None}
    (error,) = (one for one in report["findings"] if one["severity"] == "error")
    assert "no server listens there" in error["what"]
    assert SECRET not in done.said


@pytest.mark.parametrize("module", ["measure", "hand_off"])
def test_interrupted_it_leaves_nothing(module: str, tmp_path: Path, grid: Path) -> None:
    code = (
        f"from gridsession.tools import main, {module} as measuring\n"
        "measuring._ROUNDS, measuring._LONGEST, measuring._PATIENCE = 10**9, 60.0, 60.0\n"
        "main()"
    )
    configured(tmp_path, connection_string=address(grid))
    process = subprocess.Popen(
        [sys.executable, "-c", code, "doctor"],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:

        def is_measuring() -> bool:
            assert process.poll() is None
            try:
                # The second process waits, and the first never does.
                bells = int(module == "hand_off")
                return entries(grid) > 0 and len(list_bells(grid)) == bells
            except (lmdb.Error, OSError):  # just being made
                return False

        wait_for("a record", is_measuring, SECONDS / 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS / 3)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert is_left_alone(grid)


# -- in this process, where each run takes less ----------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_the_applications_own_file_of_settings(
    tmp_path: Path, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from gridsession.web.asgi import SessionMiddleware\napp = SessionMiddleware(print)\n"
    (tmp_path / "app_with_file.py").write_text(source)
    (tmp_path / "other.toml").write_text(f'connection_string = "{address(grid)}"\ntimeout = 77\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = dict(os.environ), list(sys.path)
    report = examine(Path("other.toml"), "app_with_file:app")
    assert (dict(os.environ), sys.path) == before
    assert report.exit_status == 0
    (timeout,) = (one for one in report.settings if one.name == "timeout")
    assert timeout.value == 77
    assert timeout.source.endswith("other.toml: timeout")
    assert report.round_trip is not None
    assert is_left_alone(grid)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"timout": 5}, "did you mean 'timeout'"),
        ({"connection_string": "embedded:relative"}, "absolute path"),
        ({"connection_string": f"otherdb://{SECRET}@h"}, "there is no grid for the scheme"),
        ({"connection_string": "embedded:///proc/no"}, "the embedded grid cannot use"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], what: str, tmp_path: Path) -> None:
    configured(tmp_path, **settings)
    report = examine(tmp_path / "gridsession.toml")
    assert report.exit_status == 1
    assert what in said(report, "error")
    assert SECRET not in str(report)


def test_a_package_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(tmp_path, connection_string="memory://", encryption_keys=bytes(range(32)).hex())
    assert examine(tmp_path / "gridsession.toml").exit_status == 0
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    report = examine(tmp_path / "gridsession.toml")
    assert report.exit_status == 1
    assert "pip install 'gridsession[encryption]' -> mend the setting" in said(report, "error")


def test_memory(tmp_path: Path) -> None:
    configured(tmp_path, connection_string="memory://")
    report = examine(tmp_path / "gridsession.toml")
    assert report.exit_status == 0
    assert "nothing of it can be measured" in said(report, "warning")
    assert report.grid["kind"] == "memory"
    assert (report.round_trip, report.hand_off) == (None, None)


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    configured(tmp_path, connection_string="embedded:?max_size=1MiB")
    report = examine()
    assert report.exit_status == 0
    assert report.grid["path_from"] == "working directory and user"
    assert str(tmp_path) in said(report, "warning")
    assert report.hand_off is not None  # the second process found the same folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second process, which takes the longest."""

    async def hand_offs(**place: Any) -> Timing:
        return Timing(1, 0.001, 0.001)

    monkeypatch.setattr(doctor, "hand_offs", hand_offs)


@pytest.mark.usefixtures("quick")
def test_a_folder_that_others_can_read(tmp_path: Path, grid: Path) -> None:
    grid.mkdir(mode=0o755)
    configured(tmp_path, connection_string=address(grid))
    report = examine(tmp_path / "gridsession.toml")
    assert said(report, "warning").count("0755") == 1  # looked at before and after opening
    assert report.grid["permissions"] == "0755"
    assert report.exit_status == 0


def test_another_users_store_is_not_opened(
    tmp_path: Path, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(tmp_path, connection_string=address(grid))
    store(grid)
    before = (grid / "state.json").stat()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    report = examine(tmp_path / "gridsession.toml")
    assert report.exit_status == 1
    assert "another user than 54321" in said(report, "error")
    assert report.round_trip is None
    assert (grid / "state.json").stat() == before


def test_root_makes_no_store_in_another_users_folder(
    tmp_path: Path, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(tmp_path, connection_string=address(grid))
    if os.geteuid() == 0:
        os.chown(tmp_path, 54321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    report = examine(tmp_path / "gridsession.toml")
    assert report.exit_status == 0
    assert "not opened" in said(report, "warning")
    assert not grid.exists()


def test_a_store_that_would_be_moved_aside_is_left_where_it_is(tmp_path: Path, grid: Path) -> None:
    configured(tmp_path, connection_string=address(grid))
    store(grid)
    state = read_state(grid)
    assert state is not None
    for spoilt in (replace(state, boot_id=7, clean=False), replace(state, layout=9)):
        write_state(grid, spoilt)
        before = sorted(os.listdir(grid))
        report = examine(tmp_path / "gridsession.toml")
        assert "not opened" in said(report, "warning") or report.exit_status == 1
        assert report.round_trip is None
        assert report.grid["records"] is None
        assert sorted(os.listdir(grid)) == before


@pytest.mark.parametrize("its", [True, False])
def test_a_stores_durable_is_left_as_it_is(its: bool, tmp_path: Path, grid: Path) -> None:
    store(grid)
    state = read_state(grid)
    assert state is not None
    write_state(grid, replace(state, durable=its))
    before = (grid / "state.json").read_bytes()
    configured(tmp_path, connection_string=f"{address(grid)}&durable={not its}".lower())
    report = examine(tmp_path / "gridsession.toml")
    assert f"last used with durable={its}".lower() in said(report, "warning")
    assert (report.exit_status, report.round_trip) == (0, None)
    assert (grid / "state.json").read_bytes() == before


def test_a_store_that_is_open_and_otherwise_durable(tmp_path: Path, grid: Path) -> None:
    configured(tmp_path, connection_string=f"{address(grid)}&durable=true")

    async def run() -> Report:
        settings = SessionSettings(connection_string=address(grid))
        async with SessionProvider(settings):
            return await asyncio.to_thread(examine, tmp_path / "gridsession.toml")

    report = asyncio.run(run())
    assert report.exit_status == 1
    assert "open with durable=false" in said(report, "error")
    assert report.round_trip is None
    assert is_left_alone(grid)


@pytest.mark.usefixtures("quick")
def test_what_the_grid_logs_is_said(tmp_path: Path, grid: Path) -> None:
    store(grid)
    configured(tmp_path, connection_string=address(grid).replace("4MiB", "2MiB"))
    report = examine(tmp_path / "gridsession.toml")
    assert "never shrinks" in said(report, "warning")
    assert report.grid["size_bytes"] == 4 << 20


def test_locks_are_counted_while_the_application_runs(tmp_path: Path, grid: Path) -> None:
    configured(tmp_path, connection_string=address(grid))
    session_id = store(grid)
    code = (
        "import asyncio, sys\n"
        "from gridsession import SessionProvider\n"
        "async def main():\n"
        "    async with SessionProvider() as provider, provider.open(sys.argv[1]):\n"
        "        print('held', flush=True)\n"
        "        await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, session_id],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        report = examine(tmp_path / "gridsession.toml")
        assert (report.grid["records"], report.grid["locks"]) == (1, 1)
        assert report.exit_status == 0
        assert report.hand_off is not None
        holder.communicate(timeout=SECONDS)
        assert holder.returncode == 0
    finally:
        holder.kill()
        holder.communicate()
    assert entries(grid) == 3
    assert list_bells(grid) == []
