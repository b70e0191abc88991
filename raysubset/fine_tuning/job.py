"""Job: the input of each worker of a Ray Train stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import ray

from raysubset.user_code.source_files import Workplace
from raysubset.work import Piece

FOLDER = "ray_train"  # of what Ray Train itself leaves, within the stage's folder


@dataclass(frozen=True)
class Job:
    """The input of every worker. The full set and the start weights travel by reference."""

    piece: Piece  # on the full set
    full_set_ref: Sequence[ray.ObjectRef]
    start_ref: Sequence[ray.ObjectRef]
    num_gpus: float  # of each worker
    workplace: Workplace  # the driver's: Ray Train starts its workers elsewhere


def pulse_key(key: str, rank: int) -> str:
    """Return the key under which a worker publishes its pulse, below the job's."""
    return f"{key}/{rank:05d}"


class FineTuningFailed(RuntimeError):
    """Ray Train gave up; the message names the stage and the cause."""
