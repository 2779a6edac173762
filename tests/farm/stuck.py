"""`python -m tests.farm.stuck FOLDER`: enter the grid's gate, begin a transaction, and stop.

What a debugger, a suspended virtual machine or SIGSTOP at a bad moment does. Continued, it leaves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from gridsession.grids.embedded.place import Place
from gridsession.grids.embedded.store import close_store, open_store


def main(folder: Path) -> None:
    store = open_store(Place(folder), 5.0)
    while not store.gate.try_enter():
        time.sleep(0.0001)
    transaction = store.env.begin(write=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    transaction.abort()
    store.gate.leave()
    close_store(store)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
