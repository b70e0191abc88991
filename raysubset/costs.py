"""What work costs, in counts that can be added, and bytes as a person reads them. No torch: a report needs both.

count_bytes(4096)     # wherever a file or an object of the store comes or goes
taken_bytes()         # what this thread has moved since it was last asked: of the piece of work that it ends
"""

import threading
from dataclasses import asdict, dataclass
from typing import Any

from raysubset.config import from_tree


class _Moved(threading.local):
    num_bytes = 0


_MOVED = _Moved()


def count_bytes(num: int) -> None:
    """Note that this thread has sent or fetched so many bytes, by storage or by the object store."""
    _MOVED.num_bytes += num


def moved_bytes() -> int:
    """Return what this thread has moved since taken_bytes()."""
    return _MOVED.num_bytes


def taken_bytes() -> int:
    """Return what this thread has moved since this was last asked for."""
    num, _MOVED.num_bytes = _MOVED.num_bytes, 0
    return num


FORWARD_SHARE = 1 / 3  # of a pass, of deep networks: a backward pass costs about twice a forward pass


@dataclass(frozen=True)
class Cost:
    """Work done, in counts that can be added; passes() makes them comparable between methods."""

    num_forward: int = 0  # examples passed forward
    num_backward: int = 0  # examples passed backward
    num_steps: int = 0  # optimizer steps
    device_s: float = 0.0  # seconds devices were held, summed over devices

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.num_forward + other.num_forward,
            self.num_backward + other.num_backward,
            self.num_steps + other.num_steps,
            self.device_s + other.device_s,
        )

    def passes(self, num_train: int, forward_share: float = FORWARD_SHARE) -> float:
        """Return forward and backward work over as many examples as the full set has.

        Args:
            num_train: examples of the full set.
            forward_share: what forward alone counts: the network's own, training.forward_share().
        """
        return (forward_share * self.num_forward + (1 - forward_share) * self.num_backward) / num_train

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Any) -> "Cost":
        """The inverse of to_dict(); ValueError for what is none."""
        return from_tree(cls, record, noun="value of a cost")


def bytes_in_words(num: float) -> str:
    """'64 B', '538 kB', '16 GB': three significant digits, units of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if num < 999.5:
            return f"{num:.3g} {unit}"
        num /= 1000
    return f"{num:.3g} TB"
