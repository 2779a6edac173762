"""The doctor's own record: removed in any case, and wrong answers are told."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gridsession import GridUnavailable, SessionProvider, SessionSettings
from gridsession.grids import open_grid
from gridsession.grids.contract import EXISTS, GONE, LOCK_LOST, MISSING, Grid
from gridsession.grids.memory import MemoryGrid
from gridsession.tools import doctor, hand_off, measure
from gridsession.tools.hand_off import NotMeasured, hand_offs
from gridsession.tools.measure import Left, WrongAnswer, own_record
from gridsession.tools.report import Report
from tests.provider.harness import run

PLACE: dict[str, Any] = {"connection_string": "memory://", "namespace": "/", "timeout": 1.0}


class Odd:
    """A memory grid of which one method answers what it is told to, or raises it."""

    def __init__(self, method: str = "", answer: object = None) -> None:
        self.grid = MemoryGrid()
        self._method = method
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        if name != self._method:
            return getattr(self.grid, name)

        async def odd(*args: object, **kwargs: object) -> object:
            if isinstance(self._answer, Exception):
                raise self._answer
            return self._answer

        return odd

    @property
    def is_empty(self) -> bool:
        return not self.grid._table._records


def as_grid(odd: Odd) -> Grid:
    grid: Any = odd
    return grid  # type: ignore[no-any-return]


async def call_all(odd: Odd) -> None:
    async with own_record(as_grid(odd)) as record:
        await record.call_all()
        await record.round_trips()


def test_a_good_grid_answers_and_keeps_nothing() -> None:
    odd = Odd()
    run(call_all(odd))
    assert odd.is_empty


@pytest.mark.parametrize(
    ("method", "answer", "what"),
    [
        ("create", EXISTS, "Exists to create"),
        ("acquire", MISSING, "Missing to acquire"),
        ("renew", [False], "lost a lock"),
        ("read", MISSING, "Missing to read"),
        ("commit", LOCK_LOST, "LockLost to commit"),
        ("release", GONE, "Gone to release"),
    ],
)
def test_a_wrong_answer_is_told(method: str, answer: object, what: str) -> None:
    odd = Odd(method, answer)
    with pytest.raises(WrongAnswer, match=what):
        run(call_all(odd))
    assert odd.is_empty


def test_a_record_that_cannot_be_removed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_REMOVAL", 0.0)
    monkeypatch.setattr(measure, "_PAUSE", 0.0)
    with pytest.raises(Left):
        run(call_all(Odd("remove", GridUnavailable("gone"))))


def test_cancelled_it_is_removed() -> None:
    async def main() -> None:
        odd = Odd()

        async def hang() -> None:
            async with own_record(as_grid(odd)) as record:
                await record.call_all()
                assert not odd.is_empty
                held.set()
                await asyncio.Event().wait()

        held = asyncio.Event()
        task = asyncio.create_task(hang())
        await held.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert odd.is_empty

    run(main())


def examined(odd: Odd) -> Report:
    """What the doctor says of an application that made its grid itself."""
    report = Report("1")
    settings = SessionSettings(connection_string="memory://", https_only=True)
    provider = SessionProvider(settings, grid=as_grid(odd))
    doctor._look_at_grid(report, provider, doctor._say_nothing)
    return report


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (GridUnavailable("the cache does not answer"), "the cache does not answer"),
        (RuntimeError("hunter2"), "the grid failed: RuntimeError"),
        (EXISTS, "the grid answered Exists to create"),
    ],
)
def test_a_grid_that_fails_is_an_error(answer: object, what: str) -> None:
    report = examined(Odd("create", answer))
    (error,) = (one for one in report.findings if one.severity == "error")
    assert error.what == what
    assert error.do
    assert "hunter2" not in str(report)


def test_a_grid_of_the_applications_own() -> None:
    odd = Odd()
    report = examined(odd)
    assert report.exit_status == 0
    assert report.round_trip is not None
    assert report.hand_off is None
    assert "only it can make another" in report.findings[1].what
    assert report.grid == {"kind": "Odd", "made_by": "the application", "where": odd.where}
    assert odd.is_empty


# -- the second process ---------------------------------------------------------------------------


async def hands_off(**place: Any) -> None:
    await hand_offs(**PLACE | place)


def test_a_second_process_that_cannot_open_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotMeasured, match="the second process: Missing"):
        run(hands_off())  # a memory of its own, where there is no such record
    monkeypatch.setattr(hand_off, "open_grid", lambda *args, **kwargs: open_grid("memory://"))
    with pytest.raises(NotMeasured, match="the second process: connection_string: ") as raised:
        run(hands_off(connection_string="redis+cluster://:hunter2@a,b"))
    assert "hunter2" not in str(raised.value)


def script(folder: Path, *lines: str) -> str:
    """Something else that is started in the place of this interpreter."""
    path = folder / "python"
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return str(path)


def test_a_second_process_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = script(tmp_path, "echo hello; echo '[1]'; echo '{}'; exit 3")
    monkeypatch.setattr(sys, "executable", noisy)
    with pytest.raises(NotMeasured, match=r"ended"):
        run(hands_off())


@pytest.mark.parametrize("how", ["patience", "cancel"])
def test_a_second_process_that_hangs(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = script(tmp_path, f"echo $$ > {tmp_path}/pid", "exec sleep 60")
    monkeypatch.setattr(sys, "executable", hanging)
    monkeypatch.setattr(hand_off, "_PARTING", 0.2)
    monkeypatch.setattr(hand_off, "_PATIENCE", 0.5 if how == "patience" else 30.0)
    began = time.monotonic()

    async def main() -> None:
        if how == "patience":
            await hands_off()
            return
        async with asyncio.timeout(0.5):
            await hands_off()

    expected: dict[str, type[Exception]] = {"patience": NotMeasured, "cancel": TimeoutError}
    with pytest.raises(expected[how]):
        run(main())
    assert time.monotonic() - began < 10
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}/cmdline").exists()


def test_no_secret_is_on_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = script(tmp_path, f'echo "$@" > {tmp_path}/args', "exit 0")
    monkeypatch.setattr(sys, "executable", listing)
    monkeypatch.setattr(hand_off, "open_grid", lambda *args, **kwargs: open_grid("memory://"))
    with pytest.raises(NotMeasured):
        run(hands_off(connection_string="redis://:hunter2@cache"))
    assert "hunter2" not in (tmp_path / "args").read_text()
