"""What all tests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from gridsession.testing import ManualClock
from tests.provider.harness import Spy, make_grid

# A busy machine is no failure, and a failure must be the same one at its repetition. Chance finds
# what nobody thought of on a developer's machine, where its finding is kept and shown.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def clock() -> ManualClock:
    """The grid's clock; it stands still."""
    return ManualClock()


@pytest.fixture(params=["memory", "embedded", "redis"])
def grid(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Iterator[Spy]:
    """Each grid in turn, not yet opened, behind a `Spy`."""
    spy = Spy(make_grid(request.param, tmp_path, clock))
    yield spy
    asyncio.run(spy.inner.close())


@pytest.fixture(params=["memory", "embedded", "redis"])
def real_grid(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Spy]:
    """The same, on the machine's clocks."""
    spy = Spy(make_grid(request.param, tmp_path))
    yield spy
    asyncio.run(spy.inner.close())
