"""Two ways to the same end, timed in turns: whatever else the machine does in the meantime strikes both.

    round 1: ours, peer    round 2: ours, peer    ...    ratio of a round = seconds of ours / seconds of the peer

A ratio within a round is far steadier than a time, so the ratio's median and quartiles are what is reported.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of ours and of the peer, one entry for each round."""

    ours: list[float]
    peer: list[float]

    @property
    def medians(self) -> tuple[float, float]:
        """Seconds: ours, the peer's."""
        return statistics.median(self.ours), statistics.median(self.peer)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Ours by the peer within a round: lower quartile, median, upper quartile over the rounds."""
        ratios = [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high


@dataclass(frozen=True)
class Comparison:
    """What `make bench` measures in one row of its table.

    Args:
        what: the row's name.
        ours: what is timed of ours, in a few words, and `peer`: what it is held against.
        build: prepares everything that is not timed; gives two functions, each of which does its work once and
            returns the seconds that it took.
        rounds: how often the two take turns, at least 2; one turn more comes first and is not counted.
        target: the largest ratio that is good enough; None if there is none.
    """

    what: str
    ours: str
    peer: str
    build: Callable[[], tuple[Callable[[], float], Callable[[], float]]]
    rounds: int
    target: float | None = None


def interleaved(ours: Callable[[], float], peer: Callable[[], float], rounds: int, warm_up: int = 1) -> Timing:
    """Run ours, peer, ours, peer, ...; each returns the seconds that it took. The first `warm_up` rounds do not count."""
    turns = [(ours(), peer()) for _ in range(warm_up + rounds)][warm_up:]
    return Timing([turn[0] for turn in turns], [turn[1] for turn in turns])


def timed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A function that calls `function` and returns how long that took, by `clock`."""

    def run() -> float:
        started = clock()
        function()
        return clock() - started

    return run
