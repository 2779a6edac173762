"""What stops a server at its start, and whether its operator reads why under default logging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gridsession.grids.memory import server_workers
from tests.farm.client import ask, post, run
from tests.farm.servers import STOP_SECONDS, UVICORN, Farm, Server, farm_in

APP = "tests.farm.app:app"
GUNICORN = (
    *("gunicorn", "--no-control-socket", "-k", "uvicorn_worker.UvicornWorker"),
    *("-b", "127.0.0.1:PORT"),
)
HYPERCORN = ("hypercorn", "-b", "127.0.0.1:PORT")
SAID = "sessions cannot work as they are set: "
# uvicorn's supervisor waits this long for an answer of a worker that ended as it was asked.
TWO_WORKERS = ("--workers", "2", "--timeout-worker-healthcheck", "1")


def end_of(server: Server) -> str:
    """What a server said that ended by itself; some end with 0 even so."""
    server.process.wait(STOP_SECONDS)
    assert not server.answers()
    return server.said


def check_cause(said: str, cause: str, most: int) -> None:
    """The whole cause, once for each worker: one ERROR with its traceback."""
    assert 1 <= said.count(SAID + cause) == said.count(SAID) <= most
    assert said.count(f"gridsession.errors.SettingsError: {cause}") == said.count(SAID)
    assert "lifespan' protocol" not in said  # nobody was told that the application has none


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ((*UVICORN, *TWO_WORKERS), {}),
        (UVICORN, {"WEB_CONCURRENCY": "2"}),
        ((*GUNICORN, "-w", "2", APP), {}),
        ((*GUNICORN, "-w", "2", "--preload", APP), {}),
        ((*GUNICORN, APP), {"GUNICORN_CMD_ARGS": "--workers=2"}),
        ((*HYPERCORN, "-w", "2", APP), {}),
    ],
    ids=[
        *("uvicorn", "uvicorn-environment"),
        *("gunicorn", "gunicorn-preload", "gunicorn-environment", "hypercorn"),
    ],
)
def test_memory_under_several_workers_does_not_start(
    tmp_path: Path, command: tuple[str, ...], environment: dict[str, str]
) -> None:
    with farm_in(tmp_path, connection_string="memory://") as farm:
        server = farm.launch(*command, env=environment)
        said = end_of(server)
        check_cause(
            said,
            "connection_string: memory:// keeps sessions in one process, and 2 workers were "
            "asked for; use embedded: to share sessions between them",
            most=2,
        )


@pytest.mark.parametrize(
    "arguments", [(), ("--workers", "1"), ("--reload",)], ids=["plain", "one-worker", "reload"]
)
def test_memory_under_one_worker_serves(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with farm_in(tmp_path, connection_string="memory://") as farm:
        server = farm.uvicorn(*arguments)
        assert run(post(server, "/add?n=0")).status == 200
        assert "memory://" not in server.said


@pytest.mark.parametrize(
    ("argv", "environment", "workers"),
    [
        (["uvicorn", "app:app"], {}, 1),
        (["/x/bin/uvicorn", "app:app", "--workers", "3"], {}, 3),
        (["/x/bin/uvicorn", "app:app", "--workers=1"], {"WEB_CONCURRENCY": "4"}, 1),
        (["python", "-m", "uvicorn", "app:app"], {}, 1),
        (["python", "-c", "spawn_main()", "/x/uvicorn/__main__.py", "app:app"], {}, 1),
        (["fastapi", "run", "--workers", "4"], {}, 4),
        (["uvicorn", "app:app"], {"UVICORN_WORKERS": "4"}, 4),
        (["gunicorn", "-w4", "app:app"], {}, 4),
        (["gunicorn", "app:app"], {"WEB_CONCURRENCY": "4"}, 4),
        (["gunicorn", "-w", "1", "app:app"], {"GUNICORN_CMD_ARGS": "-w 4"}, 1),
        # A file may say it: gunicorn.conf.py is read without being named.
        (["gunicorn", "app:app"], {}, None),
        (["hypercorn", "-c", "hypercorn.toml", "app:app"], {}, None),
        (["python", "serve.py"], {}, None),
    ],
)
def test_the_number_of_workers_is_read_from_the_command_line(
    argv: list[str], environment: dict[str, str], workers: int | None
) -> None:
    assert server_workers(argv, environment) == workers


def bad_option(farm: Farm) -> str:
    farm.options["timeuot"] = 60
    return "there is no option 'timeuot'; did you mean 'timeout'?"


def bad_path(farm: Farm) -> str:
    blocked = farm.folder / "blocked"
    blocked.touch()
    farm.options["connection_string"] = f"embedded://{blocked}/grid"
    return f"connection_string: the embedded grid cannot use {blocked}/grid: Not a directory"


CAUSES = pytest.mark.parametrize("make_bad", [bad_option, bad_path])


@CAUSES
@pytest.mark.parametrize(
    "command",
    [UVICORN, (*UVICORN, *TWO_WORKERS), (*GUNICORN, "-w", "2", APP), (*HYPERCORN, APP)],
    ids=["uvicorn", "uvicorn-2", "gunicorn-2", "hypercorn"],
)
def test_promise_10_what_cannot_heal_stops_the_server_with_its_cause(
    tmp_path: Path, make_bad: object, command: tuple[str, ...]
) -> None:
    with farm_in(tmp_path) as farm:
        assert callable(make_bad)
        cause = make_bad(farm)
        said = end_of(farm.launch(*command))
        check_cause(said, cause, most=2)


@CAUSES
def test_promise_10_without_lifespan_each_request_is_answered_by_a_plain_page(
    tmp_path: Path, make_bad: object
) -> None:
    with farm_in(tmp_path) as farm:
        assert callable(make_bad)
        cause = make_bad(farm)
        server = farm.launch(*UVICORN, "--lifespan", "off")
        server.wait_listening()

        async def main() -> None:
            for _ in range(3):
                reply = await ask(server, "POST", "/add?n=1")
                assert (reply.status, reply.body) == (500, b"Internal Server Error\n")
                assert reply.headers["content-type"].startswith("text/plain")
                assert "retry-after" not in reply.headers

        run(main())
        check_cause(server.said, cause, most=1)


def test_promise_9_a_bad_connection_strings_password_is_not_shown(tmp_path: Path) -> None:
    secret = "hunter2-" + "x" * 8
    with farm_in(tmp_path, connection_string=f"unknown://user:{secret}@host/0") as farm:
        said = end_of(farm.launch(*UVICORN))
        assert "there is no grid for the scheme 'unknown'" in said
        assert secret not in said.replace(json.dumps(farm.options), "")
