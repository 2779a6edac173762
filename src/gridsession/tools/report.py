"""What the doctor found out, before it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gridsession.settings import KINDS, SessionSettings
from gridsession.sources.connection_string import redacted
from gridsession.sources.keys import summary

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor has to say.

    Attributes:
        severity: `ok`; `warning`, works and may be meant otherwise; `error`, does not work.
        what: what there is, and what that means.
        do: what to do; empty where there is nothing to do.
    """

    severity: Severity
    what: str
    do: str = ""


@dataclass(frozen=True)
class Setting:
    """An option as it is in force.

    Attributes:
        name: the option's.
        value: in JSON's types; a connection string without its credentials and options; of keys
            how many there are.
        source: which source won, in words.
    """

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Timing:
    """How long something took, repeatedly.

    Attributes:
        count: how often it was done.
        median, p99: seconds.
    """

    count: int
    median: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of at least one measurement."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(len(ordered), ordered[last // 2], ordered[round(last * 0.99)])


@dataclass
class Report:
    """All of it.

    Attributes:
        version: of gridsession.
        settings: every option; none where they cannot be used.
        grid: what is known of where the records live, by name, in JSON's types.
        ping: of a grid's server, a call that does nothing; None where that was not measured.
        round_trip: an exclusive request's two calls; None the same.
        hand_off: from a release in one process to the grant in another; None the same.
        findings: the settings' first.
    """

    version: str
    settings: list[Setting] = field(default_factory=list)
    grid: dict[str, Any] = field(default_factory=dict)
    ping: Timing | None = None
    round_trip: Timing | None = None
    hand_off: Timing | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """1 where there is an error, else 0."""
        return int(any(finding.severity == "error" for finding in self.findings))

    def say(self, severity: Severity, what: str, do: str = "") -> None:
        """Add a finding, unless the same has been said."""
        finding = Finding(severity, what, do)
        if finding not in self.findings:
            self.findings.append(finding)


def in_words(time: float) -> str:
    """Seconds, for people."""
    return f"{time * 1e6:.0f} µs" if time < 0.001 else f"{time * 1e3:.1f} ms"


def settings_of(settings: SessionSettings, namespace: str | None = None) -> list[Setting]:
    """Every option with its value in force and its source, secrets redacted.

    Args:
        settings: as they are set.
        namespace: the one in force; None where that is not known.
    """
    found = {name: (getattr(settings, name), settings.origin(name)) for name in KINDS}
    if settings.session_cookie is None:
        found["session_cookie"] = (settings.cookie_name, "worked out")
    if settings.namespace is None and namespace is not None:
        source = "default" if namespace == "/" else "where the application is mounted"
        found["namespace"] = (namespace, source)
    return [Setting(name, _shown(name, value), source) for name, (value, source) in found.items()]


def _shown(name: str, value: Any) -> Any:
    if name == "encryption_keys":
        return summary(value) if value else None
    if isinstance(value, str):
        # Somebody may have put a connection string where a name belongs.
        return redacted(value) if name == "connection_string" or "://" in value else value
    if isinstance(value, Mapping):
        return {str(key): _shown(name, entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(name, entry) for entry in value]
    return value
