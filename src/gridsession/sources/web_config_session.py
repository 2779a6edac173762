"""sessionState of a web.config, and the provider that it names."""

from __future__ import annotations

from collections.abc import Mapping

from gridsession.sources.web_config_values import (
    ANOTHER_FILE,
    COLLECTION,
    MAX_INT,
    SECTION,
    Attribute,
    Reading,
    Table,
    collected,
    did_you_mean,
    give_all,
    note_all,
    place,
    same_site,
    shown,
)
from gridsession.sources.xml import Element

_MINUTES_OF_A_YEAR = 525_600  # ASP.NET's own limit


def session_state(reading: Reading, section: Element) -> None:
    """The mode, the provider that it names, and the attributes of every mode."""
    owner = "sessionState"
    reading.check_names(
        section,
        owner,
        (*_SESSION_STATE, *_SPECIAL, *_NO_COUNTERPART, *SECTION),
        dict.fromkeys(_PROVIDER, "the provider's add"),
    )
    providers = _providers(reading, section)
    _mode(reading, section, providers)
    give_all(reading, section, owner, _SESSION_STATE)
    _cookieless(reading, section)
    same_site(reading, section, owner, "cookieSameSite")
    note_all(reading, section, owner, _NO_COUNTERPART)


def _minutes(attribute: Attribute) -> float:
    return attribute.whole(1, _MINUTES_OF_A_YEAR, " of minutes") * 60.0


_SPECIAL = ("mode", "customProvider", "cookieless", "cookieSameSite")
_SESSION_STATE: Table = {
    "timeout": ("timeout", _minutes),
    "regenerateExpiredSessionId": ("regenerate_expired_session_id", Attribute.flag),
    "cookieName": ("session_cookie", Attribute.text),
    "compressionEnabled": ("compression_enabled", Attribute.flag),
}
_USE_A_CUSTOM_PROVIDER = (
    'use mode="Custom" and a provider whose connectionString is embedded: (the workers of one '
    "machine share it) or redis://… (several machines do)"
)
_NO_COUNTERPART = {
    "stateConnectionString": f"there is no state server; {_USE_A_CUSTOM_PROVIDER}",
    "stateNetworkTimeout": "there is no state server; the option grid_timeout bounds each call",
    "sqlConnectionString": f"sessions are not kept in a database; {_USE_A_CUSTOM_PROVIDER}",
    "sqlCommandTimeout": "there is no database; the option grid_timeout bounds each call",
    "sqlConnectionRetryInterval": "there is no database; a grid that is away answers 503 at once",
    "allowCustomSqlDatabase": "there is no database; the connection string says which grid",
    "partitionResolverType": "has no counterpart: a grid spreads its sessions by itself",
    "sessionIDManagerType": "has no counterpart: ids are made and checked by gridsession alone",
    "useHostingIdentity": "has no counterpart: the workers' own user opens the grid",
}


def _providers(reading: Reading, section: Element) -> dict[str, Element]:
    children: list[Element] = []
    for child in reading.children(section, "sessionState", ("providers", *COLLECTION)):
        if child.tag == "providers":
            reading.check_names(child, "sessionState providers", ())
            children += reading.children(child, "sessionState providers", COLLECTION)
        else:  # so it is written in the provider's own documentation
            children.append(child)
    return collected(reading, children, "sessionState provider", "name", None, once=True)


def _mode(reading: Reading, section: Element, providers: Mapping[str, Element]) -> None:
    attribute = Attribute(section, "mode", "sessionState")
    mode = "InProc"  # ASP.NET's default
    if "mode" in section.attributes:
        mode = attribute.choice(("Custom", "InProc", "Off", "StateServer", "SQLServer"))
    if mode == "Custom":
        provider(reading, _chosen(section, providers))
        return
    if mode in ("StateServer", "SQLServer"):
        raise attribute.wrong(
            f"Custom, since there is no {mode} here: {_USE_A_CUSTOM_PROVIDER}; if this file is to "
            f"stay as it is, {ANOTHER_FILE}"
        )
    if mode == "Off":
        reading.give(Attribute(section, "mode", "sessionState", "access"), "none")
    else:
        reading.note(
            attribute.place,
            "sessions are kept by the default grid, embedded:, which all workers of the machine "
            "share and which outlives them; nothing is to be done",
        )
    if providers or section.attributes.get("customProvider"):
        reading.note(attribute.place, 'a provider acts with mode="Custom" only; it is passed over')


def _chosen(section: Element, providers: Mapping[str, Element]) -> Element:
    attribute = Attribute(section, "customProvider", "sessionState")
    name = section.attributes.get("customProvider", "")
    if (found := providers.get(name.lower())) is not None:
        return found
    names = [entry.attributes["name"] for entry in providers.values()]
    if not names:
        raise attribute.wrong(
            'the name of a provider, and there is none: <add name="…" connectionString="…" />'
        )
    listed = ", ".join(map(shown, names[:20])) + (", …" if len(names) > 20 else "")
    raise attribute.wrong(f"a provider's name; there are: {listed}{did_you_mean(name, names)}")


def _cookieless(reading: Reading, section: Element) -> None:
    if "cookieless" not in section.attributes:
        return
    attribute = Attribute(section, "cookieless", "sessionState")
    if attribute.value.strip().lower() in ("true", "false"):
        mode = "UseUri" if attribute.flag() else "UseCookies"
    else:
        mode = attribute.choice(("UseCookies", "UseUri", "AutoDetect", "UseDeviceProfile"))
    if mode == "UseUri":
        raise attribute.wrong(
            "UseCookies: a session id in the address is told to everybody whom a link, a log or a "
            "Referer header tells the address"
        )
    if mode != "UseCookies":
        reading.note(
            attribute.place, "session ids travel in cookies only; write UseCookies, or leave it out"
        )


# -- the provider --------------------------------------------------------------------------------


def provider(reading: Reading, entry: Element) -> None:
    """The `add` of the provider that customProvider names."""
    owner = "sessionState provider"
    reading.check_leaf(
        entry,
        owner,
        ("name", "type", *_PROVIDER, *_PROVIDER_NOTES),
        dict.fromkeys((*_SESSION_STATE, *_SPECIAL), "sessionState"),
    )
    give_all(reading, entry, owner, _PROVIDER)
    note_all(reading, entry, owner, _PROVIDER_NOTES)
    kind = entry.attributes.get("type", "")
    if kind and not any(name in kind.lower() for name in ("scaleout", "gridsession")):
        reading.note(
            Attribute(entry, "type", owner).place,
            "it is another vendor's provider, whose attributes may mean something else than here; "
            "gridsession keeps the sessions: look at each attribute, and leave type out",
        )
    if not any(name in entry.attributes for name in _LOCATIONS):
        reading.note(
            f"{place(entry)}: {owner}",
            "it names no store, so sessions are kept by embedded:, on each machine for itself, "
            "unless a stronger source says otherwise; where several machines share sessions, write "
            "connectionString with the address of their store, or set "
            'GRIDSESSION_CONNECTION_STRING; for one machine write connectionString="embedded:"',
        )


def _names(attribute: Attribute) -> list[str]:
    names = [name.strip() for name in attribute.value.split(",")]
    if names == [""]:
        return []
    if "" in names:
        raise attribute.wrong("names with one comma between each two")
    return names


_PROVIDER: Table = {
    "connectionString": ("connection_string", Attribute.text),
    "connectionStringEnvironmentVariable": (
        "connection_string_environment_variable",
        Attribute.text,
    ),
    "connectionStringAppSetting": ("connection_string_app_setting", Attribute.text),
    "connectionStringElement": ("connection_string_element", Attribute.text),
    "clientCacheType": ("client_cache_type", Attribute.text),
    "clientCacheCapacity": ("client_cache_capacity", lambda attribute: attribute.whole(0, MAX_INT)),
    "handleSessionEnd": ("handle_session_end", Attribute.flag),
    "namespace": ("namespace", Attribute.text),
    "remoteStores": ("remote_stores", _names),
}
_LOCATIONS = [name for name in _PROVIDER if name.startswith("connectionString")]
_PROVIDER_NOTES = {
    "description": "has no counterpart; write a comment",
    "applicationName": "has no counterpart; namespace sets the sessions of applications apart",
}
