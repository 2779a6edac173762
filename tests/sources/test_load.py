"""Where an option may be set, and which place wins; wrong ones are told with their place."""

from __future__ import annotations

import errno
import os
import string
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gridsession import SessionSettings, SettingsError
from gridsession.settings import KINDS
from gridsession.sources.files import read_files
from gridsession.sources.given import FrameworkSettings
from gridsession.sources.keys import EncryptionKey

SECRET = "hunter2-geheim"
KEY = bytes(range(32)).hex()  # to encrypt with
WEB_CONFIG = """\
<configuration>
  <appSettings><add key="Store" value="{app_setting}"/></appSettings>
  <connectionStrings><add name="Store" connectionString="{element}"/></connectionStrings>
  <system.web>
    <sessionState mode="Custom" customProvider="P" timeout="5" {more}>
      <add name="P" {provider}/>
    </sessionState>
  </system.web>
</configuration>
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def web_config(**parts: str) -> None:
    parts = dict.fromkeys(("app_setting", "element", "more", "provider"), "") | parts
    Path("web.config").write_text(WEB_CONFIG.format(**parts), encoding="utf-8")


def load(
    environ: Mapping[str, str] | None = None,
    path: str | None = None,
    framework: Mapping[str, object] | None = None,
    **arguments: Any,
) -> SessionSettings:
    return SessionSettings.load(
        path,
        environ or {},
        framework=None if framework is None else FrameworkSettings("app.config", framework),
        **arguments,
    )


def error_of(**given: Any) -> str:
    with pytest.raises(SettingsError) as raised:
        load(**given)
    return str(raised.value)


# -- which place wins -----------------------------------------------------------------------------


def toml() -> dict[str, Any]:
    Path("gridsession.toml").write_text("timeout = 400", encoding="utf-8")
    return {}


def pyproject() -> dict[str, Any]:
    Path("pyproject.toml").write_text("[tool.gridsession]\ntimeout = 500", encoding="utf-8")
    return {}


def a_web_config() -> dict[str, Any]:
    web_config()
    return {}


# The strongest first.
PLACES: list[tuple[Callable[[], dict[str, Any]], float, str]] = [
    (lambda: {"timeout": 100}, 100, "argument"),
    (lambda: {"framework": {"GRIDSESSION_TIMEOUT": 200}}, 200, "app.config['GRIDSESSION_TIMEOUT']"),
    (
        lambda: {"environ": {"GRIDSESSION_TIMEOUT": "300"}},
        300,
        "environment variable GRIDSESSION_TIMEOUT",
    ),
    (toml, 400, "gridsession.toml: timeout"),
    (pyproject, 500, "pyproject.toml: tool.gridsession.timeout"),
    (a_web_config, 300, "web.config, line 5: sessionState timeout"),
    (dict, 1200, "default"),
]


@pytest.mark.parametrize("strongest", range(len(PLACES)))
@pytest.mark.parametrize("weakest_only", [False, True])
def test_the_strongest_place_wins(strongest: int, weakest_only: bool) -> None:
    """With all weaker ones beside it, and with only the weakest."""
    weaker = PLACES[strongest + 1 :]
    chosen = [PLACES[strongest], *(weaker[-2:] if weakest_only else weaker)]
    arguments: dict[str, Any] = {}
    for give, _, _ in chosen:
        arguments |= give()
    loaded = load(**arguments)
    assert (loaded.timeout, loaded.origin("timeout")) == PLACES[strongest][1:]


def test_each_option_has_its_own_winner() -> None:
    Path("gridsession.toml").write_text("timeout = 60\nrolling = true\nmax_age = 5\n")
    web_config(more='cookieName="shop"')
    loaded = load({"GRIDSESSION_TIMEOUT": "90"}, max_age=None)
    assert (loaded.timeout, loaded.rolling, loaded.session_cookie) == (90, True, "shop")
    assert loaded.max_age is None
    assert [loaded.origin(name) for name in ("timeout", "rolling", "session_cookie", "path")] == [
        "environment variable GRIDSESSION_TIMEOUT",
        "gridsession.toml: rolling",
        "web.config, line 5: sessionState cookieName",
        "default",
    ]


def test_settings_made_from_arguments_say_so() -> None:
    made = SessionSettings(timeout=90)
    assert [made.origin(name) for name in ("timeout", "path")] == ["argument", "default"]


def test_a_file_that_is_named_is_the_only_one_read(folder: Path) -> None:
    toml()
    (folder / "conf").mkdir()
    other = folder / "conf" / "shop.toml"
    other.write_text("rolling = true")
    for loaded in (
        load(path=str(other)),
        SessionSettings.load(path=other, environ={}),
        load({"GRIDSESSION_CONFIG": str(other)}),
    ):
        assert (loaded.timeout, loaded.rolling) == (1200, True)
    assert load({"GRIDSESSION_CONFIG": "absent.toml"}, path=str(other)).rolling
    assert load({"GRIDSESSION_CONFIG": ""}).timeout == 400


def test_a_pyproject_beside_a_gridsession_toml_is_told_to_be_unused() -> None:
    toml()
    pyproject()
    (note,) = load().notes
    assert "pyproject.toml has settings too" in note


def test_a_pyproject_of_others_is_none_of_ours() -> None:
    Path("pyproject.toml").write_text("[tool.black]\nline-length = 100\n")
    assert load() == SessionSettings()
    assert load().notes == []


def test_the_cookie_s_path_can_be_given_as_a_mapping() -> None:
    assert load(options={"path": "/shop"}).path == "/shop"


# -- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("timeout", "90", 90.0),
        ("timeout", " 90.5 ", 90.5),
        ("timeout", ".5", 0.5),
        ("absolute_timeout", "none", None),
        ("max_age", "None", None),
        ("max_age", "-1", -1),
        ("https_only", "TRUE", True),
        ("https_only", "on", True),
        ("rolling", "0", False),
        ("rolling", "no", False),
        ("same_site", "Strict", "strict"),
        ("client_cache_type", "lru-maxmemory", "LRU-MaxMemory"),
        ("remote_stores", "berlin, tokyo", ("berlin", "tokyo")),
        ("client_cache_coherency_interval", "0", 0.0),
        ("if_grid_unavailable", "Read_Cached", "read_cached"),
        ("encryption_keys", KEY, (EncryptionKey(bytes(range(32))),)),
        ("encryption_keys", f"plain, {KEY}", ("plain", EncryptionKey(bytes(range(32))))),
        ("encryption_keys", "none", ()),
        ("remote_stores", "none", ()),
        ("access", "read_only wait_for_writer", "read_only wait_for_writer"),
        ("access", '{"/static/*": "none"}', {"/static/*": "none"}),
        ("request_queue_limit_per_session", "7", 7),
        ("session_cookie", "sid", "sid"),
        ("connection_string", "memory://", "memory://"),
        ("namespace", "none", None),
    ],
)
def test_text_of_the_environment_becomes_a_value(name: str, text: str, value: object) -> None:
    needed = {"GRIDSESSION_HTTPS_ONLY": "1"} if name != "https_only" else {}
    loaded = load(needed | {f"GRIDSESSION_{name.upper()}": text})
    assert getattr(loaded, name) == value
    assert type(getattr(loaded, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timeout", "20m"),
        ("timeout", "1e3"),
        ("timeout", "nan"),
        ("timeout", "0"),
        ("max_age", "5.0"),
        ("https_only", "y"),
        ("same_site", "laxe"),
        ("access", "{"),
        ("access", "[" * 100_000),
        ("access", '{"/x":' * 50_000),
        ("access", '{"/x": 5}'),
        ("remote_stores", "a,,b"),
        ("remote_stores", "a,a"),
        ("encryption_keys", f"{KEY},{KEY}"),
        ("client_cache_coherency_interval", "-1"),
        ("request_queue_limit_per_session", "9" * 5000),
        ("client_cache_capacity", "-1"),
    ],
)
def test_text_that_is_no_value_is_told_with_its_variable(name: str, text: str) -> None:
    variable = f"GRIDSESSION_{name.upper()}"
    error = error_of(environ={variable: text})
    assert error.startswith(name) or name in error
    assert f"(set by environment variable {variable})" in error
    assert len(error) < 400


def test_an_empty_variable_sets_nothing() -> None:
    assert load({"GRIDSESSION_TIMEOUT": "", "GRIDSESSION_CONNECTION_STRING": " "}) == load()


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"framework": {"GRIDSESSION_TIMEOUT": "300"}}, "app.config['GRIDSESSION_TIMEOUT']"),
        ({"framework": {"GRIDSESSION_HTTPS_ONLY": "yes"}}, "app.config['GRIDSESSION_HTTPS_ONLY']"),
        ({"path": "a.toml", "text": 'timeout = "90"'}, "a.toml: timeout"),
        ({"path": "a.toml", "text": "timeout = 2026-11-22"}, "a.toml: timeout"),
        ({"path": "a.toml", "text": "partitioned = true"}, "a.toml: partitioned"),
        ({"path": "a.toml", "text": '[access]\n"x" = "none"'}, "a.toml: access"),
        ({"path": "a.toml", "text": f'encryption_keys = ["{KEY}", ""]'}, "a.toml: encryption_keys"),
        ({"path": "a.toml", "text": 'connection_string = "memory://x"'}, "connection_string"),
        ({"path": "a.toml", "text": "regenerate_expired_session_id = false"}, "a.toml: regen"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_with_its_place(
    given: dict[str, Any], place: str
) -> None:
    if "text" in given:
        Path("a.toml").write_text(given.pop("text"))
    assert f"(set by {place}" in error_of(**given) or place == "connection_string"


@pytest.mark.parametrize(
    ("where", "origin"),
    [
        ({"path": "a.toml"}, "a.toml: encryption_keys"),
        (
            {"framework": {"GRIDSESSION_ENCRYPTION_KEYS": f"{KEY},plain"}},
            "app.config['GRIDSESSION_ENCRYPTION_KEYS']",
        ),
    ],
)
def test_encryption_keys_elsewhere(where: dict[str, Any], origin: str) -> None:
    Path("a.toml").write_text(f'encryption_keys = ["{KEY}", "plain"]')
    loaded = load(**where)
    assert loaded.encryption_keys == (EncryptionKey(bytes(range(32))), "plain")
    assert loaded.origin("encryption_keys") == origin


def test_what_cannot_heal_says_why() -> None:
    error = error_of(regenerate_expired_session_id=False)
    assert "never adopted" in error
    assert "leave it out" in error


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"timeuot": 5}, " (set by an argument)"),
        ({"framework": {"GRIDSESSION_TIMEUOT": 5}}, " (set by app.config['GRIDSESSION_TIMEUOT'])"),
        (
            {"environ": {"GRIDSESSION_TIMEUOT": "5"}},
            " (set by environment variable GRIDSESSION_TIMEUOT)",
        ),
        ({"path": "a.toml"}, " (set by a.toml: timeuot)"),
    ],
)
def test_a_name_that_is_nearly_an_option_is_told_its_neighbour(
    given: dict[str, Any], place: str
) -> None:
    Path("a.toml").write_text("timeuot = 5")
    assert error_of(**given) == f"there is no option 'timeuot'; did you mean 'timeout'?{place}"


def test_a_name_of_somebody_else_is_an_error_in_our_own_places_and_a_note_elsewhere() -> None:
    Path("a.toml").write_text("zzz = 5")
    assert "there is no option 'zzz'; there are: connection_string, " in error_of(path="a.toml")
    assert "there is no option 'zzz'; there are:" in error_of(zzz=5)
    kubernetes = {
        "GRIDSESSION_PORT": "tcp://10.0.0.1:80",
        "GRIDSESSION_SERVICE_HOST": "10.0.0.1",
        "GRIDSESSION_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    loaded = load(kubernetes, framework={"GRIDSESSION_ZZZ": 1, "SECRET_KEY": SECRET})
    assert [note.partition(" is none")[0] for note in loaded.notes] == [
        "app.config['GRIDSESSION_ZZZ']",
        *(f"environment variable {name}" for name in kubernetes),
    ]
    assert "10.0.0.1" not in str(loaded.notes)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("session_timeout", "timeout"),
        ("cookie_path", "path"),
        ("default_lock_wait_timeout", "lock_wait_timeout"),
        ("max_payload", "max_payload_bytes"),
    ],
)
def test_a_name_that_may_be_somebody_elses_is_noted_with_what_may_be_meant(
    name: str, meant: str
) -> None:
    variable = f"GRIDSESSION_{name.upper()}"
    notes = [*load({variable: SECRET}).notes, *load(framework={variable: SECRET}).notes]
    assert notes == [
        f"environment variable {variable} is none of our options, and is not heeded; "
        f"did you mean {meant!r}?",
        f"app.config[{variable!r}] is none of our options, and is not heeded; "
        f"did you mean {meant!r}?",
    ]
    assert f"did you mean {meant!r}" in error_of(options={name: 5})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("time_out", "timeout"),
        ("maxage", "max_age"),
        ("connection_strings", "connection_string"),
        ("htps_only", "https_only"),
        ("session_cookies", "session_cookie"),
    ],
)
def test_a_slip_is_an_error_wherever_it_stands(name: str, meant: str) -> None:
    variable = f"GRIDSESSION_{name.upper()}"
    for place in ({"environ": {variable: SECRET}}, {"framework": {variable: SECRET}}):
        error = error_of(**place)
        assert error.startswith(f"there is no option {name!r}; did you mean {meant!r}?")
        assert SECRET not in error


@pytest.mark.parametrize(
    "name",
    [
        *("PORT", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_80_TCP_ADDR"),
        *("PATH_PORT", "MAX_AGE_SERVICE_HOST", "PATHS_SERVICE_PORT", "TIMEOUT_PORT_80_TCP"),
    ],
)
def test_what_kubernetes_sets_for_a_service_is_no_slip(name: str) -> None:
    (note,) = load({f"GRIDSESSION_{name}": "tcp://10.0.0.1:80"}).notes
    assert note.endswith(f"GRIDSESSION_{name} is none of our options, and is not heeded")


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timeout", "1800"),
        ("rolling", "true"),
        ("namespace", "shop"),
        ("connection_string", SECRET),
    ],
)
def test_a_quoted_value_is_told_to_lose_its_quotes(quote: str, name: str, text: str) -> None:
    error = error_of(environ={f"GRIDSESSION_{name.upper()}": quote + text + quote})
    assert error.startswith(f"{name} cannot be used: it stands in quotation marks")
    assert f"remove the quotes (set by environment variable GRIDSESSION_{name.upper()})" in error
    assert text not in error


@pytest.mark.parametrize("text", ["{", '{"/x": "none",}', "{'/x': 'none'}", SECRET.join("{}")])
def test_rules_that_are_no_json_are_told_as_such(text: str) -> None:
    error = error_of(environ={"GRIDSESSION_ACCESS": text})
    assert "this is no JSON object (set by environment variable GRIDSESSION_ACCESS)" in error
    assert SECRET not in error


def test_rules_as_json_are_for_the_environment_only() -> None:
    Path("a.toml").write_text('access = \'{"/x": "none"}\'')
    for place in ({"access": '{"/x": "none"}'}, {"path": "a.toml"}):
        assert "it must be a mapping; only the environment has rules as JSON" in error_of(**place)


def test_a_link_in_a_circle_is_an_error() -> None:
    os.symlink("gridsession.toml", "gridsession.toml")
    assert error_of() == "gridsession.toml cannot be read: Too many levels of symbolic links"
    os.unlink("gridsession.toml")
    os.symlink("absent.toml", "gridsession.toml")
    assert load().notes == []


@pytest.mark.parametrize(
    "given", [{"timeout": "soon"}, {"zzz": 1}, {"connection_string_element": "x"}]
)
def test_a_wrong_argument_is_told_to_be_one(given: dict[str, Any]) -> None:
    assert error_of(**given).endswith(" (set by an argument)")


@pytest.mark.parametrize("table", ["app_settings", "connection_strings"])
def test_a_table_of_named_values_must_be_one(table: str) -> None:
    Path("a.toml").write_text(f"{table} = 5")
    assert error_of(path="a.toml") == f"a.toml: {table} must be a table"


# -- where the connection string is -------------------------------------------------------------

APP_SETTING = {"connection_string_app_setting": "Store"}
ELEMENT = {"connection_string_element": "Store"}
VARIABLE = {"connection_string_environment_variable": "STORE"}


@pytest.mark.parametrize(
    ("given", "found", "origin"),
    [
        (
            VARIABLE | {"environ": {"STORE": "embedded:///a"}},
            "embedded:///a",
            "environment variable STORE, named by connection_string_environment_variable",
        ),
        (APP_SETTING, "embedded:///app_settings", "gridsession.toml: app_settings.Store, named by"),
        (ELEMENT, "embedded:///strings", "gridsession.toml: connection_strings.Store, named by"),
        (
            APP_SETTING | {"framework": {"Store": "embedded:///f"}},
            "embedded:///f",
            "app.config['Store'], named by connection_string_app_setting",
        ),
        (
            ELEMENT | {"framework": {"Store": "embedded:///f"}},
            "embedded:///f",
            "app.config['Store'], named by connection_string_element",
        ),
        (
            {"environ": {"GRIDSESSION_CONNECTION_STRING_APP_SETTING": "Store"}},
            "embedded:///app_settings",
            "named by connection_string_app_setting "
            "(environment variable GRIDSESSION_CONNECTION_STRING_APP_SETTING)",
        ),
    ],
)
def test_a_connection_string_is_found_where_it_is_said_to_be(
    given: dict[str, Any], found: str, origin: str
) -> None:
    Path("gridsession.toml").write_text(
        '[app_settings]\nStore = "embedded:///app_settings"\n'
        '[connection_strings]\nStore = "embedded:///strings"\n'
    )
    loaded = load(**given)
    assert loaded.connection_string == found
    assert origin in loaded.origin("connection_string")


@pytest.mark.parametrize(
    ("given", "found"),
    [(APP_SETTING, "embedded:///web-app"), (ELEMENT, "embedded:///web-strings")],
)
def test_a_connection_string_is_found_in_a_web_config(given: dict[str, Any], found: str) -> None:
    web_config(app_setting="embedded:///web-app", element="embedded:///web-strings")
    assert load(**given).connection_string == found


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ('connectionStringAppSetting="Store"', "embedded:///web-app"),
        ('connectionStringElement="Store"', "embedded:///web-strings"),
        ('connectionStringEnvironmentVariable="STORE"', "embedded:///environment"),
        ('connectionString="embedded:///itself"', "embedded:///itself"),
    ],
)
def test_a_web_config_names_the_place_itself(named: str, found: str) -> None:
    web_config(app_setting="embedded:///web-app", element="embedded:///web-strings", provider=named)
    assert load({"STORE": "embedded:///environment"}).connection_string == found


LOCATIONS = ["connection_string", *APP_SETTING, *ELEMENT, *VARIABLE]


@pytest.mark.parametrize("one", LOCATIONS)
@pytest.mark.parametrize("other", LOCATIONS)
def test_two_places_are_an_error_that_names_both(one: str, other: str) -> None:
    if one == other:
        return
    error = error_of(**{one: "memory://", other: f"embedded:///{SECRET}"})
    assert one in error
    assert other in error
    assert SECRET not in error
    Path("gridsession.toml").write_text(f'{one} = "memory://"\n{other} = "embedded:///{SECRET}"')
    error = error_of()
    assert f"gridsession.toml: {one}" in error
    assert f"gridsession.toml: {other}" in error
    assert SECRET not in error


def test_a_stronger_place_overrules_a_weaker_one() -> None:
    Path("gridsession.toml").write_text('connection_string_app_setting = "Store"')
    assert load({"GRIDSESSION_CONNECTION_STRING": "memory://"}).connection_string == "memory://"


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (VARIABLE, "connection_string_environment_variable='STORE' names nothing that is there"),
        (VARIABLE | {"environ": {"STORE": ""}}, "looked in the environment"),
        (APP_SETTING, "looked in no file, for there is none"),
        (APP_SETTING | {"framework": {"store": "x"}}, "looked in app.config"),
        (ELEMENT | {"framework": {"Store": 5}}, "app.config['Store'], named by "),
        ({"connection_string_element": 5}, "connection_string_element=5 cannot be used"),
        ({"connection_string_element": ""}, "connection_string_element='' cannot be used"),
        (
            {"connection_string_environment_variable": f"redis://:{SECRET}@host"},
            "connection_string_environment_variable=<str of ",
        ),
    ],
)
def test_a_place_that_is_not_there_is_named(given: dict[str, Any], cause: str) -> None:
    error = error_of(**given)
    assert cause in error
    assert SECRET not in error


def test_what_is_found_elsewhere_is_checked_as_if_given_directly() -> None:
    wrong = "embedded:///x?max_size=1"
    direct = error_of(connection_string=wrong)
    found = error_of(**VARIABLE, environ={"STORE": wrong})
    assert found.startswith(direct.partition(" (set by")[0])
    assert "environment variable STORE" in found


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.toml", None, "a.toml cannot be read: No such file or directory"),
        ("a.toml", b"timeout =", "a.toml is no TOML: at "),
        ("a.toml", b'x = "' + SECRET.encode(), "a.toml is no TOML"),
        ("a.toml", b"\xff\xfe", "a.toml is not UTF-8, at byte 0"),
        ("a.toml", b"x = " + b"[" * 100_000, "a.toml "),
        ("a.toml", b"#" * ((1 << 20) + 1), "a.toml is larger than 1 MiB"),
        ("a.ini", b"", "a.ini cannot be used: a file of settings is a TOML file"),
        ("pyproject.toml", b"[tool]", "pyproject.toml has no table [tool.gridsession]"),
        ("pyproject.toml", b"tool.gridsession = 5", "pyproject.toml: tool.gridsession must be"),
        ("web.config", b"<!DOCTYPE a>", "web.config"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    name: str, content: bytes | None, cause: str, folder: Path
) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    for path in (name, str(folder / name), os.path.join("..", folder.name, name)):
        shown = cause.replace(name, path)
        error = error_of(path=path)
        assert error.startswith(shown)
        assert SECRET not in error
        with pytest.raises(SettingsError) as raised:
            read_files(None, {"GRIDSESSION_CONFIG": path})
        assert str(raised.value).startswith(shown)
        assert str(raised.value).endswith(" (named by environment variable GRIDSESSION_CONFIG)")


def test_a_folder_is_no_file() -> None:
    Path("a.toml").mkdir()
    assert error_of(path="a.toml") == "a.toml cannot be read: Is a directory"
    assert error_of(path="a\0.toml") == "a�.toml cannot be read: no usable file name"


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("shop.toml", "timeout = 90", "shop.toml: timeout"),
        ("shop.config", '<sessionState timeout="2"/>', "shop.config, line 1: sessionState timeout"),
    ],
)
def test_a_file_that_is_named_is_shown_as_it_was_given(
    folder: Path, name: str, text: str, place: str
) -> None:
    (folder / "conf").mkdir()
    (folder / "conf" / name).write_text(text)
    for path in (f"conf/{name}", str(folder / "conf" / name)):
        given = path.removesuffix(name)
        assert load(path=path).origin("timeout") == given + place
        assert load({"GRIDSESSION_CONFIG": path}).origin("timeout") == given + place
        (source,) = read_files(None, {"GRIDSESSION_CONFIG": path})
        assert (source.name, source.file) == (path, str(folder / "conf" / name))


@pytest.mark.parametrize(
    "path",
    [f"redis://:{SECRET}@h", f"redis://:{SECRET}@h.toml", f"bootstrapGateways=h;pw={SECRET}"],
)
def test_a_connection_string_in_place_of_a_file_is_not_shown(path: str) -> None:
    error = error_of(environ={"GRIDSESSION_CONFIG": path})
    assert SECRET not in error
    assert error.startswith("a file of settings cannot be ")


def test_a_quoted_file_name_is_told_as_such() -> None:
    toml()
    assert "remove them" in error_of(environ={"GRIDSESSION_CONFIG": '"gridsession.toml"'})


def test_a_table_for_pyproject_toml_is_told_to_be_left_out_elsewhere() -> None:
    Path("gridsession.toml").write_text("[tool.gridsession]\ntimeout = 90")
    error = error_of()
    assert error.startswith("gridsession.toml: [tool.gridsession] is for pyproject.toml; leave")


# -- files in the working directory -------------------------------------------------------------


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Root, as whom tests may run, reads everything."""
    opened = Path.open

    def refuse(path: Path, *of: Any, **more: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *of, **more)

    monkeypatch.setattr(Path, "open", refuse)


@pytest.mark.parametrize("with_own", [False, True])
def test_an_unreadable_pyproject_of_others_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, with_own: bool
) -> None:
    if with_own:
        toml()
    pyproject()
    refuse_to_open(monkeypatch, "pyproject.toml")
    loaded = load()
    assert loaded.timeout == (400 if with_own else 1200)
    assert loaded.notes == [
        "pyproject.toml cannot be read, so its [tool.gridsession], if it has one, is not heeded"
    ]


@pytest.mark.parametrize(
    "data", [b"[tool.black", b"\xff\xfe[\0", b"x = " + b"[" * 100_000, b"#" * ((1 << 20) + 1)]
)
def test_a_broken_pyproject_of_others_stops_nothing(data: bytes) -> None:
    Path("pyproject.toml").write_bytes(data)
    (note,) = load().notes
    assert note.startswith("pyproject.toml is no TOML that can be read, so its [tool.gridsession]")
    error_of(path="pyproject.toml")  # it was named


@pytest.mark.parametrize(
    "data", [b"[tool.gridsession", b"tool.gridsession = 5", b"#gridsession\n["]
)
def test_a_broken_pyproject_that_may_be_ours_is_an_error(data: bytes) -> None:
    Path("pyproject.toml").write_bytes(data)
    assert error_of().startswith("pyproject.toml")


@pytest.mark.parametrize("name", ["gridsession.toml", "web.config"])
def test_our_own_files_that_cannot_be_read_are_errors(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Path(name).write_text("")
    refuse_to_open(monkeypatch, name)
    assert error_of() == f"{name} cannot be read: Permission denied"


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes what begins with a path be out of reach, as a folder without x does."""

    def hide(place: str) -> None:
        stat, lstat = os.stat, os.lstat

        def refuse(real: Callable[..., Any], path: Any, *of: Any, **more: Any) -> Any:
            if str(path).startswith(place) and not os.path.isabs(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return real(path, *of, **more)

        monkeypatch.setattr(os, "stat", lambda *of, **more: refuse(stat, *of, **more))
        if not place:  # otherwise only what a link leads to is hidden
            monkeypatch.setattr(os, "lstat", lambda *of, **more: refuse(lstat, *of, **more))

    return hide


def test_a_working_directory_that_cannot_be_searched_stops_nothing(
    hidden: Callable[[str], None],
) -> None:
    for write in (toml, pyproject, a_web_config):
        write()
    hidden("")
    loaded = load()
    assert loaded.timeout == 1200
    (note,) = loaded.notes
    assert note.startswith("the working directory cannot be searched")
    assert "GRIDSESSION_CONFIG" in note


def test_a_working_directory_that_cannot_be_listed_is_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    a_web_config()
    monkeypatch.setattr(os, "listdir", refuse)
    assert load().timeout == 300


def test_a_link_to_where_nobody_may_look_is_an_error(
    hidden: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    toml()
    hidden("gridsession.toml")
    refuse_to_open(monkeypatch, "gridsession.toml")
    assert error_of() == "gridsession.toml cannot be read: Permission denied"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_process_that_may_not_search_its_directory_starts(folder: Path) -> None:
    toml()
    folder.chmod(0o700)
    code = (
        "import os, encodings.idna\n"
        "from gridsession import SessionSettings\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "loaded = SessionSettings.load(None, {})\n"
        "print(loaded.timeout, 'cannot be searched' in str(loaded.notes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.stdout == "1200.0 True\n", done.stderr


@pytest.mark.parametrize("name", ["web.config", "Web.config", "Web.Config", "WEB.CONFIG"])
def test_a_web_config_is_found_in_any_case(name: str) -> None:
    a_web_config()
    Path("web.config").rename(name)
    assert load().origin("timeout").startswith(f"{name}, line 5")


def test_the_usual_spelling_of_web_config_comes_first() -> None:
    for name, minutes in (("WEB.CONFIG", 1), ("Web.config", 2), ("web.config", 3)):
        Path(name).write_text(f'<sessionState timeout="{minutes}"/>')
        assert load().timeout == minutes * 60


def test_the_files_that_are_heeded_are_known(folder: Path) -> None:
    assert read_files(None, {}) == read_files(None, {"GRIDSESSION_CONFIG": " "}) == []
    for write in (toml, pyproject, a_web_config):
        write()
    assert [source.file for source in read_files(None, {"GRIDSESSION_CONFIG": ""})] == [
        str(folder / "gridsession.toml"),
        str(folder / "web.config"),
    ]
    (named,) = read_files("web.config", {"GRIDSESSION_CONFIG": "absent.toml"})
    assert named.file == str(folder / "web.config")


@pytest.mark.parametrize("write", [toml, pyproject, a_web_config])
def test_a_file_of_somebody_else_in_the_working_directory_is_noted(
    write: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    (name,) = os.listdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if os.getuid() == 0:
        assert "belongs" not in str(load().notes)  # root's
        os.chown(name, 12345, 12345)
    assert f"{name}, found in the working directory, belongs neither to root" in str(load().notes)
    assert "belongs" not in str(load(path=name).notes)  # whoever named it has looked
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(name).st_uid)
    assert "belongs" not in str(load().notes)


def test_a_byte_order_mark_is_no_content() -> None:
    Path("gridsession.toml").write_bytes(b"\xef\xbb\xbftimeout = 90")
    assert load().timeout == 90


# -- any input ------------------------------------------------------------------------------------

HARD = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAMES = st.sampled_from([*KINDS, *LOCATIONS]) | st.text(string.ascii_lowercase + "_", max_size=20)
TEXTS = st.builds(
    lambda before, secret, after: before + secret + after,
    st.text(max_size=20) | st.sampled_from(["redis://:", "{", '{"/x": "', "-", "embedded:///"]),
    st.sampled_from(["", SECRET]),
    st.text(max_size=20) | st.sampled_from(["@host", '"}', "5"]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def check(load_it: Callable[[], SessionSettings]) -> None:
    """Settings come of it, or an error in our words that keeps the secret."""
    try:
        loaded = load_it()
    except SettingsError as error:
        said = [str(error)]
    else:
        said = [*loaded.notes, *map(loaded.origin, KINDS)]
    assert SECRET not in str(said)


@HARD
@given(st.dictionaries(NAMES, TEXTS, max_size=4))
@example({"connection_string_environment_variable": "redis://:" + SECRET})
def test_any_environment(values: dict[str, str]) -> None:
    check(lambda: load({f"GRIDSESSION_{name.upper()}": text for name, text in values.items()}))


@HARD
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_arguments(values: dict[str, Any]) -> None:
    check(lambda: SessionSettings.load(None, {}, options=values))


@HARD
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_settings_of_a_framework(values: dict[str, Any]) -> None:
    check(lambda: load(framework={f"GRIDSESSION_{k.upper()}": v for k, v in values.items()}))


@HARD
@given(
    st.binary(max_size=60)
    | st.builds(
        lambda lines, cut: "\n".join(lines).encode()[: cut or None],
        st.lists(
            st.builds(
                "{} = {}".format,
                NAMES,
                st.sampled_from(
                    [
                        *("5", "true", "1.5", "nan", "inf", "2026-11-22", "[1]", "{a = 1}"),
                        *(f'"{SECRET}"', f'"redis://:{SECRET}@host"', f'["{SECRET}"]', '"'),
                    ]
                ),
            ),
            max_size=4,
        ),
        st.integers(-9, 0),
    )
)
def test_any_toml(data: bytes) -> None:
    Path("gridsession.toml").write_bytes(data)
    check(load)


@HARD
@given(
    st.sampled_from(["more", "provider", "app_setting", "element"]),
    st.text(max_size=30) | st.builds("{}={!r}".format, NAMES, TEXTS),
    st.integers(0, 500),
    st.binary(max_size=3),
)
def test_any_web_config(part: str, text: str, cut: int, bytes_there: bytes) -> None:
    web_config(**{part: text})
    data = Path("web.config").read_bytes()
    Path("web.config").write_bytes(data[:cut] + bytes_there + data[cut:])
    check(load)


# -- what an operator is told ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"timeout": 20}, "timeout=20 means seconds, where ASP.NET counts minutes; if minutes are"),
        ({"connection_string": "redis://host", "timeout": 60}, "namespace is not set"),
        ({"handle_session_end": True}, "handle_session_end is set and does not act yet"),
        ({"remote_stores": "a"}, "remote_stores is set and does not act yet"),
        (
            {"if_grid_unavailable": "read_cached", "client_cache_capacity": 0},
            "if_grid_unavailable='read_cached' has no effect with client_cache_capacity=0",
        ),
        (
            {"client_cache_coherency_interval": 2, "client_cache_capacity": 0},
            "client_cache_coherency_interval=2.0 has no effect with client_cache_capacity=0",
        ),
    ],
)
def test_what_does_not_act_is_told(given: dict[str, Any], told: str) -> None:
    (note,) = load(**given).notes
    assert told in note


def test_nothing_is_told_of_what_is_right() -> None:
    assert load(timeout=60, remote_stores=[], client_cache_capacity=100).notes == []
    assert load(connection_string="redis://host", namespace="shop").notes == []
    acting: dict[str, Any] = {
        "client_cache_type": "Random",
        "client_cache_capacity": 5,
        "client_cache_coherency_interval": 2,
        "compression_enabled": True,
        "encryption_keys": KEY,
        "allow_concurrent_requests_per_session": True,
        "if_grid_unavailable": "read_cached",
    }
    assert load(options=acting).notes == []
    assert load(client_cache_capacity=0).notes == []


def test_the_process_s_own_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "GRIDSESSION_TIMEOUT", "77")
    assert SessionSettings.load().timeout == 77
    assert SessionSettings().timeout == 1200  # which looks nowhere
