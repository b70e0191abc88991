"""Job: the input of each worker of a Ray Train stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import ray

from raysubset.cluster import put_once
from raysubset.data import FullSet
from raysubset.user_code.source_files import Workplace
from raysubset.work import Piece, seeded_model

FOLDER = "ray_train"  # of the job's checkpoints, within the stage's folder


@dataclass(frozen=True)
class Job:
    """The input of every worker. The full set and the start weights travel by reference."""

    piece: Piece  # on the full set
    full_set_ref: Sequence[ray.ObjectRef]
    start_ref: Sequence[ray.ObjectRef]
    num_gpus: float  # of each worker
    workplace: Workplace  # the driver's: Ray Train starts its workers elsewhere

    @classmethod
    def of(
        cls,
        piece: Piece,
        full_set: FullSet,
        full_set_ref: Sequence[ray.ObjectRef],
        *,
        num_gpus: float,
        workplace: Workplace,
    ) -> "Job":
        """Return the job of a piece of work, and put its start weights where the workers find them."""
        weights = piece.start_weights(full_set)
        if weights is None:
            weights = seeded_model(piece.config, full_set, piece.start_id).state_dict()
        return cls(piece, full_set_ref, put_once(weights), num_gpus, workplace)


class FineTuningFailed(RuntimeError):
    """Ray Train gave up; the message names the stage and the cause."""
