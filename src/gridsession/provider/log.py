"""The one logger: `gridsession`. Operators' warnings are its records, never `warnings.warn`."""

from __future__ import annotations

import logging

log = logging.getLogger("gridsession")
