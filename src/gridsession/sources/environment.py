"""Settings from environment variables: `GRIDSESSION_TIMEOUT` for `timeout`."""

from __future__ import annotations

from collections.abc import Mapping

from gridsession.sources.given import CONFIG_VARIABLE, PREFIX, Given, Source


def read_environment(environ: Mapping[str, str]) -> Source:
    """What the environment says. An empty variable says nothing."""
    return Source(
        "environment",
        {
            name.removeprefix(PREFIX).lower(): Given(value, f"environment variable {name}")
            for name, value in environ.items()
            if name.startswith(PREFIX) and name != CONFIG_VARIABLE and value.strip()
        },
        # Kubernetes sets GRIDSESSION_PORT and others for a service of that name.
        is_shared=True,
        is_text=True,
        has_tables=False,
    )
