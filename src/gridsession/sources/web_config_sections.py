"""The sections of a web.config beside sessionState that concern sessions.

What is heeded here and differs from ASP.NET is told in docs/coming-from-aspnet.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from gridsession.sources.given import Given
from gridsession.sources.web_config_values import (
    COLLECTION,
    MAX_INT,
    SECTION,
    Attribute,
    Reading,
    Table,
    collected,
    did_you_mean,
    give_all,
    nearest,
    note_near,
    place,
    same_site,
    shown,
)
from gridsession.sources.xml import Element

_DAY = 86_400  # seconds; what runs for longer hangs

# -- appSettings, connectionStrings ----------------------------------------------------------------


def app_settings(reading: Reading, sections: Iterable[Element]) -> None:
    """Entries for whoever looks for one, and the two keys that are settings of sessions.

    Args:
        reading: what is found goes there.
        sections: appSettings, and then those of its other file, which win.
    """
    children: list[Element] = []
    for section in sections:
        reading.check_names(section, "appSettings", ("file", *SECTION))
        children += reading.children(section, "appSettings", COLLECTION)
    for entry in collected(
        reading, children, "appSettings", "key", ("key", "value"), once=False
    ).values():
        key = entry.attributes["key"]
        reading.source.app_settings[key] = Given(
            entry.attributes.get("value", ""), f"{place(entry)}: appSettings add"
        )
        for name, (option, read) in _KEYS.items():
            if key.lower() == name.lower():
                attribute = Attribute(entry, name, "appSettings", option, spoken_by="value")
                reading.give(attribute, read(attribute))
                break
        else:
            if key.lower().startswith("aspnet:") and (near := nearest(key, _KEYS, 0.85)):
                reading.note(
                    f"{place(entry)}: appSettings {shown(key)}",
                    f"there is no such key; did you mean {near}?",
                )


_KEYS: Table = {
    "aspnet:AllowConcurrentRequestsPerSession": (
        "allow_concurrent_requests_per_session",
        Attribute.flag,
    ),
    "aspnet:RequestQueueLimitPerSession": (
        "request_queue_limit_per_session",
        lambda attribute: attribute.whole(1, MAX_INT),
    ),
}


def connection_strings(reading: Reading, section: Element) -> None:
    """Entries for the provider's connectionStringElement."""
    reading.check_names(section, "connectionStrings", SECTION)
    children = reading.children(section, "connectionStrings", COLLECTION)
    known = ("name", "connectionString", "providerName")
    for entry in collected(
        reading, children, "connectionStrings", "name", known, once=True
    ).values():
        where = f"{place(entry)}: connectionStrings add"
        if (value := entry.attributes.get("connectionString")) is None:
            reading.note(where, "it has no connectionString, so it is passed over")
        else:
            reading.source.connection_strings[entry.attributes["name"]] = Given(value, where)


# -- cookies, time limits, pages, modules ----------------------------------------------------------


def http_cookies(reading: Reading, section: Element, session: Element | None) -> None:
    """What is said of all cookies, where sessionState does not say otherwise.

    Args:
        reading: what is found goes there.
        section: httpCookies.
        session: sessionState, which comes first.
    """
    owner = "httpCookies"
    reading.check_leaf(
        section, owner, ("requireSSL", "domain", "sameSite", "httpOnlyCookies", *SECTION)
    )
    give_all(reading, section, owner, {"requireSSL": ("https_only", Attribute.flag)})
    if section.attributes.get("domain"):  # empty is ASP.NET's default
        give_all(reading, section, owner, {"domain": ("domain", Attribute.text)})
    if session is None or "cookieSameSite" not in session.attributes:
        same_site(reading, section, owner, "sameSite")
    if "httpOnlyCookies" in section.attributes:
        http_only = Attribute(section, "httpOnlyCookies", owner)
        if not http_only.flag():
            reading.note(http_only.place, "the session's cookie is HttpOnly always")


def http_runtime(reading: Reading, section: Element) -> None:
    """How long a request may run."""
    note_near(reading, section, "httpRuntime", "executionTimeout")
    if "executionTimeout" not in section.attributes:
        return
    attribute = Attribute(section, "executionTimeout", "httpRuntime", "execution_timeout")
    seconds = attribute.whole(1, MAX_INT, " of seconds")
    if seconds > _DAY:  # written by those who want no limit at all
        reading.note(
            attribute.place, f"a session is locked for a day at most; {_DAY} seconds are used"
        )
    reading.give(attribute, float(min(seconds, _DAY)))


def pages(reading: Reading, section: Element) -> None:
    """Whether pages use sessions, unless they say otherwise."""
    note_near(reading, section, "pages", "enableSessionState")
    if (use := use_of(section)) in (None, "exclusive"):
        return
    attribute = Attribute(section, "enableSessionState", "pages", "access")
    if "access" in reading.source.options:
        reading.note(attribute.place, 'sessionState mode="Off" comes before it')
    else:
        reading.give(attribute, use)


def use_of(section: Element) -> str | None:
    """The access that a pages section asks for, if any."""
    if "enableSessionState" not in section.attributes:
        return None
    attribute = Attribute(section, "enableSessionState", "pages", "access")
    value = attribute.value.strip().lower()
    if value not in _USES:
        raise attribute.wrong("true, false or ReadOnly")
    return _USES[value]


_USES = {"true": "exclusive", "false": "none", "readonly": "read_only wait_for_writer"}
_SESSION_MODULES = (
    "Microsoft.AspNet.SessionState.SessionStateModuleAsync",
    "System.Web.SessionState.SessionStateModule",
)


def modules(reading: Reading, section: Element) -> None:
    """The session module: whether it is there, and whether it is one whose settings these are."""
    owner = section.tag
    note_near(reading, section, owner, "configSource")
    added = removed = None
    for child in section.children:
        name = next((v for k, v in child.attributes.items() if k.lower() == "name"), "")
        of_session = name.lower() == "session"
        if child.tag == "clear" or (child.tag == "remove" and of_session):
            added, removed = None, child
        elif child.tag == "add" and of_session:
            added = child
        elif child.tag.lower() in COLLECTION and child.tag not in COLLECTION:
            reading.note(
                f"{place(child)}: {shown(child.tag)} in {owner}",
                f"there is no such element{did_you_mean(child.tag, COLLECTION)}",
            )
        for tag, known in (("add", ("name", "type", "preCondition")), ("remove", ("name",))):
            if child.tag == tag and of_session:
                reading.check_leaf(child, f"{owner} {tag} Session", known)
    if added is not None:
        if added.attributes.get("type", "").split(",")[0].strip() not in _SESSION_MODULES:
            reading.note(
                f"{place(added)}: {owner} add Session",
                "it is no session module of ASP.NET; what it reads elsewhere is not heeded",
            )
    elif removed is not None:
        reading.note(
            f"{place(removed)}: {owner} {removed.tag}",
            "the session module is removed and none is added: to have no sessions, install no "
            'middleware, or set access = "none"',
        )
