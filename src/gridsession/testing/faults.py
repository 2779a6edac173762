"""Faults of a network, in a series that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Direction = Literal["up", "down"]  # to the server; back to the client
Kind = Literal["delay", "cut", "cut within", "freeze", "freeze one", "partition", "refuse", "drop"]

KINDS: tuple[Kind, ...] = (
    *("delay", "cut", "cut within", "freeze", "freeze one", "partition", "refuse", "drop"),
)
DIRECTIONS: tuple[Direction, ...] = ("up", "down")


class Fault(NamedTuple):
    """One of a series.

    Attributes:
        after: seconds since the one before it was over.
        kind: what it is.
        seconds: how long it lasts, where it lasts.
        directions: which of them, where a fault can hit one alone.
        which: 0 to 1, from the oldest connection to the newest, where it hits one alone.
    """

    after: float
    kind: Kind
    seconds: float
    directions: tuple[Direction, ...]
    which: float


def random_faults(
    seed: int, *, pause: float = 0.1, longest: float = 0.3, kinds: Sequence[Kind] = KINDS
) -> Iterator[Fault]:
    """An endless series, the same for the same arguments.

    Args:
        pause: seconds between two faults, on average.
        longest: seconds that a fault may last; a delay is a tenth of it at most.
        kinds: those to choose from.
    """
    chance = random.Random(seed)
    both = (DIRECTIONS, *((one,) for one in DIRECTIONS))
    while True:
        yield Fault(
            min(chance.expovariate(1 / pause), 10 * pause),
            chance.choice(kinds),
            chance.uniform(0, longest),
            chance.choice(both),
            chance.random(),
        )
