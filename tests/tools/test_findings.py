"""What settings, folders and times mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gridsession import SessionSettings
from gridsession.tools.findings import of_place, of_settings, of_times
from gridsession.tools.place import Facts
from gridsession.tools.report import Finding, Report, Timing, settings_of

SECRET = "hunter2-of-the-grid"
KEY = bytes(range(32)).hex()
GOOD: dict[str, Any] = {"connection_string": "embedded:///srv/grid", "https_only": True}
FACTS = Facts(
    path="/srv/grid",
    is_default=False,
    working_directory="/srv",
    user="www",
    exists=True,
    mode=0o700,
    owner="www",
    is_foreign=False,
    file_system="ext4",
    is_network=False,
    disk_free=10 << 30,
    durable_asked=False,
    layout=1,
    our_layout=1,
    durable=False,
    boot_id_fits=True,
    is_clean=False,
    is_reserved=True,
    size=100 << 20,
)


def said(findings: list[Finding]) -> str:
    (finding,) = findings
    assert finding.do
    return f"{finding.severity}: {finding.what}"


def test_good_settings_need_no_word() -> None:
    assert of_settings(SessionSettings(**GOOD)) == []


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"https_only": False}, "https_only is off"),
        ({"lock_wait_timeout": 61}, "lock_wait_timeout=61 is longer than most proxies"),
        ({"execution_timeout": 10}, "execution_timeout=10 is shorter than lock_lease=15"),
        ({"client_cache_capacity": 5}, "client_cache_capacity is set, and not needed"),
        (
            {"client_cache_type": "Random", "connection_string": "memory://"},
            "client_cache_type is set, and not needed",
        ),
        ({"timeout": 20}, "timeout=20 means seconds"),
        (
            {"client_cache_coherency_interval": 2},
            "client_cache_coherency_interval is set, and not needed",
        ),
        (
            {"if_grid_unavailable": "read_cached"},
            "if_grid_unavailable=read_cached has no effect on this grid",
        ),
        (
            {
                "if_grid_unavailable": "read_cached",
                "client_cache_capacity": 0,
                "connection_string": "redis://h/1",
                "namespace": "shop",
            },
            "if_grid_unavailable='read_cached' has no effect with client_cache_capacity=0",
        ),
        (
            {"encryption_keys": ["plain", KEY]},
            "encryption_keys begins with plain: sessions are not",
        ),
        ({"encryption_keys": [KEY, "plain"]}, "encryption_keys has plain: sessions that are not"),
        ({"handle_session_end": True}, "handle_session_end is set and does not act yet"),
        ({"connection_string": "redis://h/1"}, "namespace is not set"),
    ],
)
def test_a_setting_that_may_be_meant_otherwise(options: dict[str, Any], what: str) -> None:
    assert said(of_settings(SessionSettings(**GOOD | options))).startswith(f"warning: {what}")


def test_on_a_small_grid_a_client_cache_of_nothing_is_told_once() -> None:
    options = {
        "client_cache_capacity": 0,
        "client_cache_coherency_interval": 2,
        "if_grid_unavailable": "read_cached",
    }
    *not_needed, no_effect = of_settings(SessionSettings(**GOOD | options))
    assert [finding.what.partition(" ")[0] for finding in not_needed] == [*options][:2]
    assert all("not needed" in finding.what for finding in not_needed)
    assert no_effect.what.startswith("if_grid_unavailable=read_cached has no effect on this grid")


def test_what_acts_on_a_farm_needs_no_word() -> None:
    options = {
        "connection_string": "redis://h/1",
        "namespace": "shop",
        "client_cache_coherency_interval": 2,
        "client_cache_type": "Random",
        "compression_enabled": True,
        "encryption_keys": KEY,
        "allow_concurrent_requests_per_session": True,
        "if_grid_unavailable": "read_cached",
    }
    assert of_settings(SessionSettings(**GOOD | options)) == []


def test_limits_that_are_just_kept() -> None:
    options = {"lock_wait_timeout": 60, "execution_timeout": 15}
    assert of_settings(SessionSettings(**GOOD | options)) == []


def test_a_good_folder_needs_no_word() -> None:
    assert of_place(FACTS) == []
    fresh = replace(FACTS, exists=False, mode=None, owner=None, layout=None, size=None)
    assert of_place(fresh) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"is_default": True}, "the connection string names no folder"),
        ({"mode": 0o750}, "the folder's permissions are 0750"),
        ({"mode": 0o702}, "the folder's permissions are 0702"),
        ({"owner": "eve"}, "the folder belongs to eve"),
        (
            {"file_system": "tmpfs", "durable_asked": True, "durable": True},
            "durable=true on tmpfs",
        ),
        ({"disk_free": 200 << 20}, "the disk has 200 MiB left"),
        (
            {"is_reserved": False, "file_system": "btrfs", "disk_free": 1 << 30, "size": 2 << 30},
            "blocks cannot be reserved on btrfs",
        ),
        ({"used": 81 << 20}, "the store is 81% full"),
    ],
)
def test_a_folder_with_a_flaw(change: dict[str, Any], what: str) -> None:
    facts = replace(FACTS, **change)
    assert said(of_place(facts)).startswith(f"warning: {what}")
    assert not facts.reasons_to_stay_out()


@pytest.mark.parametrize(
    ("change", "severity", "what"),
    [
        ({"is_network": True, "file_system": "nfs4"}, "error", "network file system (nfs4)"),
        ({"is_foreign": True}, "error", "belongs to another user than www"),
        ({"exists": False, "would_be_foreign": True}, "warning", "there is no store, and www"),
        ({"layout": 2}, "error", "layout 2, and this release reads 1"),
        ({"layout": None}, "warning", "state.json is missing"),
        ({"boot_id_fits": False}, "warning", "the system restarted"),
        ({"durable": True}, "warning", "set, and the store was last used with durable=true"),
        ({"durable_asked": True}, "warning", "makes it durable=true"),
        ({"durable": True, "is_open": True}, "error", "another process has the store open"),
    ],
)
def test_a_store_that_is_not_to_be_opened(change: dict[str, Any], severity: str, what: str) -> None:
    facts = replace(FACTS, **change)
    assert facts.reasons_to_stay_out()
    text = said(of_place(facts))
    assert text.startswith(severity)
    assert what in text


@pytest.mark.parametrize("change", [{"is_clean": True}, {"durable": True, "durable_asked": True}])
def test_a_store_of_another_boot_that_can_be_trusted(change: dict[str, Any]) -> None:
    assert of_place(replace(FACTS, boot_id_fits=False, **change)) == []


def test_times() -> None:
    quick, slow = Timing(20, 0.0001, 0.002), Timing(20, 0.3, 0.5)
    assert of_times(None, None) == []
    assert [one.severity for one in of_times(quick, quick)] == ["ok", "ok"]
    assert "100 µs (99 of 100: within 2.0 ms)" in of_times(quick, None)[0].what
    for findings in (of_times(slow, None), of_times(None, slow)):
        assert said(findings).startswith("warning")


def test_a_median_and_a_percentile() -> None:
    assert Timing.of([3.0]) == Timing(1, 3.0, 3.0)
    assert Timing.of([float(n) for n in range(200, 0, -1)]) == Timing(200, 100.0, 198.0)


def test_settings_show_no_secret() -> None:
    # Also where one does not belong.
    options: dict[str, Any] = {
        "connection_string": f"redis://u:{SECRET}@cache/1?client_name={SECRET}",
        "namespace": f"redis://u:{SECRET}@cache",
        "remote_stores": [f"redis://:{SECRET}@east"],
    }
    settings = settings_of(SessionSettings(**options))
    assert SECRET not in str(settings)
    values = {setting.name: setting.value for setting in settings}
    assert values["connection_string"].startswith("redis://***@cache/1")
    assert values["timeout"] == 1200


def test_only_errors_count() -> None:
    report = Report("1")
    report.say("warning", "one", "do")
    report.say("warning", "one", "do")
    assert report.exit_status == 0
    assert len(report.findings) == 1
    report.say("error", "two", "do")
    assert report.exit_status == 1
