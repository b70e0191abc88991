"""Rounds: subset minima in parallel, then their aggregate; written down, and read back where that is done."""

import dataclasses
import logging
from typing import Any

from raysubset.aggregation import Aggregation, Minimum, Unmeasured, mean_optimizer_state
from raysubset.decisions import Decisions
from raysubset.errors import listed
from raysubset.events import AggregateDone, Note, stage_event
from raysubset.node_speeds import slot_of
from raysubset.planning import Plan, cut_subsample, cut_subsets, manifest
from raysubset.run_directory import (
    CorruptFile,
    aggregate_path,
    aggregate_weights_path,
    mean_optimizer_path,
    minimum_folder,
    minimum_path,
    momentum_path,
    optimizer_path,
    subsample_folder,
    subsets_path,
)
from raysubset.scoring import ScoringPlace
from raysubset.subset_actors import ActorPool, find_minima
from raysubset.subsets import Subset, overdetermination_ratio
from raysubset.training import MEASURES, Weights
from raysubset.work import Piece, Round, Run

logger = logging.getLogger(__name__)


class Rounds:
    """The rounds of one run."""

    def __init__(self, run: Run, plan: Plan, decisions: Decisions, scoring: ScoringPlace) -> None:
        self._config, self._directory, self._full_set, self._tell = run.config, run.directory, run.full_set, run.tell
        self._plan, self._decisions, self._scoring = plan, decisions, scoring

    def run(self, pool: ActorPool, round: int, start: Weights, start_id: str) -> tuple[Weights, dict[str, Any]]:
        """Subset minima in parallel, then their aggregate: weights and record, read back where they are there.

        Args:
            start: the weights the members start from.
            start_id: names them: minima with equal ids share a start.
        """
        config, directory = self._config, self._directory
        subsets = self._plan.subsets
        if round:
            subsets = cut_subsets(config, self._full_set, round, shares=self._decisions.shares)
        self._write_manifest(round, subsets)
        if (done := directory.read_record(aggregate_path(round))) is not None:
            return directory.read_weights(aggregate_weights_path(round), done["files"]), done
        sizes = sorted({len(subset.indices) for subset in subsets})
        which = f"round {round + 1} of {config.rounds.num}: " if config.rounds.num > 1 else ""
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        self._tell(
            stage_event("subsets", f"{which}{len(subsets)} × {size} examples, {config.minimize.epochs:g} epochs each")
        )
        pieces = [self._piece(round, subset, start_id) for subset in subsets]
        twice = config.aggregation.method == "savgm"
        minima = self._find_minima(pool, pieces, start, more_to_come=twice)
        if twice:
            minima = self._with_subsamples(pool, minima, subsets, pieces, start)
        return self._aggregate(round, minima, start)

    def _find_minima(
        self, pool: ActorPool, pieces: list[Piece], start: Weights, *, more_to_come: bool = False
    ) -> list[Minimum]:
        config, is_last = self._config, pieces[0].round + 1 == self._config.rounds.num
        return find_minima(
            pool,
            pieces,
            None if config.subsets.start == "independent" else start,
            release=not more_to_come and (is_last or self._decisions.aggregation_num_gpus > 0),
            quorum=config.actors.quorum,
            per_actor=self._decisions.per_actor(pool, pieces),
        )

    def _with_subsamples(
        self,
        pool: ActorPool,
        minima: list[Minimum],
        subsets: tuple[Subset, ...],
        pieces: list[Piece],
        start: Weights,
    ) -> list[Minimum]:
        """Minimize on a part of each subset too, from the same start; those of the minima whose part was done."""
        fraction, ids = self._config.aggregation.savgm_fraction, {minimum.subset_id for minimum in minima}
        self._tell(stage_event("subsamples", f"{fraction:g} of each of {len(minima)} subsets once more"))
        parts = []
        for piece, subset in zip(pieces, subsets, strict=True):
            if subset.id in ids:
                indices = cut_subsample(self._config, subset, piece.round)
                parts.append(dataclasses.replace(piece, indices=indices, statistics=(), is_subsample=True))
        ids = {minimum.subset_id for minimum in self._find_minima(pool, parts, start)}
        return [minimum for minimum in minima if minimum.subset_id in ids]

    def _piece(self, round: int, subset: Subset, start_id: str) -> Piece:
        """The work on one subset."""
        num_rounds = self._config.rounds.num
        independent = self._config.subsets.start == "independent"
        slots = self._decisions.slots
        return Piece(
            "subsets",
            subset_id=subset.id,
            round=round,
            indices=subset.indices,
            schedule_span=(round / num_rounds, (round + 1) / num_rounds),
            start_id=f"independent-{subset.id}" if independent else start_id,
            node_speed=slot_of(slots, subset.id).speed if slots else None,
            optimizer_path=self._optimizer_path(round, subset.id) if round else None,
            statistics=self._plan.statistics,
            measures=MEASURES if self._config.rounds.evaluated(round) else (),
        )

    def _optimizer_path(self, round: int, subset_id: int) -> str | None:
        """The optimizer state that a member of a later round begins with: its predecessor's, the mean, or none."""
        directory, which = self._directory, self._config.rounds.optimizer_state
        if which == "reset":
            return None
        if which == "keep":
            path = optimizer_path(minimum_folder(round - 1, subset_id))
            return path if path in self._optimizers(round - 1) else None
        path = mean_optimizer_path(round - 1)
        if not directory.exists(path):
            members = self._optimizers(round - 1)
            states = (directory.read_checkpoint(member)["optimizer"] for member in members)
            directory.write_checkpoint(path, {"optimizer": mean_optimizer_state(states)})
        return path

    def _optimizers(self, round: int) -> list[str]:
        """The files that a round's members left of their optimizers, in order of subset id; those of its aggregate.

        Raises:
            CorruptFile: if one of them is gone, or has another length.
        """
        left = {}
        for minimum in self._directory.read_json(aggregate_path(round))["minima"]:
            path = optimizer_path(minimum_folder(round, minimum["subset_id"]))
            left[path] = minimum["files"].get(path)
        self._directory.check_lengths(left)
        return list(left)

    def _momentum(self, round: int) -> Weights:
        """The outer step's, after a round."""
        files = self._directory.read_json(aggregate_path(round))["files"]
        return self._directory.read_weights(momentum_path(round), files)

    def _aggregate(self, round: int, minima: list[Minimum], start: Weights) -> tuple[Weights, dict[str, Any]]:
        """One set of weights of a round's minima; written down before it is used."""
        config, directory = self._config, self._directory
        self._tell(stage_event("aggregation", f"{config.aggregation.method} of {len(minima)} minima"))
        num_classes, num_parameters = self._full_set.num_classes, self._plan.num_parameters
        records = [
            directory.read_json(minimum_path(minimum_folder(round, minimum.subset_id)))
            | {"overdetermination_ratio": overdetermination_ratio(minimum.num_examples, num_classes, num_parameters)}
            for minimum in minima
        ]
        members: dict[str, Any] = {"minima": records}
        if config.aggregation.method == "savgm":
            folders = [subsample_folder(round, minimum.subset_id) for minimum in minima]
            members["subsamples"] = [directory.read_json(minimum_path(folder)) for folder in folders]
        carried = bool(round) and config.rounds.has_outer_step()
        momentum = self._momentum(round - 1) if carried else {}
        measures = MEASURES if config.rounds.evaluated(round) else ()
        made, record = self._scoring.aggregate(Round(round, minima, start, momentum, measures, members))
        self._tell_of(made, round)
        return made.aggregate.weights, record

    def _tell_of(self, made: Aggregation | Unmeasured, round: int) -> None:
        members = ", ".join(map(str, made.aggregate.subset_ids))
        text = f"{made.aggregate.method} of subsets {members}"
        if isinstance(made, Aggregation):
            text += (
                f": validation {made.validation.loss:.4f} and {made.validation.accuracy:.2%}; best member "
                f"{made.best_member.accuracy:.2%}, ensemble {made.ensemble.accuracy:.2%}, barrier {made.barrier:+.4f}"
            )
        self._tell(AggregateDone(text, round, made.to_dict()))
        if of_first := made.aggregate.of_first:
            text = f"not averaged, as members of subset {made.aggregate.subset_ids[0]} have it: {listed(of_first)}"
            self._tell(Note(text))
        if not made.aggregate.shared_start and self._config.aggregation.needs_shared_start():
            text = "this mean is of minima that share no start, as aggregation.allow_independent asked"
            self._tell(Note(text, is_warning=True))

    def _write_manifest(self, round: int, subsets: tuple[Subset, ...]) -> None:
        """Write which examples each subset has, or compare with what was written.

        Raises:
            ValueError: if the run was begun with other data under the same name.
        """
        table, path = manifest(subsets, self._full_set), subsets_path(round)
        try:
            written = self._directory.read_table(path)
        except FileNotFoundError:
            self._directory.write_table(path, table)
        except CorruptFile as error:
            logger.warning("%s; it is written again", error)
            self._directory.write_table(path, table)
        else:
            if written.equals(table, check_metadata=True):
                return
            raise ValueError(
                f"{path} in {self._directory.uri} names other examples than the data now give: what is behind "
                f"{self._config.data.name} has changed; choose another --name, or start over with --fresh"
            )
