"""Bytes between machines, and what they make of the wall time at a stated bandwidth."""

from collections.abc import Sequence
from dataclasses import dataclass

BANDWIDTHS = (0.1, 1.0, 10.0, 100.0)  # Gbit/s


def all_reduce_bytes(num_parameters: int, num_workers: int, *, each: int) -> int:
    """What each worker sends in one ring all-reduce: 2 (N-1)/N · P · bytes of a gradient (Patarasu & Yuan 2009).

    Args:
        each: minimize.bytes_a_gradient, of the number that stands for a parameter.
    """
    return round(2 * (num_workers - 1) / num_workers * num_parameters * each)


@dataclass(frozen=True)
class Exchange:
    """One round of members, each in a process of its own, the first of which aggregates: the sizes of its files."""

    num_members: int
    start: int  # weights that members fetch
    shared: int  # each leaves for the aggregator: its minimum, outputs and statistics where it is asked for them
    own: int  # each leaves for itself: its optimizer's state, and checkpoints
    aggregate: int  # the aggregator leaves: weights, and the outer step's momentum
    states: int = 0  # each fetches: optimizer states that it begins with and has not in memory
    averaged: int = 0  # the aggregator fetches or leaves to make such a mean for the round after
    is_first: bool = False  # members fetch the start from the object store; later the aggregator has it

    @property
    def total_bytes(self) -> int:
        """What all links carry, as the ledger has it."""
        num, others = self.num_members, self.num_members - 1
        starts = num if self.is_first else others
        left = num * (self.states + self.shared + self.own)
        return starts * self.start + left + others * self.shared + self.aggregate + self.averaged

    @property
    def critical_bytes(self) -> int:
        """What goes one after the other: a member's start, what it leaves, what the aggregator fetches and leaves."""
        others = self.num_members - 1
        start = self.start if self.is_first or others else 0
        member = start + self.states + self.shared + self.own
        return member + others * self.shared + self.aggregate + self.averaged


@dataclass(frozen=True)
class Communication:
    """What one way of training does on the critical path."""

    passes: float  # of computation, one device's after the other
    num_bytes: float  # one after the other, through links of equal speed
    num_exchanges: int  # rounds of members, or all-reduces

    def wall_s(self, gbit_per_s: float, *, s_per_pass: float) -> float:
        """Computation, then transfer: passes · s_per_pass + bytes · 8 / bandwidth.

        Nothing is taken to overlap, for any arm. Latency is left out, as what it is depends on the network far more
        than on the method: it adds num_exchanges times that of an exchange.
        """
        return self.passes * s_per_pass + self.num_bytes * 8 / (gbit_per_s * 1e9)


def wall_times(one: Communication, *, s_per_pass: float, bandwidths: Sequence[float]) -> dict[str, float]:
    """Wall seconds by bandwidth in Gbit/s."""
    return {f"{speed:g}": one.wall_s(speed, s_per_pass=s_per_pass) for speed in bandwidths}
