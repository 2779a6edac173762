"""Every option refuses what cannot work, by name, with what would; nothing shows a password."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import time
from datetime import timedelta
from typing import Any

import pytest

from gridsession import Access, SessionProvider, SessionSettings, SettingsError
from gridsession.access import AccessRules, Use
from gridsession.settings import KINDS, MAX_TIMEOUT
from gridsession.sources.connection_string import redacted
from gridsession.sources.keys import EncryptionKey, new_key, summary


def settings_of(options: dict[str, Any]) -> SessionSettings:
    return SessionSettings.load(None, {}, **options)


# -- values that cannot be used -----------------------------------------------------------------

SECONDS = (
    "timeout",
    "absolute_timeout",
    "lock_wait_timeout",
    "execution_timeout",
    "grid_timeout",
    "sweep_interval",
)
HIGHEST = {
    "timeout": MAX_TIMEOUT,
    "absolute_timeout": MAX_TIMEOUT,
    "lock_wait_timeout": 3600.0,
    "execution_timeout": 86_400.0,
    "grid_timeout": 60.0,
    "sweep_interval": 3600.0,
}
KEY, OTHER_KEY = (hashlib.sha256(name).digest() for name in (b"one", b"other"))
TEXT, OTHER_TEXT = (base64.b64encode(key).decode() for key in (KEY, OTHER_KEY))
BAD_KEYS: list[tuple[Any, str]] = [
    (None, "keys of 32 random bytes in base64 or hex"),
    (KEY, "a list of str, or one str with commas"),
    ({TEXT: 1}, "a list of str, or one str with commas"),
    ([KEY], "item 1 of 1 is of type bytes, not str"),
    (f"{TEXT}, ,{OTHER_TEXT}", "item 2 of 3 is empty"),
    ([TEXT, OTHER_TEXT, TEXT], "item 3 of 3 is item 1 again"),
    ([TEXT, KEY.hex()], "item 2 of 2 is item 1 again"),
    (["plain", TEXT, "plain"], "item 3 of 3 is item 1 again"),
    ("plain", "plain alone is no key"),
    (TEXT[:42], "item 1 of 1 is none: it has 42 characters, base64 of a key 43 or 44"),
    (f"{TEXT}=", "item 1 of 1 is none: it has 45 characters"),
    ([TEXT, KEY.hex()[:63]], "item 2 of 2 is none: it has 63 characters"),
    (f"{TEXT[:10]} {TEXT[10:]}", "item 1 of 1 is none"),
    (TEXT[:42] + chr(ord(TEXT[42]) + 1), "item 1 of 1 has a wrong last character"),
    ("A" * 43, "item 1 of 1 is not random"),
    ([OTHER_TEXT, "0123456789abcdef" * 4], "item 2 of 2 is not random"),
]
BAD: list[tuple[str, Any, str]] = [
    *((name, bad, "a number of seconds or a timedelta") for name in SECONDS for bad in ("5", True)),
    *((name, None, "a number of seconds") for name in SECONDS if name != "absolute_timeout"),
    *(
        (name, bad, f"more than 0 and at most {HIGHEST[name]:.15g} seconds")
        for name in SECONDS
        for bad in (0, -1.5, float("nan"), float("inf"), HIGHEST[name] * 1.01, 10**400)
    ),
    *((name, timedelta(0), "more than 0") for name in SECONDS),
    *(("lock_lease", bad, "more than 0.03 and at most 3600 seconds") for bad in (0, 0.03, 3601)),
    ("connection_string", None, "a str"),
    ("connection_string", b"memory:", "a str"),
    ("namespace", 5, "a str, or None"),
    ("namespace", "", "not empty"),
    ("access", None, "a str or a mapping"),
    ("access", ["/x"], "a str or a mapping"),
    (
        *("access", "exclusiv"),
        "use one of: exclusive, concurrent, read_only, read_only wait_for_writer, none",
    ),
    ("access", "", "use one of: exclusive"),
    ("access", "read_only soon", "use one of: exclusive"),
    ("access", "exclusive wait_for_writer", "goes with read_only only"),
    ("access", {"/x": "sometimes"}, "use one of: exclusive"),
    ("access", {"/x": None}, "use one of: exclusive"),
    ("access", {"x": "none"}, "write '/path/*' or 'GET /path/*'"),
    ("access", {"GET  /x": "none"}, "write '/path/*'"),
    ("access", {"G3T /x": "none"}, "write '/path/*'"),
    ("access", {"": "none"}, "write '/path/*'"),
    ("access", {5: "none"}, "write '/path/*'"),
    ("session_cookie", 5, "a str, or None"),
    ("session_cookie", "", "not empty"),
    ("session_cookie", "my session", "letters, digits and"),
    ("session_cookie", "a=b", "letters, digits and"),
    ("session_cookie", "a;b", "letters, digits and"),
    ("session_cookie", "sitzung\n", "letters, digits and"),
    ("session_cookie", "séance", "letters, digits and"),
    ("session_cookie", "__Host-id", "unless https_only is on"),
    ("session_cookie", "__Secure-id", "without https_only"),
    ("max_age", 1.5, "a whole number of seconds, or None"),
    ("max_age", True, "a whole number of seconds, or None"),
    ("max_age", "60", "a whole number of seconds, or None"),
    ("path", None, "a str"),
    ("path", "shop", "begins with '/'"),
    ("path", "", "not empty"),
    ("path", "/a; Domain=evil", "without ';'"),
    ("path", "/a\r\nSet-Cookie: x=y", "without ';'"),
    ("domain", 5, "a str, or None"),
    *(
        ("domain", bad, "a host's name alone")
        for bad in (
            *("a.b; Path=/", "exämple.com", "https://shop.example", "localhost:8000", "a.b/shop"),
            *('"shop.example"', "a..b", "."),
        )
    ),
    *(("path", bad, "a path that begins with '/'") for bad in ("/a?b", "/a#b", '"/a"', '/a"')),
    ("namespace", "\ud800", "text without lone surrogates"),
    ("access", {"GTE /x": "none"}, "methods: GET, HEAD,"),
    ("same_site", "Lax", "one of 'lax', 'strict', 'none'"),
    ("same_site", None, "one of 'lax'"),
    ("same_site", "none", "unless https_only is on"),
    ("https_only", "yes", "True or False"),
    ("https_only", 1, "True or False"),
    ("partitioned", None, "True or False"),
    ("partitioned", True, "unless https_only is on"),
    ("rolling", 0, "True or False"),
    ("request_queue_limit_per_session", 0, "at least 1"),
    ("request_queue_limit_per_session", 2.0, "a whole number"),
    ("request_queue_limit_per_session", True, "a whole number"),
    ("max_payload_bytes", 63, "at least 64"),
    ("max_payload_bytes", "1MiB", "a whole number of bytes"),
    ("if_unreachable_at_start", "wait", "one of 'serve', 'fail'"),
    ("if_unreachable_at_start", None, "one of 'serve', 'fail'"),
    ("regenerate_expired_session_id", 1, "True or False"),
    ("regenerate_expired_session_id", False, "never adopted"),
    ("handle_session_end", None, "True or False"),
    ("allow_concurrent_requests_per_session", "yes", "True or False"),
    ("compression_enabled", 1.0, "True or False"),
    ("client_cache_type", "lru", "one of 'LRU', 'Random', 'LRU-MaxMemory', 'Random-MaxMemory'"),
    ("client_cache_capacity", -1, "a whole number, at least 0"),
    ("client_cache_capacity", 1.5, "a whole number"),
    *(
        ("client_cache_coherency_interval", bad, "at least 0 and at most 86400 seconds")
        for bad in (-0.001, 86_400.1, float("nan"))
    ),
    ("client_cache_coherency_interval", None, "a number of seconds or a timedelta"),
    ("if_grid_unavailable", "read_only", "one of 'fail', 'read_cached'"),
    ("if_grid_unavailable", None, "one of 'fail', 'read_cached'"),
    *(("encryption_keys", bad, allowed) for bad, allowed in BAD_KEYS),
    ("remote_stores", None, "names, each once"),
    ("remote_stores", ["berlin", ""], "names, each once"),
    ("remote_stores", ["berlin", 5], "names, each once"),
    ("remote_stores", "berlin,berlin", "names, each once"),
    ("remote_stores", b"berlin", "names, each once"),
]


@pytest.mark.parametrize(("name", "bad", "allowed"), BAD)
def test_a_bad_value_is_refused_by_name_and_with_what_is_allowed(
    name: str, bad: Any, allowed: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        SessionSettings.load(None, {}, options={name: bad})
    text = str(raised.value)
    assert name in text
    assert allowed in text
    assert isinstance(raised.value, ValueError)


def test_every_option_has_a_bad_value_here() -> None:
    assert {name for name, _, _ in BAD} == set(KINDS)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timout", "timeout"),
        ("conection_string", "connection_string"),
        ("samesite", "same_site"),
        ("cookie", "session_cookie"),
        ("httpsonly", "https_only"),
        ("request_queue_limit", "request_queue_limit_per_session"),
    ],
)
def test_an_unknown_option_is_told_its_neighbour(name: str, near: str) -> None:
    with pytest.raises(SettingsError, match=f"no option '{name}'; did you mean '{near}'"):
        SessionSettings.load(None, {}, options={name: "redis://:hunter2@host"})


def test_an_option_far_from_all_is_shown_them_all() -> None:
    with pytest.raises(SettingsError, match="no option 'zzz'; there are:") as raised:
        SessionSettings.load(None, {}, zzz=1)
    for option in KINDS:
        assert option in str(raised.value)


# -- values that can ----------------------------------------------------------------------------


def test_times_are_seconds_or_timedelta() -> None:
    settings = SessionSettings(
        timeout=timedelta(minutes=5), absolute_timeout=timedelta(hours=1), lock_lease=3
    )
    assert (settings.timeout, settings.absolute_timeout, settings.lock_lease) == (300, 3600, 3)
    assert type(settings.lock_lease) is float
    for name, highest in HIGHEST.items():
        assert getattr(settings_of({name: highest}), name) == highest
        assert getattr(settings_of({name: timedelta(seconds=9)}), name) == 9.0


def test_a_coherency_interval_may_be_nothing() -> None:
    for interval, kept in ((0, 0.0), (timedelta(0), 0.0), (2, 2.0), (86_400, 86_400.0)):
        settings = settings_of({"client_cache_coherency_interval": interval})
        assert settings.client_cache_coherency_interval == kept
    assert SessionSettings().client_cache_coherency_interval == 0


@pytest.mark.parametrize(
    ("options", "timeout"),
    [
        ({}, 1200.0),
        ({"max_age": 60}, 60.0),
        ({"max_age": 0}, 1200.0),
        ({"max_age": -1}, 1200.0),
        ({"max_age": 60, "timeout": 5}, 5.0),
        ({"max_age": 60, "timeout": float("1200")}, 1200.0),
        ({"max_age": 60, "timeout": timedelta(minutes=20)}, 1200.0),
        ({"max_age": 10**400}, MAX_TIMEOUT),
    ],
)
def test_a_positive_max_age_is_the_timeout_unless_one_is_given(
    options: dict[str, Any], timeout: float
) -> None:
    assert SessionSettings(**options).timeout == timeout


def test_a_timeout_that_max_age_sets_says_so() -> None:
    assert SessionSettings(max_age=60).origin("timeout") == "max_age"
    loaded = SessionSettings.load(None, {"GRIDSESSION_MAX_AGE": "60"})
    assert (loaded.timeout, loaded.origin("timeout")) == (60, "max_age")
    loaded = SessionSettings.load(None, {"GRIDSESSION_MAX_AGE": "60", "GRIDSESSION_TIMEOUT": "70"})
    assert loaded.origin("timeout") == "environment variable GRIDSESSION_TIMEOUT"


def test_domains_and_paths_that_browsers_take() -> None:
    for domain in ("shop.example", ".shop.example", "localhost", "a_b.example"):
        assert SessionSettings(domain=domain).domain == domain
    assert SessionSettings(path="/shop/~ann/%20").path == "/shop/~ann/%20"


def test_settings_are_one_frozen_value() -> None:
    settings = SessionSettings(namespace="shop")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.timeout = 5  # type: ignore[misc]
    assert dataclasses.replace(settings, timeout=5).namespace == "shop"
    assert settings == SessionSettings(namespace="shop")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "session"),
        ({"https_only": True}, "__Host-session"),
        ({"https_only": True, "path": "/shop"}, "session"),
        ({"https_only": True, "domain": "example.com"}, "session"),
        ({"https_only": True, "session_cookie": "sid"}, "sid"),
        ({"https_only": True, "session_cookie": "__Secure-sid", "path": "/a"}, "__Secure-sid"),
        ({"session_cookie": "-_.!#$&^~09azAZ"}, "-_.!#$&^~09azAZ"),
    ],
)
def test_cookie_name(options: dict[str, Any], name: str) -> None:
    assert SessionSettings(**options).cookie_name == name


@pytest.mark.parametrize("wrong", [{"path": "/shop"}, {"domain": "a.b"}, {"https_only": False}])
def test_a_host_cookie_that_browsers_refuse_is_refused(wrong: dict[str, Any]) -> None:
    options: dict[str, Any] = {"session_cookie": "__Host-id", "https_only": True} | wrong
    with pytest.raises(SettingsError, match=r"browsers refuse a __Host- cookie"):
        SessionSettings(**options)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        TEXT.replace("+", "-").replace("/", "_"),
        KEY.hex(),
        KEY.hex().upper(),
        f" {TEXT}\n",
    ],
)
def test_a_key_may_be_written_in_several_ways(text: str) -> None:
    assert SessionSettings(encryption_keys=text).encryption_keys == (EncryptionKey(KEY),)


@pytest.mark.parametrize(
    ("given", "kept", "words"),
    [
        ((), (), "none"),
        ("", (), "none"),
        (f"{TEXT},{OTHER_TEXT}", (EncryptionKey(KEY), EncryptionKey(OTHER_KEY)), "2 keys"),
        (["Plain", TEXT], ("plain", EncryptionKey(KEY)), "plain and 1 key"),
        ((TEXT, "plain"), (EncryptionKey(KEY), "plain"), "1 key and plain"),
    ],
)
def test_encryption_keys_are_kept_in_their_order(given: Any, kept: Any, words: str) -> None:
    settings = SessionSettings(encryption_keys=given)
    assert settings.encryption_keys == kept
    assert dataclasses.replace(settings, timeout=5).encryption_keys == kept
    assert summary(settings.encryption_keys) == words


def test_a_new_key_is_one() -> None:
    made = {new_key(os.urandom) for _ in range(100)}
    assert len(made) == 100
    for text in made:
        assert len(text) == 43
        key = EncryptionKey(base64.urlsafe_b64decode(f"{text}="))
        assert SessionSettings(encryption_keys=text).encryption_keys == (key,)


# -- access rules -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("exclusive", Use(Access.EXCLUSIVE)),
        ("concurrent", Use(Access.CONCURRENT)),
        ("read_only", Use(Access.READ_ONLY)),
        ("read_only wait_for_writer", Use(Access.READ_ONLY, wait_for_writer=True)),
        ("none", Use(Access.NONE)),
    ],
)
def test_uses(text: str, use: Use) -> None:
    assert Use.parse(text) == use
    assert SessionSettings(access=text).access_rules().use_of("GET", "/") == use


RULES = {
    "GET /catalog/*": "read_only",
    "/catalog/*": "none",
    "post /a*z": "none",
    "/exact": "none",
    "/a.b": "read_only",
    "*.css": "none",
    "/x/*/y/*": "read_only wait_for_writer",
    "/*": "read_only",
}


@pytest.mark.parametrize(
    ("request_line", "use"),
    [
        ("GET /catalog/1", "read_only"),
        ("GET /catalog/1/2", "read_only"),
        ("GET /catalog/", "read_only"),
        ("POST /catalog/1", "none"),
        ("HEAD /catalog/1", "read_only"),
        ("GET /catalog", "read_only"),
        ("POST /abcz", "none"),
        ("POST /az", "none"),
        ("GET /az", "read_only"),
        ("GET /exact", "none"),
        ("GET /exact/", "read_only"),
        ("GET /a.b", "read_only"),
        ("GET /deep/down/style.css", "none"),
        ("GET /x/1/y/2", "read_only wait_for_writer"),
        ("GET /x/1/2/y/3/y/4\n5", "read_only wait_for_writer"),
        ("GET /x/1/y", "read_only"),
        ("OPTIONS *", "exclusive"),
        ("GET no-slash", "exclusive"),
    ],
)
def test_the_first_rule_that_matches_wins(request_line: str, use: str) -> None:
    method, _, path = request_line.partition(" ")
    rules = SessionSettings(access=RULES).access_rules()
    assert rules.use_of(method, path) == Use.parse(use)


def test_what_no_rule_matches_has_the_default() -> None:
    assert SessionSettings(access={"/a": "none"}).access_rules().use_of("GET", "/b") == Use(
        Access.EXCLUSIVE
    )
    assert AccessRules(Use(Access.NONE), {"/a": "read_only"}).use_of("GET", "/b").access == "none"


@pytest.mark.parametrize(
    ("access", "request_line", "use"),
    [
        ("exclusive", "POST /", "concurrent"),
        ("concurrent", "POST /", "concurrent"),
        ("read_only", "POST /", "read_only"),
        ("none", "POST /", "none"),
        ({"/pay": "exclusive", "/catalog": "read_only"}, "POST /pay", "exclusive"),
        ({"/pay": "exclusive", "/catalog": "read_only"}, "GET /catalog", "read_only"),
        ({"/pay": "exclusive", "/catalog": "read_only"}, "POST /cart", "concurrent"),
    ],
)
def test_concurrent_is_what_no_rule_names(access: Any, request_line: str, use: str) -> None:
    method, _, path = request_line.partition(" ")
    settings = SessionSettings(access=access, allow_concurrent_requests_per_session=True)
    assert settings.access_rules().use_of(method, path) == Use.parse(use)
    settings = dataclasses.replace(settings, allow_concurrent_requests_per_session=False)
    before = "exclusive" if use == "concurrent" and access != "concurrent" else use
    assert settings.access_rules().use_of(method, path) == Use.parse(before)


def test_a_hostile_path_costs_a_rule_little() -> None:
    rules = SessionSettings(access={"/*/x/*/x/*/y": "none"}).access_rules()
    began = time.perf_counter()
    for path in ("/" + "/x/" * 20_000, "/x" * 30_000, "/x/" * 20_000 + "y\n"):
        rules.use_of("GET", path)
    assert time.perf_counter() - began < 1.0  # a regular expression of plain stars takes minutes


# -- secrets ------------------------------------------------------------------------------------

SECRET_STRINGS = [
    "redis://:hunter2@host:6379/0",
    "redis://ann:hunter2@host",
    "rediss://ann:hun/ter2@host",
    "redis://ann:hun#ter2@host/0",
    "redis://ann:hun?ter2@host/0",
    "redis://ann:hunter2@h@ost/0",
    "redis://ann:hun\nter2@host/0",
    "redis:ann:hunter2@host",
    "ann:hunter2@host",
    "redis://host?password=hunter2",
    "redis://host/0?a=1&password=hunter2\n&b=2",
    "redis+sentinel://:hunter2@h1,h2/service",
    "bootstrapGateways=h:721;password=hunter2;useSecure=true",
    "password=hunter2;bootstrapGateways=h:721",
]


@pytest.mark.parametrize("secret", SECRET_STRINGS)
def test_a_connection_string_is_shown_without_its_secrets(secret: str) -> None:
    """Whether it can be read or not: one that is wrong holds the same password."""
    texts = [redacted(secret)]
    try:
        made = SessionSettings(connection_string=secret, namespace="shop")
        texts += [repr(made), str(made), f"{made}", *made.notes, repr(made.address())]
        SessionProvider(made)
    except SettingsError as error:
        texts += [str(error), repr(error)]
    assert "***" in texts[0]
    assert len(texts) > 1
    for text in texts:
        assert "unter" not in text
        assert "ter2" not in text


def test_what_is_no_secret_is_shown() -> None:
    assert redacted("redis://:pw@host:6379/0") == "redis://***@host:6379/0"
    assert redacted("embedded:///var/lib/shop?max_size=1GiB") == "embedded:///var/lib/shop?***"
    assert redacted("memory://") == "memory://"
    assert redacted("redis+sentinel://h1,h2/service") == "redis+sentinel://h1,h2/service"
    assert repr(SessionSettings()) == "SessionSettings()"
    shown = repr(SessionSettings(namespace="shop", timeout=5))
    assert shown == "SessionSettings(namespace='shop', timeout=5.0)"


def secrets_in(text: str) -> list[str]:
    """The parts of KEY and OTHER_KEY that stand in a text."""
    written = [TEXT, OTHER_TEXT, KEY.hex(), OTHER_KEY.hex(), repr(KEY)[2:-1], repr(OTHER_KEY)[2:-1]]
    return [part for whole in written for part in (whole[:12], whole[-12:]) if part in text]


def test_settings_with_keys_show_none() -> None:
    settings = SessionSettings(encryption_keys=["plain", TEXT, OTHER_KEY.hex()])
    shown = repr(settings)
    assert "encryption_keys=('plain', <encryption key>, <encryption key>)" in shown
    texts = [shown, f"{settings}", str(dataclasses.asdict(settings)), *settings.notes]
    assert [secrets_in(text) for text in texts] == [[]] * len(texts)


@pytest.mark.parametrize(("bad", "allowed"), BAD_KEYS)
def test_keys_that_cannot_be_used_are_not_shown(bad: Any, allowed: str) -> None:
    with pytest.raises(SettingsError) as raised:
        SessionSettings(encryption_keys=bad)
    assert raised.value.option == "encryption_keys"
    assert secrets_in(f"{raised.value} {raised.value!r} {raised.value.__context__!r}") == []


@pytest.mark.parametrize("word", ["hunter", "my secret word"])
def test_a_word_in_the_place_of_a_key_is_not_shown(word: str) -> None:
    with pytest.raises(SettingsError) as raised:
        settings_of({"encryption_keys": word})
    assert word not in str(raised.value)


@pytest.mark.parametrize("secret", [b"redis://:hunter2@h", ["redis://:hunter2@h"]])
def test_a_connection_string_of_another_type_is_not_shown(secret: Any) -> None:
    with pytest.raises(SettingsError, match="connection_string=<") as raised:
        SessionSettings(connection_string=secret)
    assert "hunter2" not in str(raised.value)
