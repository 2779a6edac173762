"""A web.config as gridsession.toml: the same options, its notes as comments, no secret in these."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gridsession import Session
from gridsession.settings import KINDS
from gridsession.sources.given import Given, Source
from gridsession.sources.resolve import LOCATIONS
from gridsession.sources.web_config import read
from gridsession.tools.migrate import to_toml

SECRET = "hunter2-of-the-grid"
WHOLE = f"""<configuration>
 <appSettings>
  <add key="mail" value="smtp://:{SECRET}@h"/>
  <add key="aspnet:AllowConcurrentRequestsPerSession" value="true"/>
 </appSettings>
 <connectionStrings>
  <add name="Grid" connectionString="redis://:{SECRET}@h"/>
  <add name="Shop" connectionString="Server={SECRET}"/>
 </connectionStrings>
 <system.web>
  <httpRuntime executionTimeout="90"/>
  <httpCookies requireSSL="true" httpOnlyCookies="false"/>
  <pages enableSessionState="ReadOnly"/>
  <sessionState mode="Custom" customProvider="P" timeout="20" cookieName="sid"
    stateConnectionString="tcpip={SECRET}" Timeout="{SECRET}">
   <add name="P" connectionStringElement="grid" remoteStores="east,west" clientCacheCapacity="7"/>
  </sessionState>
 </system.web>
</configuration>"""


def load(folder: Path, text: str) -> Source:
    (folder / "web.config").write_text(text)
    return read(folder / "web.config")


def options(source: Source) -> dict[str, object]:
    return {name: given.value for name, given in source.options.items()}


def comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


def test_a_web_config_becomes_the_same_in_toml(tmp_path: Path) -> None:
    source = load(tmp_path, WHOLE)
    text = to_toml(source)
    document = tomllib.loads(text)
    assert document.pop("connection_strings") == {"Grid": f"redis://:{SECRET}@h"}
    assert document == options(source)
    assert document == {
        "connection_string_element": "Grid",
        "remote_stores": ["east", "west"],
        "client_cache_capacity": 7,
        "timeout": 1200.0,
        "session_cookie": "sid",
        "execution_timeout": 90.0,
        "https_only": True,
        "access": "read_only wait_for_writer",
        "allow_concurrent_requests_per_session": True,
    }
    assert type(document["timeout"]) is float
    assert "Server=" not in text  # the application's own
    assert "smtp" not in text


def test_every_note_is_a_comment_and_no_comment_holds_a_value(tmp_path: Path) -> None:
    source = load(tmp_path, WHOLE)
    lines = comments(to_toml(source))
    assert lines[0] == "# Settings of gridsession, from web.config."
    assert len(source.notes) == 3
    for note in source.notes:
        assert f"# {note}" in lines
    assert all(SECRET not in line and str(tmp_path) not in line for line in lines)


def test_a_connection_string_is_written_as_it_is(tmp_path: Path) -> None:
    text = f'<add name="P" connectionString="redis://a:{SECRET}&quot;\\@h?x=é&#10;#"/>'
    state = f'<sessionState mode="Custom" customProvider="P">{text}</sessionState>'
    written = to_toml(load(tmp_path, state))
    assert tomllib.loads(written) == {"connection_string": f'redis://a:{SECRET}"\\@h?x=é\n#'}
    assert all(SECRET not in line for line in comments(written))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"grid": Given("memory:", "x"), "b": Given("c", "x")}, {"grid": "memory:"}),
        ({"b": Given("c", "x")}, None),
        ({}, None),
    ],
)
def test_the_entry_that_an_option_names_comes_along(
    entries: dict[str, Given], expected: dict[str, str] | None
) -> None:
    option = {"connection_string_app_setting": Given("grid", "x")}
    document = tomllib.loads(to_toml(Source("web.config", option, app_settings=entries)))
    assert document.get("app_settings") == expected
    assert "connection_strings" not in document


def test_nothing_is_an_empty_file() -> None:
    text = to_toml(Source("web.config"))
    assert tomllib.loads(text) == {}
    assert comments(text) == ["# Settings of gridsession, from web.config."]


def test_rules_and_options_keep_their_places() -> None:
    rules = {"GET /a/*": "none", "/b": "read_only"}
    source = Source("x", {"access": Given(rules, "x"), "timeout": Given(5.0, "x")})
    assert tomllib.loads(to_toml(source)) == {"access": rules, "timeout": 5.0}


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@given(TEXT, st.lists(TEXT, max_size=3), st.dictionaries(TEXT, TEXT, max_size=3), TEXT)
def test_whatever_a_source_holds_comes_back(
    name: str, notes: list[str], entries: dict[str, str], named: str
) -> None:
    given_entries = {key: Given(value, "x") for key, value in (entries | {named: "v"}).items()}
    source = Source(
        name,
        {"connection_string_element": Given(named, "x"), "remote_stores": Given([*entries], "x")},
        connection_strings=given_entries,
        notes=notes,
    )
    assert tomllib.loads(to_toml(source)) == {
        "connection_string_element": named,
        "remote_stores": [*entries],
        "connection_strings": {named: "v"},
    }


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cn"]), min_size=1, max_size=9),
    st.integers(1, 525_600),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_web_config_says_comes_back(tmp_path: Path, text: str, minutes: int) -> None:
    value = text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    source = load(
        tmp_path,
        f'<sessionState mode="Custom" customProvider="P" timeout="{minutes}"><add name="P" '
        f'connectionString="{value}" namespace="{value}"/></sessionState>',
    )
    assert tomllib.loads(to_toml(source)) == options(source)
    assert source.options["namespace"].value == text


# -- the guide ------------------------------------------------------------------------------------

GUIDE = (Path(__file__).parents[2] / "docs" / "coming-from-aspnet.md").read_text(encoding="utf-8")
NAMES = [
    "mode",
    "customProvider",
    "timeout",
    "cookieless",
    "cookieName",
    "cookieSameSite",
    "regenerateExpiredSessionId",
    "compressionEnabled",
    "stateConnectionString",
    "stateNetworkTimeout",
    "sqlConnectionString",
    "sqlCommandTimeout",
    "sqlConnectionRetryInterval",
    "allowCustomSqlDatabase",
    "partitionResolverType",
    "sessionIDManagerType",
    "useHostingIdentity",
    "name",
    "type",
    "connectionString",
    "connectionStringEnvironmentVariable",
    "connectionStringAppSetting",
    "connectionStringElement",
    "namespace",
    "clientCacheType",
    "clientCacheCapacity",
    "handleSessionEnd",
    "remoteStores",
    "applicationName",
    "description",
    "aspnet:AllowConcurrentRequestsPerSession",
    "aspnet:RequestQueueLimitPerSession",
    "executionTimeout",
    "requireSSL",
    "domain",
    "sameSite",
    "httpOnlyCookies",
    "enableSessionState",
    "configSource",
    "file",
    "configProtectionProvider",
    "Item",
    "Add",
    "Remove",
    "RemoveAt",
    "RemoveAll",
    "Clear",
    "Abandon",
    "SessionID",
    "IsNewSession",
    "IsReadOnly",
    "Timeout",
    "Keys",
    "Count",
    "Mode",
    "CookieMode",
    "IsCookieless",
    "LCID",
    "CodePage",
    "Contents",
    "StaticObjects",
    "SyncRoot",
    "IsSynchronized",
    "CopyTo",
    "GetEnumerator",
    "EnableSessionState",
    "SessionStateBehavior.Default",
    "SessionStateBehavior.Required",
    "SessionStateBehavior.ReadOnly",
    "SessionStateBehavior.Disabled",
    "Session_Start",
    "Session_End",
]
LATER = [
    "handleSessionEnd",
    "remoteStores",
    "Session_End",
]


def rows(name: str) -> list[str]:
    """The rows of tables that begin with a name."""
    named = re.compile(rf"\| [^|]*(?<![\w:]){re.escape(name)}\b")
    return [line for line in GUIDE.splitlines() if named.match(line)]


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_tells_of_every_name(name: str) -> None:
    assert rows(name)


@pytest.mark.parametrize("name", LATER)
def test_the_guide_says_what_does_not_act_yet(name: str) -> None:
    assert any("checked and kept, acts in a later release" in row for row in rows(name))


def test_the_guide_names_only_what_there_is() -> None:
    members = set(re.findall(r"`(?:await )?session\.(\w+)", GUIDE))
    assert {"id", "key", "is_new", "timeout", "abandon"} <= members
    assert members <= set(dir(Session))
    settings_part = GUIDE.partition("## `HttpSessionState`")[0]
    options = set(re.findall(r"^\| [^|]+ \| `([a-z_]+)[^`|]*` \|", settings_part, re.MULTILINE))
    assert {"timeout", "client_cache_type", "access"} <= options
    assert options <= {*KINDS, *LOCATIONS}
