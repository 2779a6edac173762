"""A web.config is read as it is: options with their places, a note or an error for all else."""

from __future__ import annotations

import codecs
import errno
import os
import re
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gridsession import SessionSettings, SettingsError
from gridsession.sources.given import Source
from gridsession.sources.web_config import read
from gridsession.sources.web_config_values import MAX_NOTES

SECRET = "hunter2-of-the-grid"

# The provider's documentation, word for word; its own closing tags were lost in conversion.
REMOVE = """    <remove name="Session" />"""
ADD = """    <add name="Session" type="Microsoft.AspNet.SessionState.SessionStateModuleAsync, Microsoft.AspNet.SessionState.SessionStateModule, Version=, Culture=neutral, PublicKeyToken=31bf3856ad364e35" preCondition="integratedMode" />"""  # noqa: E501
SESSION_STATE = """<sessionState mode="Custom" customProvider="ScaleOutAsyncSessionProvider" timeout="20" regenerateExpiredSessionId="true">"""  # noqa: E501
PROVIDER = """    <add name="ScaleOutAsyncSessionProvider"
         namespace="My cache namespace" />"""
CONCURRENT = """  <add key="aspnet:AllowConcurrentRequestsPerSession" value="true"/>"""

CUSTOM = 'mode="Custom" customProvider="Grid"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


NO_STORE = "sessionState provider: it names no store"


def load(folder: Path, text: str | bytes, name: str = "web.config") -> Source:
    """What is read, without the note that most of these providers earn."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    source = read(path)
    source.notes = [note for note in source.notes if NO_STORE not in note]
    return source


def refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(SettingsError) as raised:
        load(folder, text)
    assert str(folder) not in str(raised.value)
    return str(raised.value)


def values(source: Source) -> dict[str, object]:
    return {name: option.value for name, option in source.options.items()}


def session_state(attributes: str, inside: str = "") -> str:
    return (
        f"<configuration>\n<system.web>\n<sessionState {attributes}>\n{inside}</sessionState>\n"
        "</system.web>\n</configuration>"
    )


def custom(provider: str = "", state: str = "") -> str:
    """A provider's `add` on line 4."""
    return session_state(f"{CUSTOM} {state}", f'<add name="Grid" {provider} />\n')


def web(inside: str) -> str:
    """Elements of system.web, from line 3 on."""
    return f"<configuration>\n<system.web>\n{inside}\n</system.web>\n</configuration>"


# -- the specification's own text ----------------------------------------------------------------


@pytest.mark.parametrize("inside", [PROVIDER, f"  <providers>\n{PROVIDER}\n  </providers>"])
def test_the_specifications_session_state_is_read(folder: Path, inside: str) -> None:
    source = load(folder, f"{SESSION_STATE}\n{inside}\n</sessionState>")
    assert values(source) == {
        "timeout": 1200.0,
        "regenerate_expired_session_id": True,
        "namespace": "My cache namespace",
    }
    assert type(source.options["timeout"].value) is float
    assert source.options["timeout"].place == "web.config, line 1: sessionState timeout"
    assert source.notes == []


def test_the_specifications_module_is_read(folder: Path) -> None:
    for text in (
        f"<modules>\n{REMOVE}\n{ADD}\n</modules>",
        f"<system.webServer><modules>\n{REMOVE}\n{ADD}\n</modules></system.webServer>",
    ):
        assert load(folder, text) == Source("web.config")


def test_the_specifications_app_setting_is_read(folder: Path) -> None:
    source = load(folder, f"<appSettings>\n{CONCURRENT}\n</appSettings>")
    assert values(source) == {"allow_concurrent_requests_per_session": True}
    place = "web.config, line 2: appSettings aspnet:AllowConcurrentRequestsPerSession"
    assert source.options["allow_concurrent_requests_per_session"].place == place
    assert source.notes == []


def test_the_whole_of_the_specification_is_one_file(folder: Path) -> None:
    source = load(
        folder,
        f"""<?xml version="1.0" encoding="utf-8"?>
<configuration>
 <appSettings>
{CONCURRENT}
 </appSettings>
 <system.web>
{SESSION_STATE}
{PROVIDER}
</sessionState>
 </system.web>
 <system.webServer><modules>
{REMOVE}
{ADD}
 </modules></system.webServer>
</configuration>""",
    )
    assert len(source.options) == 4
    assert (
        source.options["namespace"].place == "web.config, line 8: sessionState provider namespace"
    )
    assert [*source.app_settings] == ["aspnet:AllowConcurrentRequestsPerSession"]
    assert source.notes == []


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [b"", codecs.BOM_UTF8])
def test_a_file_with_and_without_byte_order_mark(folder: Path, prefix: bytes) -> None:
    assert values(load(folder, prefix + custom('namespace="é"').encode())) == {"namespace": "é"}
    assert values(load(folder, custom('namespace="é"').encode("utf-16"))) == {"namespace": "é"}


def test_a_file_that_is_not_there_or_is_none_is_named(folder: Path) -> None:
    (folder / "web.config").mkdir()
    for path, expected in (
        (folder / "Web.config", "Web.config cannot be read: No such file or directory"),
        (folder / "web.config", "web.config is a folder; name the web.config in it"),
        (folder / "a\0b", "cannot be read: no usable file name"),
        (folder / ("x" * 300), "cannot be read: File name too long"),
        (folder / "web.config" / "x" / "y", "y cannot be read"),
    ):
        with pytest.raises(SettingsError) as raised:
            read(path)
        assert expected in str(raised.value)
        assert str(folder) not in str(raised.value)


def test_a_file_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:  # root, as whom tests may run, reads everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (folder / "web.config").touch(mode=0)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SettingsError, match=r"web.config cannot be read: Permission denied"):
        read(folder / "web.config")


def test_a_root_of_another_kind_is_refused(folder: Path) -> None:
    assert "web.config, line 1: this is no web.config" in refusal(folder, "<html/>")
    assert refusal(folder, "<Configuration/>").endswith("; did you mean configuration?")


def test_what_is_other_programs_is_passed_over(folder: Path) -> None:
    source = load(
        folder,
        """<configuration xmlns="http://schemas.microsoft.com/.NetConfiguration/v2.0">
<configSections><section name="x" type="y"/></configSections>
<x mode="StateServer"><sessionPageState/></x>
<system.web>
 <compilation debug="true"/><sessionPageState historySize="9"/><machineKey decryptionKey="1"/>
 <httpRuntime targetFramework="4.8" maxRequestLength="4096"/>
 <pages enableViewState="false" enableViewStateMac="true"><namespaces/></pages>
 <httpModules><add name="Other" Type="x"/></httpModules>
</system.web>
<system.webServer><handlers/><modules runAllManagedModulesForAllRequests="true">
 <remove name="FormsAuthentication"/><add name="Other"/></modules></system.webServer>
<runtime/>
</configuration>""",
    )
    assert source == Source("web.config")


# -- mode and provider ---------------------------------------------------------------------------


def test_the_custom_provider_is_chosen_among_several(folder: Path) -> None:
    several = '<add name="A" namespace="a"/><add name="B" namespace="b"/>'
    for name in ("B", "b"):  # names are compared in any case there
        text = session_state(f'mode="Custom" customProvider="{name}"', several)
        assert values(load(folder, text)) == {"namespace": "b"}


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ('<add name="A"/><clear/><add name="Grid" namespace="x"/>', "x"),
        (
            '<add name="Grid" namespace="y"/><remove name="grid"/><add name="GRID" namespace="z"/>',
            "z",
        ),
        ('<clear/><providers><clear/><add name="Grid" namespace="x"/></providers>', "x"),
        ('<remove name="Grid"/><add name="Grid" namespace="x"/>', "x"),
    ],
)
def test_remove_and_clear_are_honoured(folder: Path, inside: str, expected: str) -> None:
    source = load(folder, session_state(CUSTOM, inside))
    assert values(source) == {"namespace": expected}
    assert source.notes == []


@pytest.mark.parametrize(
    ("attributes", "inside", "expected"),
    [
        (
            CUSTOM,
            '<add name="Other"/><add name="Gird"/>',
            "there are: Other, Gird; did you mean Gird?",
        ),
        ('mode="Custom"', '<add name="Other"/>', "there are: Other"),
        (CUSTOM, "", "there is none: <add name="),
        (CUSTOM, '<add name="Grid"/><clear/>', "there is none"),
        (CUSTOM, '<add name="Grid"/><remove name="Grid"/>', "there is none"),
        (CUSTOM, '<add name="a&#10;b"/>', r"there are: a\nb"),
    ],
)
def test_a_provider_that_is_missing_is_told_those_there_are(
    folder: Path, attributes: str, inside: str, expected: str
) -> None:
    text = refusal(folder, session_state(attributes, inside))
    assert text.startswith("web.config, line 3: sessionState customProvider: ")
    assert expected in text


@pytest.mark.parametrize(("count", "end"), [(20, "P19"), (21, "P19, …")])
def test_many_providers_are_not_all_listed(folder: Path, count: int, end: str) -> None:
    many = "".join(f'<add name="P{number}"/>' for number in range(count))
    assert refusal(folder, session_state(CUSTOM, many)).endswith(end)


def test_a_provider_added_twice_is_refused(folder: Path) -> None:
    text = refusal(folder, session_state(CUSTOM, '<add name="Grid"/>\n<add name="grid"/>'))
    assert text.startswith(
        "web.config, line 5: sessionState provider add: line 4 adds the same name"
    )


def test_mode_off_is_no_sessions(folder: Path) -> None:
    source = load(folder, session_state('mode="Off"'))
    assert values(source) == {"access": "none"}
    assert source.options["access"].place == "web.config, line 3: sessionState mode"
    assert source.notes == []


@pytest.mark.parametrize("attributes", ['mode="InProc"', "", 'timeout="20"'])
def test_in_proc_is_the_default_grid(folder: Path, attributes: str) -> None:
    source = load(folder, session_state(attributes))
    assert "connection_string" not in source.options
    (note,) = source.notes
    assert note.startswith("web.config, line 3: sessionState mode: ")
    assert "embedded:" in note


def test_a_provider_under_another_mode_is_noted(folder: Path) -> None:
    for attributes, inside in (
        ('mode="Off" customProvider="Grid"', ""),
        ('mode="Off"', '<providers><add name="Grid"/></providers>'),
    ):
        (note,) = load(folder, session_state(attributes, inside)).notes
        assert 'mode="Custom" only' in note


@pytest.mark.parametrize("mode", ["StateServer", "SQLServer"])
def test_modes_that_there_are_not_say_what_to_use(folder: Path, mode: str) -> None:
    text = refusal(folder, session_state(f'mode="{mode}"'))
    assert text.startswith("web.config, line 3: sessionState mode: ")
    parts = (mode, "embedded:", "redis://", 'mode="Custom"', "GRIDSESSION_CONFIG")
    assert all(part in text for part in parts)


@pytest.mark.parametrize(
    ("mode", "near"), [("custom", "Custom"), ("Inproc", "InProc"), ("of", "Off")]
)
def test_an_unknown_mode_is_told_its_neighbour(folder: Path, mode: str, near: str) -> None:
    text = refusal(folder, session_state(f'mode="{mode}"'))
    assert "one of Custom, InProc, Off, StateServer, SQLServer" in text
    assert text.endswith(f"; did you mean {near}?")


# -- attributes of sessionState ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "option", "value"),
    [
        ('timeout="1"', "timeout", 60.0),
        ('timeout=" 525600 "', "timeout", 31_536_000.0),
        ('regenerateExpiredSessionId="false"', "regenerate_expired_session_id", False),
        ('regenerateExpiredSessionId="True"', "regenerate_expired_session_id", True),
        ('cookieName="ASP.NET_SessionId"', "session_cookie", "ASP.NET_SessionId"),
        ('cookieSameSite="None"', "same_site", "none"),
        ('cookieSameSite="Lax"', "same_site", "lax"),
        ('cookieSameSite="strict"', "same_site", "strict"),
        ('compressionEnabled="TRUE"', "compression_enabled", True),
    ],
)
def test_attributes_of_session_state(
    folder: Path, attribute: str, option: str, value: object
) -> None:
    source = load(folder, custom(state=attribute))
    assert values(source) == {option: value}
    name = attribute.partition("=")[0]
    assert source.options[option].place == f"web.config, line 3: sessionState {name}"
    assert source.notes == []


@pytest.mark.parametrize("value", ["UseCookies", "false", "False"])
def test_cookies_are_used(folder: Path, value: str) -> None:
    source = load(folder, custom(state=f'cookieless="{value}"'))
    assert (values(source), source.notes) == ({}, [])


@pytest.mark.parametrize("value", ["UseUri", "true", "True"])
def test_ids_in_addresses_are_refused(folder: Path, value: str) -> None:
    text = refusal(folder, custom(state=f'cookieless="{value}"'))
    assert text.startswith("web.config, line 3: sessionState cookieless: it must be UseCookies")


@pytest.mark.parametrize("value", ["AutoDetect", "UseDeviceProfile"])
def test_ids_that_might_be_in_addresses_are_noted(folder: Path, value: str) -> None:
    (note,) = load(folder, custom(state=f'cookieless="{value}"')).notes
    assert note.startswith("web.config, line 3: sessionState cookieless: ")
    assert "UseCookies" in note


@pytest.mark.parametrize("value", ["Unspecified", "unspecified", "-1"])
def test_an_unspecified_same_site_is_noted(folder: Path, value: str) -> None:
    source = load(folder, custom(state=f'cookieSameSite="{value}"'))
    assert values(source) == {}
    assert "sessionState cookieSameSite: " in source.notes[0]


@pytest.mark.parametrize(
    "attribute",
    [
        "stateConnectionString",
        "sqlConnectionString",
        "stateNetworkTimeout",
        "sqlCommandTimeout",
        "sqlConnectionRetryInterval",
        "allowCustomSqlDatabase",
        "partitionResolverType",
        "sessionIDManagerType",
        "useHostingIdentity",
    ],
)
def test_what_has_no_counterpart_is_noted(folder: Path, attribute: str) -> None:
    source = load(folder, custom(state=f'{attribute}="{SECRET}"'))
    assert values(source) == {}
    (note,) = source.notes
    assert note.startswith(f"web.config, line 3: sessionState {attribute}: ")
    assert "no such attribute" not in note
    assert SECRET not in note
    assert load(folder, custom(state=f'{attribute}=""')).notes == []


BAD_STATE = [
    ("timeout", "minutes", ["0", "-1", "1.5", "525601", "20m", "", "00:20:00", "٢٠", "9" * 5000]),
    ("timeout", "a whole number of minutes, at least 1 and at most 525600", ["Infinite"]),
    ("regenerateExpiredSessionId", "true or false", ["1", "yes", "", "tru"]),
    ("compressionEnabled", "true or false", ["on"]),
    ("cookieless", "UseCookies, UseUri, AutoDetect, UseDeviceProfile", ["usecookies", "no", ""]),
    ("cookieSameSite", "None, Lax, Strict, Unspecified; did you mean Strict?", ["Strikt"]),
    ("cookieName", "not empty", [""]),
]


@pytest.mark.parametrize(
    ("attribute", "allowed", "bad"), [(a, b, c) for a, b, several in BAD_STATE for c in several]
)
def test_wrong_values_of_session_state(
    folder: Path, attribute: str, allowed: str, bad: str
) -> None:
    text = refusal(folder, custom(state=f'{attribute}="{bad}"'))
    assert text.startswith(f"web.config, line 3: sessionState {attribute}: it must be ")
    assert allowed in text
    assert len(text) < 250


def test_an_error_says_which_option_is_meant(folder: Path) -> None:
    for text, option in (
        (custom(state='timeout="x"'), "timeout"),
        (custom("handleSessionEnd=''"), "handle_session_end"),
    ):
        with pytest.raises(SettingsError) as raised:
            load(folder, text)
        assert raised.value.option == option


# -- the provider --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "option", "value"),
    [
        (f'connectionString="redis://:{SECRET}@h"', "connection_string", f"redis://:{SECRET}@h"),
        (
            'connectionString="bootstrapGateways=a:721,b:721;useSecure=false"',
            "connection_string",
            "bootstrapGateways=a:721,b:721;useSecure=false",
        ),
        ('connectionStringEnvironmentVariable="X"', "connection_string_environment_variable", "X"),
        ('connectionStringAppSetting="X"', "connection_string_app_setting", "X"),
        ('connectionStringElement="X"', "connection_string_element", "X"),
        ('clientCacheType="LRU-MaxMemory"', "client_cache_type", "LRU-MaxMemory"),
        ('clientCacheCapacity="0"', "client_cache_capacity", 0),
        ('clientCacheCapacity="250"', "client_cache_capacity", 250),
        ('handleSessionEnd="true"', "handle_session_end", True),
        ('namespace="My cache namespace"', "namespace", "My cache namespace"),
        ('remoteStores="east, west"', "remote_stores", ["east", "west"]),
        ('remoteStores="east"', "remote_stores", ["east"]),
    ],
)
def test_attributes_of_the_provider(
    folder: Path, attribute: str, option: str, value: object
) -> None:
    source = load(folder, custom(attribute))
    assert values(source) == {option: value}
    assert type(source.options[option].value) is type(value)
    name = attribute.partition("=")[0]
    assert source.options[option].place == f"web.config, line 4: sessionState provider {name}"
    assert source.notes == []


def test_a_providers_type_is_accepted_and_its_description_noted(folder: Path) -> None:
    source = load(folder, custom('type="A.B, C" description="mine" applicationName="/shop"'))
    assert values(source) == {}
    first, second, third = source.notes
    assert first.startswith("web.config, line 4: sessionState provider description: ")
    assert second.startswith("web.config, line 4: sessionState provider applicationName: ")
    assert "namespace" in second
    assert third.startswith("web.config, line 4: sessionState provider type: it is another vendor")
    for ours in ("Scaleout.AspNet.SessionProvider, x", "gridsession"):
        assert load(folder, custom(f'type="{ours}"')).notes == []
    assert values(load(folder, custom('remoteStores=" "'))) == {}


@pytest.mark.parametrize("more", ["", 'namespace="shop"', 'type="A.Redis" host="h" accessKey="k"'])
def test_a_provider_that_names_no_store_is_noted(folder: Path, more: str) -> None:
    (folder / "web.config").write_text(custom(more))
    note = read(folder / "web.config").notes[-1]
    assert note.startswith(f"web.config, line 4: {NO_STORE}, so sessions are kept by embedded:")
    assert "GRIDSESSION_CONNECTION_STRING" in note
    assert 'connectionString="embedded:"' in note


@pytest.mark.parametrize("which", ["", "EnvironmentVariable", "AppSetting", "Element"])
def test_a_provider_that_names_its_store_is_not_noted(folder: Path, which: str) -> None:
    (folder / "web.config").write_text(custom(f'connectionString{which}="x"'))
    assert read(folder / "web.config").notes == []


def test_the_specifications_provider_is_noted_and_loads(folder: Path) -> None:
    path = folder / "web.config"
    path.write_text(f"{SESSION_STATE}\n{PROVIDER}\n</sessionState>")
    assert NO_STORE in str(read(path).notes)
    assert SessionSettings.load(path, {}).connection_string == "embedded:"


@pytest.mark.parametrize(
    ("attribute", "allowed", "bad"),
    [
        ("clientCacheCapacity", "a whole number, at least 0 and at most 2147483647", "-1"),
        ("clientCacheCapacity", "a whole number", "100MB"),
        ("clientCacheCapacity", "a whole number", "2147483648"),
        ("handleSessionEnd", "true or false", "1"),
        ("remoteStores", "names with one comma between each two", "a,,b"),
        ("connectionString", "not empty", ""),
        ("connectionStringElement", "not empty", ""),
        ("namespace", "not empty", ""),
    ],
)
def test_wrong_values_of_the_provider(folder: Path, attribute: str, allowed: str, bad: str) -> None:
    text = refusal(folder, custom(f'{attribute}="{bad}"'))
    assert text.startswith(f"web.config, line 4: sessionState provider {attribute}: it must be ")
    assert allowed in text
    assert not bad or bad not in text


# -- names that are none -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            custom(state='timeOut="20"'),
            "line 3: sessionState timeOut: there is no such attribute; did you mean timeout?",
        ),
        (custom(state='cookielss="x"'), "did you mean cookieless?"),
        (custom(state='xyz="x"'), "line 3: sessionState xyz: there is no such attribute"),
        (
            custom('connectionstring="x"'),
            "line 4: sessionState provider connectionstring: there is no such attribute; "
            "did you mean connectionString?",
        ),
        (custom('clientCacheCapacty="x"'), "did you mean clientCacheCapacity?"),
        (custom('remoteStore="x"'), "did you mean remoteStores?"),
        (custom('timeout="5"'), "provider timeout: it is passed over: it belongs to sessionState"),
        (custom(state='namespace="x"'), "sessionState namespace: it is passed over: it belongs to"),
        (custom('lockItem="true"'), "provider lockItem: has no counterpart"),
        (
            custom('xmlns:xdt="x" xdt:Transform="Replace"'),
            "provider xdt:Transform: belongs to a program that transforms",
        ),
        (
            session_state(CUSTOM, '<add name="Grid"/><Add name="x"/>'),
            "line 4: Add in sessionState: there is no such element; did you mean add?",
        ),
        (
            session_state(CUSTOM, '<add name="Grid"><x/></add>'),
            "line 4: x in sessionState provider: there is no such element",
        ),
        (session_state(CUSTOM, '<add name="Grid"/><Providers/>'), "did you mean providers?"),
        (
            session_state(CUSTOM, '<add name="Grid"/><providers x="1"/>'),
            "sessionState providers x: ",
        ),
        (
            session_state(CUSTOM, '<add name="Grid"/><add Name="B"/>'),
            "sessionState provider add: it has no name",
        ),
        (session_state(CUSTOM, f'<add name="Grid"/>{SECRET}'), "line 3: sessionState holds text"),
        (
            web('<SessionState mode="Off"/>'),
            "line 3: SessionState: there is no such element; did you mean sessionState?",
        ),
        (web("<httpcookies/>"), "did you mean httpCookies?"),
        (
            web('<httpCookies requireSsl="true"/>'),
            "line 3: httpCookies requireSsl: there is no such attribute; did you mean requireSSL?",
        ),
        (web('<httpRuntime ExecutionTimeout="5"/>'), "did you mean executionTimeout?"),
        (web('<pages EnableSessionState="5"/>'), "did you mean enableSessionState?"),
        (web('<pages configsource="x"/>'), "did you mean configSource?"),
        ('<modules configsource="x"/>', "modules configsource: there is no such attribute"),
        ('<appSettings File="x"/>', "appSettings File: there is no such attribute; did you mean"),
        ("<configuration><System.Web/></configuration>", "did you mean system.web?"),
        ("<configuration><appsettings/></configuration>", "did you mean appSettings?"),
        ("<configuration><sessionState/></configuration>", "sessionState belongs into system.web"),
        ("<system.webServer><Modules/></system.webServer>", "did you mean modules?"),
        ('<modules><Remove name="Session"/></modules>', "did you mean remove?"),
        (
            '<modules><add Name="Session" type="System.Web.SessionState.SessionStateModule"/>'
            "</modules>",
            "modules add Session Name: there is no such attribute; did you mean name?",
        ),
        (
            '<appSettings><add Key="a" value="b"/></appSettings>',
            "appSettings add Key: there is no such attribute; did you mean key?",
        ),
        ('<appSettings><add value="b"/></appSettings>', "appSettings add: it has no key"),
        ('<appSettings><remove key="b" x="1"/><clear/></appSettings>', "appSettings remove x: "),
        (
            '<appSettings><set key="b"/></appSettings>',
            "set in appSettings: there is no such element",
        ),
        (
            '<appSettings><add key="aspnet:AllowConcurrentRequestPerSession" value="x"/>'
            "</appSettings>",
            "did you mean aspnet:AllowConcurrentRequestsPerSession?",
        ),
        (
            '<connectionStrings><add name="a"/></connectionStrings>',
            "connectionStrings add: it has no connectionString",
        ),
        (
            '<connectionStrings><add connectionString="a"/></connectionStrings>',
            "connectionStrings add: it has no name",
        ),
        ('<connectionStrings ConfigSource="a"/>', "did you mean configSource?"),
    ],
)
def test_nothing_of_sessions_is_passed_over_in_silence(
    folder: Path, text: str, expected: str
) -> None:
    notes = load(folder, text).notes
    assert [note for note in notes if expected in note], notes
    assert all(SECRET not in note for note in notes)


def test_notes_have_an_end(folder: Path) -> None:
    many = "".join(f' a{i}="x"' for i in range(5000))
    notes = load(folder, custom(many) + "<!-- -->").notes
    assert len(notes) == MAX_NOTES + 1
    assert "there is more" in notes[-1]
    entries = "<add/>" * 300
    notes = load(folder, f"<appSettings>{entries}</appSettings>").notes
    assert len(notes) == MAX_NOTES + 1
    long = load(folder, custom(f'{"connectionStringg" * 1000}="x"')).notes[0]
    assert len(long) < 250


def test_a_section_that_is_there_twice_is_refused(folder: Path) -> None:
    text = refusal(folder, web('<pages/>\n<sessionState mode="Off"/>\n<sessionState/>'))
    assert text.startswith("web.config, line 5: sessionState is there twice, first on line 4")
    groups = "<configuration><system.web/><system.web><pages/></system.web></configuration>"
    assert load(folder, groups) == Source("web.config")


# -- appSettings and connectionStrings -----------------------------------------------------------


def test_app_settings_are_options_and_entries(folder: Path) -> None:
    source = load(
        folder,
        '<appSettings>\n<add key="gone" value="1"/><clear/>\n'
        '<add key="aspnet:requestQueueLimitPerSession" value="7"/>\n'
        f'<add key="grid" value="{SECRET}"/><add key="b" value="1"/><remove key="B"/>\n'
        '<add key="empty"/><add key="twice" value="1"/>\n<add key="Twice" value="2"/>\n'
        '<add key="aspnet:MaxHttpCollectionKeys" value="5000"/>\n</appSettings>',
    )
    assert values(source) == {"request_queue_limit_per_session": 7}
    place = "web.config, line 3: appSettings aspnet:RequestQueueLimitPerSession"
    assert source.options["request_queue_limit_per_session"].place == place
    assert {key: given.value for key, given in source.app_settings.items()} == {
        "aspnet:requestQueueLimitPerSession": "7",
        "grid": SECRET,
        "empty": "",
        "Twice": "2",
        "aspnet:MaxHttpCollectionKeys": "5000",
    }
    assert source.app_settings["grid"].place == "web.config, line 4: appSettings add"
    assert source.notes == []


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("AllowConcurrentRequestsPerSession", "1"),
        ("AllowConcurrentRequestsPerSession", ""),
        ("RequestQueueLimitPerSession", "0"),
        ("RequestQueueLimitPerSession", "many"),
    ],
)
def test_wrong_values_of_app_settings(folder: Path, key: str, bad: str) -> None:
    text = refusal(folder, f'<appSettings>\n<add key="aspnet:{key}" value="{bad}"/></appSettings>')
    assert text.startswith(f"web.config, line 2: appSettings aspnet:{key}: it must be ")


def test_connection_strings_are_entries(folder: Path) -> None:
    source = load(
        folder,
        '<connectionStrings>\n<add name="old" connectionString="x"/><clear/>\n'
        f'<add name="grid" connectionString="redis://:{SECRET}@h" providerName="x"/>\n'
        '<add name="db" connectionString="d"/><remove name="DB"/>\n</connectionStrings>',
    )
    assert {name: tuple(entry) for name, entry in source.connection_strings.items()} == {
        "grid": (f"redis://:{SECRET}@h", "web.config, line 3: connectionStrings add")
    }
    assert (source.options, source.app_settings, source.notes) == ({}, {}, [])
    twice = '<add name="a" connectionString="x"/>'
    text = refusal(folder, f"<connectionStrings>{twice}{twice}</connectionStrings>")
    assert "line 1 adds the same name" in text


@pytest.mark.parametrize(
    ("option", "attribute", "section"),
    [
        ("app_setting", "AppSetting", '<appSettings><add key="Grid" value="x"/></appSettings>'),
        (
            "element",
            "Element",
            '<connectionStrings><add name="Grid" connectionString="x"/></connectionStrings>',
        ),
    ],
)
def test_the_connection_strings_entry_is_found_in_any_case(
    folder: Path, option: str, attribute: str, section: str
) -> None:
    for name, expected in (("grid", "Grid"), ("Grid", "Grid"), ("other", "other")):
        text = custom(f'connectionString{attribute}="{name}"')
        source = load(folder, text.replace("<configuration>", f"<configuration>{section}"))
        assert values(source) == {f"connection_string_{option}": expected}


def test_another_file_of_app_settings_wins(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "own.config").write_text(
        '<appSettings>\n<add key="A" value="theirs"/>\n<remove key="b"/>'
        '<add key="aspnet:RequestQueueLimitPerSession" value="3"/></appSettings>'
    )
    source = load(
        folder,
        r'<appSettings file="sub\own.config"><add key="a" value="1"/><add key="b" value="1"/>'
        '<add key="c" value="1"/></appSettings>',
    )
    entries = {key: given.value for key, given in source.app_settings.items()}
    assert entries == {"A": "theirs", "c": "1", "aspnet:RequestQueueLimitPerSession": "3"}
    assert source.app_settings["A"].place == "own.config, line 2: appSettings add"
    place = "own.config, line 3: appSettings aspnet:RequestQueueLimitPerSession"
    assert source.options["request_queue_limit_per_session"].place == place
    assert source.notes == []


def test_another_file_of_app_settings_may_be_missing_but_not_wrong(folder: Path) -> None:
    text = '<appSettings file="own.config"><add key="a" value="1"/></appSettings>'
    source = load(folder, text)
    assert [*source.app_settings] == ["a"]
    (note,) = source.notes
    assert note.startswith("web.config, line 1: appSettings file: there is no such file")
    assert load(folder, text.replace("own.config", "x" * 300)).notes
    assert load(folder, text.replace("own.config", "")).notes == []
    (folder / "own.config").write_text("<configuration/>")
    assert "appSettings file: the root of that file must be appSettings" in refusal(folder, text)
    (folder / "own.config").write_text("<appSettings>\n<x")
    assert refusal(folder, text).startswith("own.config, line 2: malformed XML")
    (folder / "own.config").write_text('<appSettings file="web.config"/>')
    assert "own.config, line 1: appSettings file: it is passed over" in load(folder, text).notes[0]


@pytest.mark.parametrize(
    ("tag", "inside", "option"),
    [
        (
            "appSettings",
            '<add key="aspnet:RequestQueueLimitPerSession" value="3"/>',
            "request_queue_limit_per_session",
        ),
        ("sessionState", 'mode="Off"', "access"),
        ("httpRuntime", 'executionTimeout="5"', "execution_timeout"),
        ("httpCookies", 'requireSSL="true"', "https_only"),
        ("pages", 'enableSessionState="false"', "access"),
    ],
)
def test_config_source_replaces_a_section(folder: Path, tag: str, inside: str, option: str) -> None:
    (folder / "sub").mkdir()
    whole = f"<{tag}>{inside}</{tag}>" if inside.startswith("<") else f"<{tag} {inside}/>"
    (folder / "sub" / "x.config").write_text(f"\n{whole}")
    home = "<configuration>{}</configuration>" if tag == "appSettings" else web("{}")
    source = load(folder, home.format(rf'<{tag} configSource="sub\x.config"/>'))
    assert [*source.options] == [option]
    assert source.options[option].place.startswith(f"x.config, line 2: {tag} ")
    assert source.notes == []


def test_config_source_of_connection_strings(folder: Path) -> None:
    (folder / "x.config").write_text(
        f'<connectionStrings><add name="a" connectionString="{SECRET}"/></connectionStrings>'
    )
    text = '<connectionStrings configSource="x.config"><add name="b"/></connectionStrings>'
    source = load(folder, text)
    assert [*source.connection_strings] == ["a"]
    (note,) = source.notes
    assert "connectionStrings configSource: what stands beside it is passed over" in note


def test_config_source_stays_in_the_folder(folder: Path) -> None:
    inner = folder / "app"
    inner.mkdir()
    outside = folder / "x.config"
    outside.write_text('<sessionState mode="Off"/>')
    (inner / "link.config").symlink_to(outside)
    (inner / "circle.config").symlink_to(inner / "circle.config")
    for name in ("../x.config", r"..\x.config", str(outside), "link.config", "circle.config"):
        text = refusal(inner, f'<sessionState configSource="{name}"/>')
        assert text.startswith("web.config, line 1: sessionState configSource: ")
        assert "must name a file in the folder of web.config" in text
    for name in ("y.config", "X" * 300, "C:/x.config", "."):
        text = refusal(inner, f'<sessionState configSource="{name}"/>')
        assert "there is no such file" in text
    assert load(inner, '<sessionState mode="Off" configSource=""/>').notes == []


def test_a_file_of_config_source_is_whole(folder: Path) -> None:
    text = '<sessionState configSource="x.config"/>'
    for inside, expected in (
        ("<appSettings/>", "the root of that file must be sessionState"),
        ('<sessionState configSource="y.config"/>', "it stands in one file only"),
        ('<sessionState configSource="x.config"/>', "it stands in one file only"),
        ('<sessionState configProtectionProvider="x"/>', "x.config, line 1: sessionState is encry"),
        ("<sessionState", "x.config, line 1: malformed XML"),
    ):
        (folder / "x.config").write_text(inside)
        assert expected in refusal(folder, text)


@pytest.mark.parametrize(
    "text",
    [
        '<sessionState configProtectionProvider="Rsa"><EncryptedData/></sessionState>',
        web('<httpRuntime configProtectionProvider="Rsa"/>'),
    ],
)
def test_encrypted_sections_are_refused(folder: Path, text: str) -> None:
    refused = refusal(folder, text)
    assert re.match(r"web\.config, line \d: \w+ is encrypted", refused)
    assert "decrypt it" in refused
    assert "environment variable" in refused
    assert "GRIDSESSION_CONFIG" in refused


ENCRYPTED = [
    ("appSettings", 'configProtectionProvider="Rsa"', "<EncryptedData/>"),
    ("connectionStrings", 'configProtectionProvider="Rsa"', ""),
    ("connectionStrings", "", "<EncryptedData/>"),
]
NAMED = {
    "appSettings": "connectionStringAppSetting",
    "connectionStrings": "connectionStringElement",
}


@pytest.mark.parametrize(("tag", "attributes", "inside"), ENCRYPTED)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_encrypted_entries_that_nobody_needs_are_noted(
    folder: Path, tag: str, attributes: str, inside: str, elsewhere: bool
) -> None:
    section = f"<{tag} {attributes}>{inside}</{tag}>"
    if elsewhere:
        (folder / "x.config").write_text(section)
        section = f'<{tag} configSource="x.config"/>'
    source = load(folder, f"<configuration>{section}</configuration>")
    (note,) = source.notes
    where = "x.config" if elsewhere else "web.config"
    assert note.startswith(f"{where}, line 1: {tag}: it is encrypted")
    assert "decrypt it" in note
    assert "GRIDSESSION_CONNECTION_STRING" in note
    assert (source.options, source.app_settings, source.connection_strings) == ({}, {}, {})


def test_an_encrypted_other_file_of_app_settings_is_noted(folder: Path) -> None:
    (folder / "own.config").write_text("<appSettings><EncryptedData/></appSettings>")
    text = '<appSettings file="own.config"><add key="a" value="1"/></appSettings>'
    source = load(folder, text)
    assert [*source.app_settings] == ["a"]
    assert source.notes[0].startswith("own.config, line 1: appSettings: it is encrypted")


@pytest.mark.parametrize(("tag", "attributes", "inside"), ENCRYPTED)
def test_encrypted_entries_that_the_provider_needs_are_refused(
    folder: Path, tag: str, attributes: str, inside: str
) -> None:
    path = folder / "web.config"
    path.write_text(
        f"<configuration><{tag} {attributes}>{inside}</{tag}><system.web>"
        f'<sessionState {CUSTOM}><add name="Grid" {NAMED[tag]}="Store"/></sessionState>'
        "</system.web></configuration>"
    )
    with pytest.raises(SettingsError) as raised:
        SessionSettings.load(path, {})
    assert f"line 1: {tag} is encrypted" in str(raised.value)
    assert "GRIDSESSION_CONNECTION_STRING" in str(raised.value)
    loaded = SessionSettings.load(path, {"GRIDSESSION_CONNECTION_STRING": "memory:"})
    assert loaded.connection_string == "memory:"  # as the message says


# -- httpRuntime, httpCookies, pages -------------------------------------------------------------


def test_execution_timeout(folder: Path) -> None:
    source = load(folder, web('<httpRuntime executionTimeout="300"/>'))
    assert values(source) == {"execution_timeout": 300.0}
    place = "web.config, line 3: httpRuntime executionTimeout"
    assert source.options["execution_timeout"] == (300.0, place)
    assert source.notes == []
    source = load(folder, web('<httpRuntime executionTimeout="9999999"/>'))
    assert values(source) == {"execution_timeout": 86_400.0}
    assert source.notes[0].startswith(place)
    assert load(folder, web('<httpRuntime executionTimeout="86400"/>')).notes == []
    for bad in ("0", "00:05:00", "-5", ""):
        text = refusal(folder, web(f'<httpRuntime executionTimeout="{bad}"/>'))
        assert text.startswith(f"{place}: it must be a whole number of seconds, at least 1")


def test_http_cookies(folder: Path) -> None:
    text = (
        '<httpCookies requireSSL="True" domain="shop.example" sameSite="Strict" '
        'httpOnlyCookies="true"/>'
    )
    source = load(folder, web(text))
    assert values(source) == {"https_only": True, "domain": "shop.example", "same_site": "strict"}
    assert source.options["https_only"].place == "web.config, line 3: httpCookies requireSSL"
    assert source.options["domain"].place == "web.config, line 3: httpCookies domain"
    assert source.options["same_site"].place == "web.config, line 3: httpCookies sameSite"
    assert source.notes == []
    source = load(
        folder, web('<httpCookies requireSSL="false" domain="" httpOnlyCookies="False"/>')
    )
    assert values(source) == {"https_only": False}
    (note,) = source.notes
    assert note.startswith("web.config, line 3: httpCookies httpOnlyCookies: ")
    assert "HttpOnly" in note
    for bad in ('requireSSL="1"', 'httpOnlyCookies="x"', 'sameSite="x"'):
        assert "line 3: httpCookies " in refusal(folder, web(f"<httpCookies {bad}/>"))


@pytest.mark.parametrize(
    ("state", "expected"),
    [("Lax", {"same_site": "lax"}), ("Unspecified", {}), (None, {"same_site": "strict"})],
)
def test_same_site_of_session_state_comes_first(
    folder: Path, state: str | None, expected: dict[str, str]
) -> None:
    attribute = "" if state is None else f'cookieSameSite="{state}"'
    cookies = '<httpCookies sameSite="Strict"/>'
    for text in (
        f'{cookies}<sessionState {CUSTOM} {attribute}><add name="Grid"/></sessionState>',
        f'<sessionState {CUSTOM} {attribute}><add name="Grid"/></sessionState>{cookies}',
    ):
        assert values(load(folder, web(text))) == expected


@pytest.mark.parametrize(
    ("value", "access"),
    [
        ("true", None),
        ("True", None),
        ("false", "none"),
        ("ReadOnly", "read_only wait_for_writer"),
        ("readonly", "read_only wait_for_writer"),
    ],
)
def test_pages(folder: Path, value: str, access: str | None) -> None:
    source = load(folder, web(f'<pages enableSessionState="{value}"/>'))
    assert values(source) == ({} if access is None else {"access": access})
    assert all(
        given.place == "web.config, line 3: pages enableSessionState"
        for given in source.options.values()
    )
    assert source.notes == []


def test_mode_off_comes_before_pages(folder: Path) -> None:
    for value, notes in (("ReadOnly", 1), ("true", 0)):
        text = f'<pages enableSessionState="{value}"/><sessionState mode="Off"/>'
        source = load(folder, web(text))
        assert values(source) == {"access": "none"}
        assert len(source.notes) == notes
    text = refusal(folder, web('<pages enableSessionState="yes"/>'))
    assert text.startswith(
        "web.config, line 3: pages enableSessionState: it must be true, false or"
    )


# -- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside",
    [
        f"{REMOVE}{ADD}",
        '<add name="session" type="System.Web.SessionState.SessionStateModule"/>',
        '<clear/><add name="Session" type="System.Web.SessionState.SessionStateModule, x"/>',
        '<remove name="Other"/>',
    ],
)
def test_the_session_modules_of_asp_net_are_accepted(folder: Path, inside: str) -> None:
    assert load(folder, f"<modules>{inside}</modules>") == Source("web.config")
    assert load(folder, web(f"<httpModules>{inside}</httpModules>")) == Source("web.config")


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ('<add name="Session" type="Mine.Module, Mine"/>', "line 2: modules add Session: it is no"),
        ('<add name="Session"/>', "modules add Session: it is no session module"),
        ('<remove name="Session"/>', "line 2: modules remove: the session module is removed"),
        (f'{ADD}<remove name="SESSION"/>', "modules remove: the session module is removed"),
        (f"{ADD}<clear/>", "modules clear: the session module is removed"),
        (f'{ADD}<remove name="Session" x="1"/>{ADD}', "modules remove Session x: there is no such"),
    ],
)
def test_other_session_modules_are_noted(folder: Path, inside: str, expected: str) -> None:
    source = load(folder, f"<modules>\n{inside}</modules>")
    assert source.options == {}
    (note,) = source.notes
    assert expected in note


# -- location ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ['path="."', 'path=""', "", 'path="." allowOverride="false"'])
def test_a_location_of_the_whole_application_is_no_other(folder: Path, path: str) -> None:
    inside = '<system.web><sessionState mode="Off"/></system.web>'
    location = f'<location {path} inheritInChildApplications="false">{inside}</location>'
    source = load(folder, f"<configuration>{location}</configuration>")
    assert values(source) == {"access": "none"}
    assert source.notes == []


@pytest.mark.parametrize(
    ("path", "inside", "expected"),
    [
        ("checkout", '<pages enableSessionState="true"/>', '{"/checkout/*": "exclusive"}'),
        (
            "a/b/",
            '<pages enableSessionState="ReadOnly"/>',
            '{"/a/b/*": "read_only wait_for_writer"}',
        ),
        ("cart.aspx", '<pages enableSessionState="false"/>', '{"/cart.aspx": "none"}'),
        ("static", '<sessionState mode="Off"/>', '{"/static/*": "none"}'),
        ("static", '<sessionState mode="StateServer"/>', '{"/static/*": "…"}'),
        ("a&quot;}&#10;b", '<sessionState mode="Off"/>', '{"/path/*": "none"}'),
        ("x", '<httpCookies requireSSL="true"/>', "holds for the whole application"),
        ("x", '<httpRuntime executionTimeout="true"/>', "holds for the whole application"),
        ("x", f"<httpModules>{REMOVE}</httpModules>", "holds for the whole application"),
    ],
)
def test_a_location_of_a_part_is_told_the_rule_to_write(
    folder: Path, path: str, inside: str, expected: str
) -> None:
    source = load(
        folder,
        f'<configuration>\n<location path="{path}">\n<system.web>\n{inside}\n</system.web>\n'
        "</location></configuration>",
    )
    assert source.options == {}
    (note,) = source.notes
    assert re.match(r"web\.config, line 4: \w+ inside of location: ", note)
    assert expected in note
    assert ("access = {" in note) == expected.startswith("{")


def test_a_location_without_sessions_is_other_programs(folder: Path) -> None:
    location = (
        '<location path="a" Foo="x"><system.web><httpRuntime x="1"/><pages x="1"/><authorization/>'
        '<httpModules><add name="X"/></httpModules></system.web></location>'
    )
    text = f"<configuration>{location}</configuration>"
    assert load(folder, text) == Source("web.config")


def test_a_misspelt_location_is_noted(folder: Path) -> None:
    inside = '<system.web><sessionState mode="Off"/></system.web>'
    text = f'<configuration><location Path="a">{inside}</location></configuration>'
    source = load(folder, text)
    assert source.options == {}
    assert "location Path: there is no such attribute; did you mean path?" in source.notes[1]
    text = f"<configuration><Location>{inside}</Location></configuration>"
    assert "did you mean location?" in load(folder, text).notes[0]


# -- whatever comes ------------------------------------------------------------------------------

WHOLE = f"""<?xml version="1.0" encoding="utf-8"?>
<configuration>
 <appSettings file="own.config">
  <add key="grid" value="{SECRET}"/>
{CONCURRENT}
  <add key="aspnet:RequestQueueLimitPerSession" value="50"/>
 </appSettings>
 <connectionStrings>
  <add name="grid" connectionString="redis://:{SECRET}@h"/>
 </connectionStrings>
 <location path="checkout">
  <system.web><pages enableSessionState="ReadOnly"/></system.web>
 </location>
 <system.web>
  <httpRuntime executionTimeout="110"/>
  <httpCookies requireSSL="true" domain="a.example" sameSite="Lax" httpOnlyCookies="true"/>
  <pages enableSessionState="ReadOnly"/>
  <sessionState mode="Custom" customProvider="Grid" timeout="20" cookieless="UseCookies"
    cookieName="sid" cookieSameSite="Strict" compressionEnabled="false"
    stateConnectionString="tcpip={SECRET}:1" regenerateExpiredSessionId="true">
   <providers>
    <clear/>
    <add name="Grid" type="A.B" connectionString="redis://:{SECRET}@h"
     clientCacheType="LRU" clientCacheCapacity="100" handleSessionEnd="true"
     namespace="shop" remoteStores="east,west" description="d" applicationName="a"/>
   </providers>
  </sessionState>
 </system.web>
 <system.webServer><modules>
{REMOVE}
{ADD}
 </modules></system.webServer>
</configuration>"""
PIECES = re.findall(r'<!--|\w[\w.:-]*|"[^"]*"|\s+|.', WHOLE)
PUT = [
    *(
        "StateServer",
        "InProc",
        "Off",
        '"true"',
        '"UseUri"',
        '"0"',
        '""',
        '"Unspecified"',
        "timeOut",
    ),
    *(
        "configSource",
        '"x.config"',
        "configProtectionProvider",
        "EncryptedData",
        "<clear/>",
        "é",
        "\0",
    ),
    *(
        "<!DOCTYPE x>",
        "&x;",
        "&#10;",
        "connectionStringElement",
        '"grid"',
        "remove",
        "Custom",
        "path",
    ),
    *("location", "sessionState", "system.web", "add", "<a>", "</a>", "<!--", "-->", "<![CDATA["),
]


def outcome(folder: Path, data: bytes) -> tuple[str, Source | None]:
    """What is shown to anybody, and what was read."""
    try:
        source = load(folder, data)
    except SettingsError as error:
        return str(error), None
    places = [
        given.place
        for table in (source.options, source.app_settings, source.connection_strings)
        for given in table.values()
    ]
    return "\n".join([*source.notes, *places]), source


def is_where_secrets_are(data: bytes) -> bool:
    """The secret stands where it was planted, and is no name of a thing."""
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        return True
    return not any(
        SECRET in f"{element.tag} {name}" or (name in ("key", "name", "path") and SECRET in value)
        for element in root.iter()
        for name, value in element.attrib.items()
    )


def test_the_whole_file_is_read_and_shows_no_secret(folder: Path) -> None:
    shown, source = outcome(folder, WHOLE.encode())
    assert SECRET not in shown
    assert source is not None
    assert len(source.options) == 17
    assert len(source.notes) == 6
    assert source.options["connection_string"].value == f"redis://:{SECRET}@h"


@pytest.mark.parametrize(
    "attribute", [name for name in re.findall(r'(\w+)="', WHOLE) if name != "version"]
)
def test_a_secret_as_any_value_is_not_shown(folder: Path, attribute: str) -> None:
    if attribute in ("name", "customProvider", "path", "key", "encoding"):
        return  # names are shown, or are no settings
    shown, _ = outcome(
        folder, re.sub(f'{attribute}="[^"]*"', f'{attribute}="{SECRET}"', WHOLE).encode()
    )
    assert SECRET not in shown


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(folder: Path, data: bytes) -> None:
    outcome(folder, data)
    outcome(folder, b"<configuration>" + data + b"</configuration>")


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(PIECES)),
            st.integers(0, 4),
            st.sampled_from([*PUT, *sorted(set(PIECES))]) | st.just(""),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["utf-8", "utf-16"]),
)
@example([(0, 0, "\ufeff")], "utf-8")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_mutation_is_read_or_refused_and_shows_no_secret(
    folder: Path, changes: list[tuple[int, int, str]], encoding: str
) -> None:
    pieces = [*PIECES]
    for at, count, put in changes:
        pieces[at : at + count] = [put]
    data = "".join(pieces).encode(encoding)
    shown, _ = outcome(folder, data)
    assert SECRET not in shown or not is_where_secrets_are(data)


TAGS = sorted(set(re.findall(r"<([\w.]+)", WHOLE)))
NAMES = sorted(
    {*re.findall(r'([\w.]+)="', WHOLE), "Mode", "x", "configSource", "file", "xdt:Transform"}
)
VALUES = st.sampled_from(
    [*re.findall(r'="([^"]*)"', WHOLE), "", "true", "false", "Off", "."]
) | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), max_size=5)


@st.composite
def elements(draw: st.DrawFn, depth: int = 3) -> str:
    tag = draw(st.sampled_from(TAGS))
    attributes = draw(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5))
    escaped = "".join(f" {name}={quoteattr(value)}" for name, value in attributes.items())
    inside = "".join(draw(st.lists(elements(depth - 1), max_size=3))) if depth else ""
    return f"<{tag}{escaped}>{inside}</{tag}>"


@given(elements())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_tree_of_known_names_is_read_or_refused(folder: Path, text: str) -> None:
    for document in (text, f"<configuration xmlns:xdt='x'>{text}</configuration>"):
        shown, source = outcome(folder, document.encode())
        if source is not None:
            assert {f.name for f in fields(source)} >= {"options", "notes"}
            assert all("\n" not in note for note in source.notes)
        assert SECRET not in shown or not is_where_secrets_are(document.encode())
