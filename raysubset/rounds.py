"""Rounds: subset minima in parallel, then their aggregate; written down, and read back where that is done."""

import dataclasses
import logging
import math
from typing import Any

from raysubset.aggregation import mean_optimizer_state, method_of
from raysubset.decisions import Decisions
from raysubset.errors import listed
from raysubset.events import AggregateDone, Note, stage_event
from raysubset.node_speeds import slot_of
from raysubset.planning import Plan, manifest
from raysubset.quality import metrics_in_words
from raysubset.run_directory import (
    CorruptFile,
    aggregate_path,
    aggregate_weights_path,
    mean_optimizer_path,
    minima_folder,
    minimum_folder,
    momentum_path,
    optimizer_path,
    subsamples_folder,
    subsets_path,
)
from raysubset.subset_actors import ActorPool, Pack, done_of, find_minima
from raysubset.subsets import Subset, overdetermination_ratio
from raysubset.training import MEASURES, Weights
from raysubset.work import AggregatePiece, Output, Piece, Run, cut_subsample, cut_subsets, round_spans

logger = logging.getLogger(__name__)


class Rounds:
    """The rounds of one run."""

    def __init__(self, run: Run, plan: Plan, decisions: Decisions) -> None:
        self._config, self._directory, self._full_set, self._tell = run.config, run.directory, run.full_set, run.tell
        self._plan, self._decisions = plan, decisions
        self._spans = round_spans(run.config, run.config.rounds.num)

    def run(self, pool: ActorPool, round: int, start: Weights | Output, start_id: str) -> tuple[Output, dict[str, Any]]:
        """Subset minima in parallel, then their aggregate: where it lies and its record, read back if it is there.

        Args:
            start: the weights the members start from, or where they lie.
            start_id: names them: minima with equal ids share a start.
        """
        config, directory = self._config, self._directory
        subsets = self._plan.subsets
        if round:
            subsets = cut_subsets(config, self._full_set, round, shares=self._decisions.shares)
        self._write_manifest(round, subsets)
        if (done := self._done(round)) is not None:
            self._tidy(round)
            return Output.of_aggregate(directory, round), done
        sizes = sorted({len(subset.indices) for subset in subsets})
        which = f"round {round + 1} of {config.rounds.num}: " if config.rounds.num > 1 else ""
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        self._tell(
            stage_event(
                "subsets",
                f"{which}{len(subsets)} × {size} examples, {self._epochs(round):.4g} epochs each",
                round,
            )
        )
        lies, given = (start, None) if isinstance(start, Output) else (None, start)  # actors read what lies there
        pieces = [self._piece(round, subset, start_id, lies) for subset in subsets]
        parts: list[Piece] = []
        pieces = self._find_minima(pool, pieces, given)
        if method_of(config.aggregation).needs.parts:
            parts = self._on_subsamples(pool, subsets, pieces, given)
            done = {part.subset_id for part in parts}
            pieces = [piece for piece in pieces if piece.subset_id in done]
        made = self._aggregate(pool, round, pieces, parts, given, lies)
        self._tidy(round)
        return made

    def _done(self, round: int) -> dict[str, Any] | None:
        """The record of a round's aggregate; its files have served if the next round's aggregate is there."""
        path = aggregate_path(round)
        if round + 1 < self._config.rounds.num and self._directory.exists(aggregate_path(round + 1)):
            return self._directory.read_json_or_none(path)
        return self._directory.read_record(path)

    def _tidy(self, round: int) -> None:
        """Delete what nothing reads once a round's aggregate is there: the optimizer states that its members began
        with, and minima of rounds that are not to be kept, with the weights that only they began from."""
        directory, keep = self._directory, self._config.rounds.keep_minima
        if round and self._config.rounds.optimizer_state != "reset":
            for path in (*directory.list(minima_folder(round - 1), recursive=True), mean_optimizer_path(round - 1)):
                if path.endswith("/optimizer.pt"):
                    directory.delete(path)
        if keep is not None and (gone := round - max(keep, 1)) >= 0:
            self._delete_minima(gone)
            if gone:
                for path in (aggregate_weights_path(gone - 1), momentum_path(gone - 1)):
                    directory.delete(path)

    def finish(self) -> None:
        """Delete the last round's minima too, if none are to stay: their records are in the aggregate's."""
        if self._config.rounds.keep_minima == 0:
            self._delete_minima(self._config.rounds.num - 1)

    def _delete_minima(self, round: int) -> None:
        for path in (minima_folder(round), subsamples_folder(round)):
            self._directory.delete(path)

    def _find_minima(self, pool: ActorPool, pieces: list[Piece], start: Weights | None) -> list[Piece]:
        """Those whose minima are found: all, but with a quorum."""
        config, round = self._config, pieces[0].round
        if round and config.rounds.optimizer_state != "reset":
            pieces = self._with_optimizers(round, pieces)
        parts_follow = method_of(config.aggregation).needs.parts and not pieces[0].is_subsample
        return find_minima(
            pool,
            pieces,
            None if config.subsets.start == "independent" else start,
            keep=math.inf if parts_follow or round + 1 < config.rounds.num else 1,  # which aggregates
            quorum=config.actors.quorum,
            per_actor=self._decisions.per_actor(pool, pieces),
        )

    def _on_subsamples(
        self, pool: ActorPool, subsets: tuple[Subset, ...], pieces: list[Piece], start: Weights | None
    ) -> list[Piece]:
        """Minimize on a part of each subset too, from the same start; those that are done."""
        fraction, by_id = self._config.aggregation.savgm_fraction, {subset.id: subset for subset in subsets}
        text = f"{fraction:g} of each of {len(pieces)} subsets once more"
        self._tell(stage_event("subsamples", text, pieces[0].round))
        parts = []
        for piece in pieces:
            assert piece.subset_id is not None
            indices = cut_subsample(self._config, by_id[piece.subset_id], piece.round)
            part = dataclasses.replace(piece, indices=indices, statistics=(), is_subsample=True)
            parts.append(dataclasses.replace(part, send="float32", optimizer=None))
        return self._find_minima(pool, parts, start)

    def _piece(self, round: int, subset: Subset, start_id: str, start: Output | None) -> Piece:
        """The work on one subset."""
        independent = self._config.subsets.start == "independent"
        slots = self._decisions.slots
        return Piece(
            self._config,
            self._directory,
            "subsets",
            subset_id=subset.id,
            round=round,
            indices=subset.indices,
            epochs=self._epochs(round),
            schedule_span=self._spans[round],
            start=None if independent else start,
            start_id=f"independent-{subset.id}" if independent else start_id,
            node_speed=slot_of(slots, subset.id).speed if slots else None,
            statistics=self._plan.statistics,
            measures=MEASURES if self._config.rounds.evaluated(round) else (),
            send=self._config.rounds.send if round + 1 < self._config.rounds.num else "float32",
        )

    def _epochs(self, round: int) -> float:
        """Of each member of the round."""
        rounds, (begin, end) = self._config.rounds, self._spans[round]
        share = rounds.num * (end - begin) if rounds.lengths == "quadratic" else 1.0
        return self._config.minimize.epochs * share

    def _with_optimizers(self, round: int, pieces: list[Piece]) -> list[Piece]:
        """The members with the optimizer states that they begin with: their predecessors', or the mean of all.

        Those that are done get none: it is deleted when their round is aggregated.
        """
        directory, done, mean = self._directory, done_of(pieces), mean_optimizer_path(round - 1)
        if len(done) == len(pieces):
            return pieces
        if self._config.rounds.optimizer_state == "keep":
            left = set(self._optimizers(round - 1))
            paths = {piece.folder: optimizer_path(minimum_folder(round - 1, piece.subset_id or 0)) for piece in pieces}
        else:
            if not directory.exists(mean):
                states = (directory.read_checkpoint(member)["optimizer"] for member in self._optimizers(round - 1))
                directory.write_checkpoint(mean, {"optimizer": mean_optimizer_state(states)}, is_durable=False)
            left, paths = {mean}, {piece.folder: mean for piece in pieces}
        return [
            dataclasses.replace(piece, optimizer=(directory, path))
            if piece.folder not in done and (path := paths[piece.folder]) in left
            else piece
            for piece in pieces
        ]

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

    def _aggregate(
        self,
        pool: ActorPool,
        round: int,
        pieces: list[Piece],
        parts: list[Piece],
        start: Weights | None,
        lies: Output | None,
    ) -> tuple[Output, dict[str, Any]]:
        """One set of weights of a round's minima, by an actor; written down before it is used.

        Args:
            pieces: whose minima they are; parts on a part of the same subsets, if any.
            start: what they started from, or `lies` where it lies.
        """
        config, directory = self._config, self._directory
        self._tell(stage_event("aggregation", f"{config.aggregation.method} of {len(pieces)} minima", round))
        num_outputs, num_parameters = self._full_set.spec.num_outputs, self._plan.num_parameters
        records, others = (
            [directory.read_json(piece.output.record_path) for piece in of_kind] for of_kind in (pieces, parts)
        )
        for record in records:
            ratio = overdetermination_ratio(record["num_examples"], num_outputs, num_parameters)
            record["overdetermination_ratio"] = ratio
        momentum = None
        if round and config.rounds.has_outer_step():
            momentum = Output(directory, aggregate_path(round - 1), momentum_path(round - 1))
        piece = AggregatePiece(
            config,
            directory,
            tuple(dataclasses.replace(piece, indices=None) for piece in pieces),
            round,
            parts=tuple(dataclasses.replace(part, indices=None) for part in parts),
            start=lies,
            momentum=momentum,
            measures=MEASURES if config.rounds.evaluated(round) else (),
            more={"minima": records} | ({"subsamples": others} if parts else {}),
        )
        ((_, record),) = pool.run([Pack((piece,))], start, keep=self._num_kept(round))
        self._tell_of(record["aggregation"], round)
        return piece.output, record

    def _num_kept(self, round: int) -> float:
        """Actors that stay when the round is done: for the next one, or to fine-tune."""
        return math.inf if round + 1 < self._config.rounds.num else float(self._decisions.may_go_alone)

    def _tell_of(self, made: dict[str, Any], round: int) -> None:
        text = f"{made['method']} of subsets {listed([str(subset) for subset in made['subset_ids']], most=16)}"
        if validation := made["validation"]:
            quality = self._full_set.quality
            best, ensemble = (quality.show(made[name][quality.name]) for name in ("best_member", "ensemble"))
            barrier = "not finite" if made["barrier"] is None else f"{made['barrier']:+.4f}"
            text += (
                f": validation {metrics_in_words(validation, quality)}; best member {best}, ensemble {ensemble}, "
                f"barrier {barrier}"
            )
        self._tell(AggregateDone(text, round, made))
        if of_first := made["of_first"]:
            text = f"not averaged, as members of subset {made['subset_ids'][0]} have it: {listed(of_first)}"
            self._tell(Note(text))
        if not made["shared_start"] and method_of(self._config.aggregation).needs.shared_start:
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
            self._directory.write_table(path, table, is_durable=False)
        except CorruptFile as error:
            logger.warning("%s; it is written again", error)
            self._directory.write_table(path, table, is_durable=False)
        else:
            if written.equals(table, check_metadata=True):
                return
            raise ValueError(
                f"{path} in {self._directory.uri} names other examples than the data now give: what is behind "
                f"{self._config.data.name} has changed; choose another --name, or start over with --fresh"
            )
