"""Settings from environment variables: `GRIDSESSION_TIMEOUT` for `timeout`."""

from __future__ import annotations

from collections.abc import Mapping

from gridsession.sources.given import Given, Source, options_among


def read_environment(environ: Mapping[str, str]) -> Source:
    """What the environment says. An empty variable says nothing."""
    said = {
        name: Given(value, f"environment variable {name}")
        for name, value in environ.items()
        if value.strip()
    }
    return Source(
        "environment",
        options_among(said),
        # Kubernetes sets GRIDSESSION_PORT and others for a service of that name.
        is_shared=True,
        is_text=True,
        has_tables=False,
    )
