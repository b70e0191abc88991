"""Rounds finds the subset minima of each round in parallel, aggregates them, and reads back what is done."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from raysubset.aggregation import method_of
from raysubset.decisions import Decisions
from raysubset.errors import listed
from raysubset.events import AggregateDone, Note, stage_event
from raysubset.legs import FRESH, Leg, Start
from raysubset.node_speeds import slot_of
from raysubset.overlapping import Stream
from raysubset.planning import Plan, manifest
from raysubset.quality import metrics_in_words
from raysubset.run_directory import (
    CorruptFile,
    aggregate_path,
    aggregate_weights_path,
    mean_optimizer_path,
    minima_folder,
    momentum_path,
    subsamples_folder,
    subsets_path,
)
from raysubset.subset_actors import ActorPool, Pack, done_of, find_minima
from raysubset.subsets import Subset, overdetermination_ratio
from raysubset.training import Weights
from raysubset.work import AggregatePiece, Piece, Run, cut_subsets, seeded_model

logger = logging.getLogger(__name__)


class Rounds:
    """Does the rounds of one run."""

    def __init__(self, run: Run, plan: Plan, decisions: Decisions) -> None:
        self._config, self._directory, self._full_set, self._tell = run.config, run.directory, run.full_set, run.tell
        self._plan, self._decisions = plan, decisions
        self._drawing = plan.drawing(run.config, run.directory)
        self.members: tuple[Leg, ...] = ()  # the aggregated members of the last round
        self._last_start: Start | None = None  # the start of the round before
        self._subsets: dict[int, tuple[Subset, ...]] = {}  # of the rounds at work
        self._stream: Stream | None = None  # of rounds that overlap

    def run(self, pool: ActorPool, round: int, start: Start) -> tuple[Leg, dict[str, Any]]:
        """Find the round's subset minima in parallel and aggregate them, or read the aggregate back if it is done.

        Args:
            start: the start of the round: after the first, the aggregate that the last call returned. With
                rounds.overlap the members start from the aggregate before it, and those of the next round start
                before this round's aggregate is done.

        Returns:
            The aggregate's leg, without its members (which would keep all rounds in memory), and its record.
        """
        self._cut(round)
        members_start = self._last_start if self._last_start and self._config.rounds.overlaps else start
        members = self._drawing.members(round, members_start, self.members)
        if (record := self._read(round)) is None:
            record = self._aggregate_round(pool, members, start)
        self._last_start = start
        self._tidy(round)
        subset_ids = {minimum["subset_id"] for minimum in record["minima"]}
        aggregated = (member for member in members if member.subset in subset_ids)
        self.members = tuple(dataclasses.replace(member, predecessor=None) for member in aggregated)
        return self._drawing.aggregate(round, FRESH, ()), record

    def _cut(self, round: int) -> tuple[Subset, ...]:
        """Return the subsets of a round, after writing their manifest."""
        if round not in self._subsets:
            subsets, shares = self._plan.subsets, self._decisions.shares
            if round:
                subsets = cut_subsets(self._config, self._full_set, round, shares=shares)
            self._write_manifest(round, subsets)
            last = {other: cut for other, cut in self._subsets.items() if other == round - 1}
            self._subsets = last | {round: subsets}
        return self._subsets[round]

    def _aggregate_round(self, pool: ActorPool, members: tuple[Leg, ...], start: Start) -> dict[str, Any]:
        """Have actors find the round's missing minima and aggregate all of them; return the aggregate's record."""
        config, round, needs = self._config, members[0].round, method_of(self._config.aggregation).needs
        subsets = self._cut(round)
        # actors read a start that is in storage themselves
        weights = None if members[0].start.leg else seeded_model(config, self._full_set).state_dict()
        sizes = sorted({len(subset.indices) for subset in subsets})
        which = f"round {round + 1} of {config.rounds.num}: " if config.rounds.num > 1 else ""
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        text = f"{which}{len(subsets)} × {size} examples, {members[0].epochs:.4g} epochs each"
        self._tell(stage_event("subsets", text, round))
        if config.rounds.overlaps:
            return self._aggregate_overlapping(pool, members, start, weights)
        keep = self._num_kept(round, at_last=1)  # one aggregates
        members = self._find_minima(pool, members, weights, keep=math.inf if needs.parts else keep)
        if parts := self._drawing.parts(members):
            text = f"{config.aggregation.savgm_fraction:g} of each of {len(members)} subsets once more"
            self._tell(stage_event("subsamples", text, round))
            parts = self._find_minima(pool, parts, weights, keep=keep)
            members = tuple(part.members[0] for part in parts)
        return self._aggregate(pool, self._drawing.aggregate(round, start, members + parts), weights)

    def _aggregate_overlapping(
        self, pool: ActorPool, members: tuple[Leg, ...], start: Start, weights: Weights | None
    ) -> dict[str, Any]:
        """Do as _aggregate_round(), while members of the next round start from their own minima."""
        pieces, next_round = self._pieces(members), members[0].round + 1
        self._check_starts(pieces)
        if self._stream is None:
            self._stream = Stream(pool, weights, per_actor=self._decisions.per_actor(pool, pieces))
        self._stream.add(pieces)
        is_last = next_round == self._config.rounds.num
        if not is_last and self._read(next_round) is None:
            self._cut(next_round)
            self._stream.add(self._pieces(self._drawing.members(next_round, start, members)))
        self._stream.find(pieces)
        leg = self._drawing.aggregate(next_round - 1, start, members)
        if is_last:
            self._stream.close()
            return self._aggregate(pool, leg, None)
        return self._report(self._stream.aggregate(self._aggregation(leg)))

    def _num_kept(self, round: int, *, at_last: float) -> float:
        """Return how many idle actors stay for the next work: all of them, in the last round `at_last`."""
        return math.inf if round + 1 < self._config.rounds.num else at_last

    def _read(self, round: int) -> dict[str, Any] | None:
        """Return the record of a round's aggregate, or None.

        Its files are checked too, unless the next round's aggregate exists: then nothing reads them any more.
        """
        path = aggregate_path(round)
        if round + 1 < self._config.rounds.num and self._directory.exists(aggregate_path(round + 1)):
            return self._directory.read_json_or_none(path)
        return self._directory.read_record(path)

    def _tidy(self, round: int) -> None:
        """Delete files that nothing reads after a round's aggregate: the optimizer states from which its members
        started, and the minima of rounds beyond rounds.keep_minima, with the weights from which only they started."""
        directory, keep = self._directory, self._config.rounds.keep_minima
        if round and self._config.rounds.optimizer_state != "reset":
            for path in (*directory.list(minima_folder(round - 1), recursive=True), mean_optimizer_path(round - 1)):
                if path.endswith("/optimizer.pt"):
                    directory.delete(path)
        if keep is not None and (old_round := round - max(keep, 1)) >= 0:
            self._delete_minima(old_round)
            if old_round:
                for path in (aggregate_weights_path(old_round - 1), momentum_path(old_round - 1)):
                    directory.delete(path)

    def finish(self) -> None:
        """Delete the last round's minima if rounds.keep_minima is 0. The aggregate's record includes theirs."""
        if self._config.rounds.keep_minima == 0:
            self._delete_minima(self._config.rounds.num - 1)

    def _delete_minima(self, round: int) -> None:
        for path in (minima_folder(round), subsamples_folder(round)):
            self._directory.delete(path)

    def _pieces(self, legs: Sequence[Leg]) -> list[Piece]:
        """Return the pieces of a round's minimizations, with their subsets."""
        subsets, slots = self._subsets[legs[0].round], self._decisions.slots

        def with_subset(leg: Leg) -> Piece:
            assert isinstance(leg.piece, Piece)
            assert leg.subset is not None
            speed = slot_of(slots, leg.subset).speed if slots else None
            return dataclasses.replace(leg.piece, indices=subsets[leg.subset].indices, node_speed=speed)

        return [with_subset(leg) for leg in legs]

    def _find_minima(
        self, pool: ActorPool, legs: tuple[Leg, ...], start: Weights | None, *, keep: float
    ) -> tuple[Leg, ...]:
        """Return the legs that have minima: all of them, or with a quorum at least that many."""
        pieces = self._pieces(legs)
        self._check_starts(pieces)
        pieces_done = find_minima(
            pool,
            pieces,
            None if self._config.subsets.start == "independent" else start,
            keep=keep,
            quorum=self._config.actors.quorum,
            per_actor=self._decisions.per_actor(pool, pieces),
        )
        folders = {piece.folder for piece in pieces_done}
        return tuple(leg for leg in legs if leg.piece.folder in folders)

    def _check_starts(self, pieces: Sequence[Piece]) -> None:
        """Check that the last round's optimizer states and minima exist from which unfinished members start.

        Raises:
            CorruptFile: if one is gone, or has another length.
        """
        paths, round = [piece.optimizer[1] for piece in pieces if piece.optimizer], pieces[0].round
        paths += [piece.moved.weights_path for piece in pieces if piece.moved]
        if not paths or len(done_of(pieces)) == len(pieces):  # if all are done, the files may be deleted
            return
        aggregate = self._directory.read_json(aggregate_path(round - 1))
        records = [aggregate, *aggregate["minima"]]
        seals = {path: seal for record in records for path, seal in record["files"].items()}
        self._directory.check_lengths({path: seals.get(path, "") for path in paths})

    def _aggregate(self, pool: ActorPool, leg: Leg, start: Weights | None) -> dict[str, Any]:
        """Have an actor aggregate a round's minima, and return the record of the weights, which are in storage."""
        keep = self._num_kept(leg.round, at_last=float(self._decisions.may_go_alone))
        pack, later = Pack((self._aggregation(leg),)), (self._config.rounds.num - 1 - leg.round) * len(leg.members)
        ((_, record),) = pool.run([pack], start, keep=keep, num_in_later_rounds=later)
        return self._report(record)

    def _aggregation(self, leg: Leg) -> AggregatePiece:
        """Return the aggregation of a round that has all its minima, with their records, and report its start."""
        piece, method = leg.piece, self._config.aggregation.method
        assert isinstance(piece, AggregatePiece)
        self._tell(stage_event("aggregation", f"{method} of {len(piece.members)} minima", leg.round))
        num_outputs, num_parameters = self._full_set.spec.num_outputs, self._plan.num_parameters
        records, part_records = (
            [self._directory.read_json(minimization.output.record_path) for minimization in minimizations]
            for minimizations in (piece.members, piece.parts)
        )
        for record in records:
            ratio = overdetermination_ratio(record["num_examples"], num_outputs, num_parameters)
            record["overdetermination_ratio"] = ratio
        more = {"minima": records} | ({"subsamples": part_records} if part_records else {})
        return dataclasses.replace(piece, more=more)

    def _report(self, record: dict[str, Any]) -> dict[str, Any]:
        """Report an aggregate, and return its record."""
        aggregation, round = record["aggregation"], record["round"]
        subset_ids = [str(subset_id) for subset_id in aggregation["subset_ids"]]
        text = f"{aggregation['method']} of subsets {listed(subset_ids, most=16)}"
        if validation := aggregation["validation"]:
            quality = self._full_set.quality
            best, ensemble = (quality.show(aggregation[name][quality.name]) for name in ("best_member", "ensemble"))
            barrier = "not finite" if aggregation["barrier"] is None else f"{aggregation['barrier']:+.4f}"
            text += (
                f": validation {metrics_in_words(validation, quality)}; best member {best}, ensemble {ensemble}, "
                f"barrier {barrier}"
            )
        self._tell(AggregateDone(text, round, aggregation))
        if of_first := aggregation["of_first"]:
            self._tell(Note(f"not averaged, but taken from the member of subset {subset_ids[0]}: {listed(of_first)}"))
        if not aggregation["shared_start"] and method_of(self._config.aggregation).needs.shared_start:
            text = "this mean is of minima that share no start, which aggregation.allow_independent permits"
            self._tell(Note(text, is_warning=True))
        return record

    def _write_manifest(self, round: int, subsets: tuple[Subset, ...]) -> None:
        """Write which examples each subset has. If the manifest is there, compare it.

        Raises:
            ValueError: if a run of the same name used other data.
        """
        table, path = manifest(subsets, self._full_set), subsets_path(round)
        try:
            stored = self._directory.read_table(path)
        except FileNotFoundError:
            self._directory.write_table(path, table, is_durable=False)
        except CorruptFile as error:
            logger.warning("%s; it is written again", error)
            self._directory.write_table(path, table, is_durable=False)
        else:
            if stored.equals(table, check_metadata=True):
                return
            raise ValueError(
                f"{path} in {self._directory.uri} names other examples than the data now give: the content of "
                f"{self._config.data.name} has changed; choose another --name, or start over with --fresh"
            )
