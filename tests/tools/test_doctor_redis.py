"""`gridsession doctor` beside real Redis servers, good ones and others."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from gridsession import SessionProvider, SessionSettings
from gridsession.grids.redis import RedisGrid
from gridsession.tools import doctor, redis_server
from gridsession.tools.doctor import examine
from gridsession.tools.findings import of_server, of_times
from gridsession.tools.redis_server import ServerFacts
from gridsession.tools.report import Finding, Report, Timing
from tests.grids.certificates import Authority, TlsServer
from tests.redis_server import RedisServer, free_port
from tests.tools.running import piped

SECRET = "hunter2-of-the-grid"
USER = "shop-user"
DOCS = Path(__file__).parents[2] / "docs"
GOOD = {"appendonly": "yes", "maxmemory": "200mb", "maxmemory_policy": "noeviction"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", **GOOD) as running:
        yield running


def configured(folder: Path, **settings: Any) -> Path:
    """A file of these settings, and of those that need no word."""
    settings = {"namespace": "shop", "https_only": True} | settings
    lines = (f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    path = folder / "gridsession.toml"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second process, which takes the longest."""

    async def hand_offs(**place: Any) -> Timing:
        return Timing(1, 0.001, 0.001)

    monkeypatch.setattr(doctor, "hand_offs", hand_offs)


def of(report: Report, severity: str) -> list[Finding]:
    return [one for one in report.findings if one.severity == severity]


def only(report: Report, severity: str) -> str:
    (finding,) = of(report, severity)
    return f"{finding.what} -> {finding.do}"


def records(server: RedisServer) -> list[bytes]:
    """What is there but for hints in the index, which the sweeper corrects."""
    return [name for name in server.admin.scan_iter() if b":due:" not in name]


# -- the whole of it ------------------------------------------------------------------------------


def test_json(tmp_path: Path, server: RedisServer) -> None:
    server.admin.config_set("requirepass", SECRET)
    url = f"redis://:{SECRET}@127.0.0.1:{server.port}/3"
    file = configured(tmp_path, connection_string=url)
    done = piped("doctor", "--config", file.name, "--json", cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    report = json.loads(done.out)
    assert [one["severity"] for one in report["findings"]] == ["ok"] * 4
    found = report["grid"]
    assert found["kind"] == "redis"
    assert found["where"] == f"redis://***@127.0.0.1:{server.port}/3"
    assert (found["form"], found["tls"], found["role"]) == ("standalone", False, "primary")
    assert found["version"] == server.admin.info("server")["redis_version"]
    assert (found["maxmemory_bytes"], found["maxmemory_policy"]) == (200 << 20, "noeviction")
    assert 0 < found["used_memory_bytes"] < 200 << 20
    assert (found["appendonly"], found["appendfsync"], found["save"]) == (True, "everysec", "")
    assert (found["replicas"], found["snapshots"], found["may_not_ask"]) == (0, 0, [])
    assert 0 < found["connections"] < found["maxclients"]
    assert abs(found["clock_difference_ms"]) < 1000
    page = (DOCS / "doctor.md").read_text(encoding="utf-8")
    assert [key for key in found if f"`{key}`" not in page] == []
    times = report["measurements"]
    assert list(times) == ["ping", "round_trip", "hand_off"]
    assert [times[name]["count"] for name in times] == [50, 200, 20]
    for name in times:
        assert 0 < times[name]["median_ms"] <= times[name]["p99_ms"]
    assert SECRET not in done.said
    server.admin.auth(SECRET)
    server.admin.select(3)
    assert records(server) == []


def test_in_a_pipe(tmp_path: Path, server: RedisServer) -> None:
    file = configured(tmp_path, connection_string=server.url)
    done = piped("doctor", "--config", file.name, cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    lines = {" ".join(line.split()) for line in done.out.splitlines()}
    assert f"where {server.url}" in lines
    assert "maxmemory 200.0 MiB" in lines
    assert "may not ask none" in lines
    assert "ok the grid answered create, acquire, renew, read, commit and release" in lines
    assert "granted in another process" in done.out
    assert lines & {"no errors, no warnings"}


@pytest.mark.usefixtures("quick")
def test_the_applications_own_client(server: RedisServer) -> None:
    client: Any = Redis(host="127.0.0.1", port=server.port)
    report = Report("1")
    provider = SessionProvider(
        SessionSettings(https_only=True), grid=RedisGrid.from_client(client, namespace="shop")
    )
    doctor._look_at_grid(report, provider, doctor._say_nothing)
    assert report.exit_status == 0
    assert (report.grid["kind"], report.grid["made_by"]) == ("redis", "the application")
    assert report.grid["role"] == "primary"
    assert report.ping is not None
    assert report.round_trip is not None


# -- servers that are to be mended ----------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_what_the_grid_logs_of_its_server_is_said_once(tmp_path: Path) -> None:
    options = GOOD | {"maxmemory_policy": "allkeys-lru", "appendonly": "no", "save": "3600 1"}
    with RedisServer(tmp_path / "redis", **options) as server:
        report = examine(configured(tmp_path, connection_string=server.url))
    assert report.exit_status == 0
    policy, disk = of(report, "warning")
    assert policy.what.startswith("maxmemory-policy is allkeys-lru")
    assert policy.do.startswith("set noeviction")
    assert "appendonly is off and snapshots are on" in disk.what
    assert (report.grid["appendonly"], report.grid["save"]) == (False, "3600 1")


@pytest.mark.usefixtures("quick")
def test_a_user_who_may_ask_no_more_than_sessions_need(tmp_path: Path, server: RedisServer) -> None:
    url = let(server, "~gs:*", "&gs:*", "+@all", "-info", "-config")
    report = examine(configured(tmp_path, connection_string=url))
    assert report.exit_status == 0
    assert report.grid["may_not_ask"] == ["INFO", "CONFIG GET"]
    assert (report.grid["maxmemory_bytes"], report.grid["appendonly"]) == (None, None)
    assert only(report, "warning").startswith("its user may not ask the server for INFO")
    server.admin.execute_command("ACL", "SETUSER", USER, "+info")
    report = examine(configured(tmp_path, connection_string=url))
    assert of(report, "warning") == []
    assert report.grid["may_not_ask"] == ["CONFIG GET"]
    assert SECRET not in str(report)
    assert USER not in str(report)


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ("+@all -setrange -spublish", "SETRANGE, SPUBLISH"),
        ("+@all -zadd", "ZADD"),
        ("+@all -eval -evalsha", "EVAL, EVALSHA"),
        ("+@all -ping", "PING"),
        ("+@all -select", "SELECT"),
    ],
)
def test_what_is_not_permitted_is_named(
    rules: str, names: str, tmp_path: Path, server: RedisServer
) -> None:
    url = let(server, "~gs:*", "&gs:*", *rules.split())
    report = examine(configured(tmp_path, connection_string=f"{url}/5"))
    assert report.exit_status == 1
    said = only(report, "error")
    assert "does not permit its user" in said
    assert names in said
    assert "give the user the ACL rule in docs/farm.md" in said
    assert report.round_trip is None


@pytest.mark.usefixtures("quick")
def test_the_configuration_of_the_page_needs_no_word(tmp_path: Path) -> None:
    page = (DOCS / "farm.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```redis\.conf\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)
    options = dict(line.split(maxsplit=1) for line in lines.splitlines())
    assert options["maxmemory-policy"] == "noeviction"
    with RedisServer(tmp_path / "redis", **options) as server:
        report = examine(configured(tmp_path, connection_string=server.url))
        assert report.grid["maxmemory_bytes"] == int(
            server.admin.config_get("maxmemory")["maxmemory"]
        )
    assert {one.severity for one in report.findings} == {"ok"}


def rule_of_the_page() -> list[str]:
    """The ACL rule in docs/farm.md, without its user's name and password."""
    page = (DOCS / "farm.md").read_text(encoding="utf-8")
    (rule,) = re.findall(r"^```acl\nuser shop on >password (.+)\n```$", page, re.MULTILINE)
    return str(rule).split()


def let(server: RedisServer, *rules: str) -> str:
    """Let the user do that, and nothing else; the connection string."""
    server.admin.execute_command("ACL", "SETUSER", USER, "reset", "on", f">{SECRET}", *rules)
    return f"redis://{USER}:{SECRET}@127.0.0.1:{server.port}"


def test_the_rule_of_the_page_lets_all_work(tmp_path: Path, server: RedisServer) -> None:
    url = let(server, *rule_of_the_page(), "+info")
    report = examine(configured(tmp_path, connection_string=url))
    assert [one.severity for one in report.findings] == ["ok"] * 4
    assert report.hand_off is not None
    assert report.grid["may_not_ask"] == ["CONFIG GET"]
    other = examine(configured(tmp_path, connection_string=url, namespace="bank"))
    assert "does not permit its user" in only(other, "error")


@pytest.mark.usefixtures("quick")
def test_the_rule_of_the_page_permits_nothing_else(tmp_path: Path, server: RedisServer) -> None:
    rule = rule_of_the_page()
    permitted = [word for word in rule if word.startswith("+")]
    assert len(permitted) > 10
    for word in permitted:
        url = let(server, *(other for other in rule if other != word))
        said = only(examine(configured(tmp_path, connection_string=url)), "error")
        assert word[1:].upper() in said


# -- servers that cannot be used ------------------------------------------------------------------


def test_nobody_listens(tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    report = examine(configured(tmp_path, connection_string=url))
    assert report.exit_status == 1
    assert report.grid == {"kind": "redis", "where": f"{url}/0", "form": "standalone", "tls": False}
    said = only(report, "error")
    assert "refuses connections: no server listens there -> start the server" in said
    assert of(report, "warning") == []  # the log says the same


@pytest.mark.parametrize(
    ("before_host", "what", "do"),
    [
        ("", "wants a password", "write it: redis://:password@host"),
        (f":{SECRET}x@", "refused user and password", "correct them"),
        (f"nobody:{SECRET}@", "refused user and password", "ACL LIST"),
    ],
)
def test_credentials(
    before_host: str, what: str, do: str, tmp_path: Path, server: RedisServer
) -> None:
    server.admin.config_set("requirepass", SECRET)
    url = f"redis://{before_host}127.0.0.1:{server.port}"
    report = examine(configured(tmp_path, connection_string=url))
    assert report.exit_status == 1
    said = only(report, "error")
    assert what in said
    assert do in said
    assert SECRET not in str(report)


def test_certificates(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    expired = ours.pair(
        "old",
        "localhost",
        not_after=datetime(2020, 1, 1, tzinfo=UTC),
        not_before=datetime(2019, 1, 1, tzinfo=UTC),
    )
    with TlsServer(tmp_path / "redis", ours, ours.pair("good", "localhost")) as server:

        def said(url: str) -> str:
            report = examine(configured(tmp_path, connection_string=url))
            assert report.exit_status == 1
            return only(report, "error")

        unknown = said(server.at(ssl_ca_certs=str(theirs.cert)))
        assert "a certificate that is not accepted" in unknown
        assert "-> name the authority that signed it with ?ssl_ca_certs=" in unknown
        other_host = said(server.at("127.0.0.1", ssl_ca_certs=str(ours.cert)))
        assert "a certificate that is not accepted" in other_host
        plain = said(f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={ours.cert}")
        assert "where it speaks no TLS at this port, write redis://" in plain
        encrypted = said(f"redis://127.0.0.1:{server.tls_port}")
        assert "-> write rediss:// where the server wants TLS" in encrypted
        server.show(expired)
        old = said(server.at(ssl_ca_certs=str(ours.cert)))
        assert "expired" in old
        assert "renew it at the server" in old


@pytest.mark.usefixtures("quick")
def test_a_server_with_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with TlsServer(tmp_path / "redis", authority, authority.pair("it", "localhost")) as server:
        url = server.at(ssl_ca_certs=str(authority.cert))
        report = examine(configured(tmp_path, connection_string=url))
    assert report.exit_status == 0
    assert report.grid["tls"] is True
    assert report.grid["where"] == f"rediss://localhost:{server.tls_port}/0"


def test_a_server_that_does_not_answer(tmp_path: Path, server: RedisServer) -> None:
    file = configured(tmp_path, connection_string=server.url, grid_timeout=0.2)
    with server.frozen():
        report = examine(file)
    assert report.exit_status == 1
    assert "did not answer within 0.2 s -> look whether a firewall" in only(report, "error")


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("redis+sentinel://a,b/main", "no grid for Sentinel yet"),
        ("redis+cluster://a,b", "no grid for Cluster yet"),
        (f"redis://:{SECRET}@h?min_replicas=1", "does not ask replicas"),
    ],
)
def test_addresses_of_a_later_release(url: str, what: str, tmp_path: Path) -> None:
    report = examine(configured(tmp_path, connection_string=url))
    assert report.exit_status == 1
    assert what in only(report, "error")
    assert report.grid["kind"] == "redis"
    assert SECRET not in str(report)


# -- what facts mean ------------------------------------------------------------------------------

FACTS = ServerFacts(
    name="redis",
    version="7.2.4",
    tls=True,
    role="master",
    info={"maxmemory": "100", "maxmemory_policy": "noeviction", "aof_enabled": "1"},
    kept={"save": "", "appendfsync": "everysec"},
    may_not_ask=(),
    ping=Timing(50, 0.0005, 0.002),
    clock_difference=-0.9,
)


def test_a_good_server_needs_one_word() -> None:
    (finding,) = of_server(FACTS)
    assert finding == Finding("ok", "redis 7.2.4 answers a PING after 500 µs")


@pytest.mark.parametrize(("ahead", "side"), [(1.5, "1.5 s ahead of"), (-3600.0, "3600.0 s behind")])
def test_clocks_that_differ(ahead: float, side: str) -> None:
    clock, _ = of_server(replace(FACTS, clock_difference=ahead))
    assert clock.severity == "warning"
    assert f"this machine's clock is {side} the server's" in clock.what


@pytest.mark.usefixtures("quick")
def test_the_clocks_difference_is_measured(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def time() -> float:
            return time.time() + 90.0

    monkeypatch.setattr(redis_server, "time", Wrong)
    report = examine(configured(tmp_path, connection_string=server.url))
    assert 89_000 < report.grid["clock_difference_ms"] < 91_000
    assert "s ahead of the server's" in only(report, "warning")


def test_a_server_far_away() -> None:
    (ping,) = of_server(replace(FACTS, ping=Timing(50, 0.08, 0.09)))
    assert ping.severity == "warning"
    assert "80.0 ms: each request" in ping.what


def test_times_of_a_farm_have_other_causes() -> None:
    slow = Timing(20, 0.3, 0.5)
    for finding in of_times(slow, slow, is_farm=True):
        assert finding.severity == "warning"
        assert "disk" not in finding.do
        assert "sockets" not in finding.do
