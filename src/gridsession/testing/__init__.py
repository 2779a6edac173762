"""For tests of grids, and of applications that use sessions. pytest itself is not imported."""

from __future__ import annotations

import sys

if "pytest" in sys.modules:  # its asserts then show both sides, as those of a test module do
    for _part in (
        *("bells", "cancellation", "concurrent", "expiry"),
        *("faults", "hooks", "locks", "records"),
    ):
        sys.modules["pytest"].register_assert_rewrite(f"{__name__}.contract_{_part}")

from gridsession.testing.clock import ManualClock
from gridsession.testing.contract import GridContract
from gridsession.testing.contract_faults import BoundedGridContract, StoredGridContract
from gridsession.testing.fault_proxy import FaultProxy
from gridsession.testing.faults import Fault, random_faults

__all__ = [
    "BoundedGridContract",
    "Fault",
    "FaultProxy",
    "GridContract",
    "ManualClock",
    "StoredGridContract",
    "random_faults",
]
