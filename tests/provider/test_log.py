"""What any client can cause does not fill the log."""

from __future__ import annotations

import pytest

from gridsession.provider.log import Seldom


def test_a_warning_that_comes_often_is_logged_once_a_minute_with_its_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 1000.0
    seldom = Seldom(lambda: now)
    for second in range(181):
        now = 1000.0 + second
        seldom.warning("cookie %s", second)
    assert [r.getMessage() for r in caplog.records] == [
        "cookie 0",
        "cookie 60; as 59 before it that were not logged",
        "cookie 120; as 59 before it that were not logged",
        "cookie 180; as 59 before it that were not logged",
    ]
    caplog.clear()
    now += 3600.0
    seldom.warning("cookie again")
    assert [r.getMessage() for r in caplog.records] == ["cookie again"]
