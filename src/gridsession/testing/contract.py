"""The grid contract as tests: `GridContract`, for whoever writes a grid.

What `gridsession.grids.contract` says in prose is proved here for any implementation, sentence by
sentence. A test whose name bears a number proves the promise of that number.
"""

from __future__ import annotations

from gridsession.testing.contract_bells import BellContract
from gridsession.testing.contract_cancellation import CancellationContract
from gridsession.testing.contract_concurrent import ConcurrentContract
from gridsession.testing.contract_expiry import ExpiryContract
from gridsession.testing.contract_faults import FaultContract
from gridsession.testing.contract_locks import LockContract
from gridsession.testing.contract_records import RecordContract


class GridContract(
    RecordContract,
    ExpiryContract,
    LockContract,
    BellContract,
    ConcurrentContract,
    CancellationContract,
    FaultContract,
):
    """What every grid has to do; a class of pytest tests, to be subclassed for a grid.

    One hook must be overridden, `open_grid`:

        class TestMyGrid(GridContract):
            @contextlib.asynccontextmanager
            async def open_grid(self) -> AsyncIterator[Grid]:
                self.clock = ManualClock()
                grid = MyGrid(clock=self.clock)
                await grid.open()
                yield grid
                await grid.close()

            async def advance(self, seconds: float) -> None:
                self.clock.advance(seconds)

    Each test is given a grid of its own, which holds no records yet, and runs in an event loop of
    its own; no plugin for asynchronous tests is needed. pytest makes an instance of the class for
    each test, so hooks may keep things on `self`.

    The other hooks, for grids of which more can be shown:

    `advance(seconds)`
        lets time pass on the grid's clock. By default it sleeps; with a clock that a test can
        set, override it: no test sleeps then. Both clocks, the steady one and the wall's, go on.
    `second_client(grid)`
        opens another client onto the same records, so that hand-overs and bells are proved
        between clients. It is also called in threads, for an event loop of its own.

    A grid whose records outlive the process subclasses `StoredGridContract` as well, one whose size
    is bounded `BoundedGridContract`; each has a hook of its own.

    Attributes:
        patience: seconds of real time that one test may take by sleeping, where `advance` is not
            overridden. Tests that need more are skipped; the longest needs 13.
        bound: seconds of real time after which a test that hangs fails.
    """
