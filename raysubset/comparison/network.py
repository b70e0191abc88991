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


def exchange_bytes(num_bytes: int, num_members: int) -> int:
    """What one round of members sends through the aggregator's link: start weights out and minima back, one by one.

    Args:
        num_bytes: of one set of weights.
    """
    return 2 * num_members * num_bytes


@dataclass(frozen=True)
class Communication:
    """What one way of training does on the critical path."""

    passes: float  # of computation, one device's after the other
    num_bytes: float  # through the slowest link
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
