"""Bytes between machines, and the wall time that follows from them at a given bandwidth."""

from collections.abc import Sequence
from dataclasses import dataclass

BANDWIDTHS = (0.1, 1.0, 10.0, 100.0)  # Gbit/s


def all_reduce_bytes(num_parameters: int, num_workers: int, *, each: int) -> int:
    """Return what each worker sends in a ring all-reduce: 2 (N-1)/N · P · bytes of a gradient (Patarasu & Yuan 2009).

    Args:
        each: minimize.bytes_a_gradient, the bytes of the gradient of one parameter.
    """
    return round(2 * (num_workers - 1) / num_workers * num_parameters * each)


@dataclass(frozen=True)
class Exchange:
    """The file sizes in bytes of one round of members. Each has its own process, and the first also aggregates."""

    num_members: int
    start: int  # weights that members fetch
    shared: int  # that each member leaves for the aggregator: its minimum, and outputs and statistics if needed
    own: int  # that each member leaves for itself: its optimizer's state, and checkpoints
    aggregate: int  # that the aggregator leaves: weights, and the outer step's momentum
    states: int = 0  # that each member fetches: optimizer states that it begins with and does not have in memory
    averaged: int = 0  # that the aggregator fetches and leaves for a mean optimizer state for the next round
    is_first: bool = False  # members fetch the start from the object store; in later rounds the aggregator has it

    @property
    def member_bytes(self) -> int:
        """The bytes that a member fetches and leaves."""
        start = self.start if self.is_first or self.num_members > 1 else 0
        return start + self.states + self.shared + self.own

    @property
    def aggregator_bytes(self) -> int:
        """The bytes that the aggregator fetches and leaves."""
        return (self.num_members - 1) * self.shared + self.aggregate + self.averaged


def critical_bytes(rounds: Sequence[Exchange], *, overlap: bool) -> int:
    """Return the bytes one after the other: of each round those of a member, then those of the aggregator.

    Of rounds that overlap the longer of two chains counts: all members and the last aggregate, or the first members and
    all aggregates. No other path through such rounds is longer. The aggregator then has a process of its own, and
    fetches the minima of all members.
    """
    if not overlap:
        return sum(exchange.member_bytes + exchange.aggregator_bytes for exchange in rounds)
    members = [exchange.member_bytes for exchange in rounds]
    aggregators = [exchange.aggregator_bytes + exchange.shared for exchange in rounds]
    return max(sum(members) + aggregators[-1], members[0] + sum(aggregators))


@dataclass(frozen=True)
class Communication:
    """The work of one way of training on the critical path."""

    passes: float  # of computation on one device, one after the other
    num_bytes: float  # one after the other, through links of equal speed
    num_exchanges: int  # rounds of members, or all-reduces

    def wall_s(self, gbit_per_s: float, *, s_per_pass: float) -> float:
        """Return the seconds of computation and then transfer: passes · s_per_pass + bytes · 8 / bandwidth.

        Computation and transfer are not assumed to overlap, for any arm. Latency is left out, as it depends on the
        network far more than on the method: it adds num_exchanges times the latency of one exchange.
        """
        return self.passes * s_per_pass + self.num_bytes * 8 / (gbit_per_s * 1e9)

    def wall_times(self, *, s_per_pass: float, bandwidths: Sequence[float] = BANDWIDTHS) -> dict[str, float]:
        """Return wall seconds by bandwidth in Gbit/s."""
        return {f"{speed:g}": self.wall_s(speed, s_per_pass=s_per_pass) for speed in bandwidths}
