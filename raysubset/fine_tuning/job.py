"""Job: the input of each worker of a Ray Train stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import ray

from raysubset.cluster import put_once
from raysubset.config import Config, MinimizeConfig, TrainingStage
from raysubset.data import FullSet
from raysubset.run_directory import RunDirectory
from raysubset.user_code.source_files import Workplace
from raysubset.work import Output, Piece, seeded_model

FOLDER = "ray_train"  # of the job's checkpoints, within the stage's folder


@dataclass(frozen=True)
class Job:
    """The input of every worker. The full set and the start weights travel by reference."""

    config: Config
    recipe: MinimizeConfig
    directory: RunDirectory
    stage: TrainingStage
    full_set_ref: Sequence[ray.ObjectRef]
    start_ref: Sequence[ray.ObjectRef]
    num_gpus: float  # of each worker
    teachers: tuple[Output, ...]  # the minima to distil from
    workplace: Workplace  # the driver's: Ray Train starts its workers elsewhere
    label: str  # of the piece

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
        config, weights = piece.config, piece.start_weights(full_set)
        if weights is None:
            weights = seeded_model(config, full_set, piece.start_id).state_dict()
        recipe, refs = config.stage(piece.stage, epochs=piece.epochs), (full_set_ref, put_once(weights))
        more = num_gpus, piece.teachers, workplace, piece.label
        return cls(config, recipe, piece.directory, piece.stage, *refs, *more)


class FineTuningFailed(RuntimeError):
    """Ray Train gave up; the message names the stage and the cause."""
