"""Two ways to the same end, measured in turns: whatever else the machine does in the meantime strikes both.

    round 1: ours, peer    round 2: ours, peer    ...    ratio of a round = seconds of ours / seconds of the peer

A ratio within a round is far steadier than a time, so the ratio's median and quartiles are what is reported. Bytes are
measured in the same way; most are the same in every round.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from helpers.timing import quartiles, results_in_turns


@dataclass(frozen=True)
class Timing:
    """Seconds, or bytes, of ours and of the peer, one entry for each round."""

    ours: list[float]
    peer: list[float]

    @property
    def medians(self) -> tuple[float, float]:
        """Ours, the peer's."""
        return statistics.median(self.ours), statistics.median(self.peer)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Ours by the peer within a round: lower quartile, median, upper quartile over the rounds."""
        return quartiles([ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)])


@dataclass(frozen=True)
class Comparison:
    """What `make bench` measures in one row of its table.

    Args:
        what: the row's name.
        ours: what is measured of ours, in a few words, and `peer`: what it is held against.
        build: prepares everything that is not measured; gives two functions, each of which does its work once and
            returns the seconds, or the bytes, that it took. It raises ImportError or ExportFailed if that cannot be here.
        rounds: how often the two take turns, at least 2; one turn more comes first and is not counted.
        target: the largest ratio that is good enough; None if there is none.
        unit: of what the functions return.
    """

    what: str
    ours: str
    peer: str
    build: Callable[[], tuple[Callable[[], float], Callable[[], float]]]
    rounds: int
    target: float | None = None
    unit: Literal["seconds", "bytes"] = "seconds"


def interleaved(ours: Callable[[], float], peer: Callable[[], float], rounds: int, warm_up: int = 1) -> Timing:
    """Run ours, peer, ours, peer, ...; each returns its seconds, or bytes. The first `warm_up` rounds do not count."""
    return Timing(**results_in_turns({"ours": ours, "peer": peer}, rounds, warm_up))
