"""Rounds: subset minima in parallel, then their aggregate; written down, and read back where that is done."""

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
    """The rounds of one run."""

    def __init__(self, run: Run, plan: Plan, decisions: Decisions) -> None:
        self._config, self._directory, self._full_set, self._tell = run.config, run.directory, run.full_set, run.tell
        self._plan, self._decisions = plan, decisions
        self._drawing = plan.drawing(run.config, run.directory)
        self.members: tuple[Leg, ...] = ()  # of the last round, that its aggregate is of
        self._before: Start | None = None  # what the round before started from, or was moved to
        self._subsets: dict[int, tuple[Subset, ...]] = {}  # of the rounds at work
        self._stream: Stream | None = None  # of rounds that overlap

    def run(self, pool: ActorPool, round: int, start: Start) -> tuple[Leg, dict[str, Any]]:
        """Subset minima in parallel, then their aggregate, and its record: read back if it is there.

        Args:
            start: what the round starts from; after the first, the aggregate that the last call returned. With
                rounds.overlap its members began at the one before, and those of the next begin meanwhile.
        """
        self._cut(round)
        begin = self._before if self._before and self._config.rounds.overlaps else start
        members = self._drawing.members(round, begin, self.members)
        if (record := self._done(round)) is None:
            record = self._make(pool, members, start)
        self._before = start
        self._tidy(round)
        aggregated = {minimum["subset_id"] for minimum in record["minima"]}
        done = (member for member in members if member.subset in aggregated)
        self.members = tuple(dataclasses.replace(member, predecessor=None) for member in done)
        return self._drawing.aggregate(round, FRESH, ()), record  # without what would keep all rounds in memory

    def _cut(self, round: int) -> tuple[Subset, ...]:
        """The subsets of a round, of which the manifest is written."""
        if round not in self._subsets:
            subsets, shares = self._plan.subsets, self._decisions.shares
            if round:
                subsets = cut_subsets(self._config, self._full_set, round, shares=shares)
            self._write_manifest(round, subsets)
            self._subsets = {at: those for at, those in self._subsets.items() if at == round - 1} | {round: subsets}
        return self._subsets[round]

    def _make(self, pool: ActorPool, members: tuple[Leg, ...], start: Start) -> dict[str, Any]:
        """The record of a round's aggregate, by actors, of minima that they find where they are not there yet."""
        config, round, needs = self._config, members[0].round, method_of(self._config.aggregation).needs
        # actors read what lies there
        begin, subsets = members[0].start, self._cut(round)
        given = None if begin.leg else seeded_model(config, self._full_set).state_dict()
        sizes = sorted({len(subset.indices) for subset in subsets})
        which = f"round {round + 1} of {config.rounds.num}: " if config.rounds.num > 1 else ""
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        text = f"{which}{len(subsets)} × {size} examples, {members[0].epochs:.4g} epochs each"
        self._tell(stage_event("subsets", text, round))
        if config.rounds.overlaps:
            return self._make_overlapping(pool, members, start, given)
        keep = self._num_kept(round, at_last=1)  # which aggregates
        members = self._find_minima(pool, members, given, keep=math.inf if needs.parts else keep)
        if parts := self._drawing.parts(members):
            text = f"{config.aggregation.savgm_fraction:g} of each of {len(members)} subsets once more"
            self._tell(stage_event("subsamples", text, round))
            parts = self._find_minima(pool, parts, given, keep=keep)
            members = tuple(part.members[0] for part in parts)
        return self._aggregate(pool, self._drawing.aggregate(round, start, members + parts), given)

    def _make_overlapping(
        self, pool: ActorPool, members: tuple[Leg, ...], start: Start, given: Weights | None
    ) -> dict[str, Any]:
        """Return the record, as _make() does, while members of the next round start from their own minima."""
        pieces, next_round = self._pieces(members), members[0].round + 1
        self._check_begins(pieces)
        if self._stream is None:
            self._stream = Stream(pool, given, per_actor=self._decisions.per_actor(pool, pieces))
        self._stream.add(pieces)
        is_last = next_round == self._config.rounds.num
        if not is_last and self._done(next_round) is None:
            self._cut(next_round)
            self._stream.add(self._pieces(self._drawing.members(next_round, start, members)))
        self._stream.find(pieces)
        leg = self._drawing.aggregate(next_round - 1, start, members)
        if is_last:
            self._stream.close()
            return self._aggregate(pool, leg, None)
        return self._tell_of(self._stream.aggregate(self._aggregation(leg)))

    def _num_kept(self, round: int, *, at_last: float) -> float:
        """Actors that stay when a piece of the round's work is done: all, but so many at last."""
        return math.inf if round + 1 < self._config.rounds.num else at_last

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

    def _pieces(self, legs: Sequence[Leg]) -> list[Piece]:
        """The pieces of a round's minimizations, with their subsets."""
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
        """Those whose minima are found: all, but with a quorum."""
        pieces = self._pieces(legs)
        self._check_begins(pieces)
        found = find_minima(
            pool,
            pieces,
            None if self._config.subsets.start == "independent" else start,
            keep=keep,
            quorum=self._config.actors.quorum,
            per_actor=self._decisions.per_actor(pool, pieces),
        )
        done = {piece.folder for piece in found}
        return tuple(leg for leg in legs if leg.piece.folder in done)

    def _check_begins(self, pieces: Sequence[Piece]) -> None:
        """Look whether the optimizer states and minima of before that unfinished members begin with are there.

        Raises:
            CorruptFile: if one is gone, or has another length.
        """
        paths, round = [piece.optimizer[1] for piece in pieces if piece.optimizer], pieces[0].round
        paths += [piece.moved.weights_path for piece in pieces if piece.moved]
        if not paths or len(done_of(pieces)) == len(pieces):  # then they may be deleted
            return
        last = self._directory.read_json(aggregate_path(round - 1))
        files = [last["files"], *(minimum["files"] for minimum in last["minima"])]
        seals = {path: seal for of_one in files for path, seal in of_one.items()}
        self._directory.check_lengths({path: seals.get(path, "") for path in paths})

    def _aggregate(self, pool: ActorPool, leg: Leg, start: Weights | None) -> dict[str, Any]:
        """One set of weights of a round's minima, by an actor; written down before it is used."""
        keep = self._num_kept(leg.round, at_last=float(self._decisions.may_go_alone))
        ((_, record),) = pool.run([Pack((self._aggregation(leg),))], start, keep=keep)
        return self._tell_of(record)

    def _aggregation(self, leg: Leg) -> AggregatePiece:
        """The aggregation of a round whose minima are there, with what their records say; told."""
        piece, method = leg.piece, self._config.aggregation.method
        assert isinstance(piece, AggregatePiece)
        self._tell(stage_event("aggregation", f"{method} of {len(piece.members)} minima", leg.round))
        num_outputs, num_parameters = self._full_set.spec.num_outputs, self._plan.num_parameters
        records, others = (
            [self._directory.read_json(one.output.record_path) for one in of_kind]
            for of_kind in (piece.members, piece.parts)
        )
        for record in records:
            ratio = overdetermination_ratio(record["num_examples"], num_outputs, num_parameters)
            record["overdetermination_ratio"] = ratio
        return dataclasses.replace(piece, more={"minima": records} | ({"subsamples": others} if others else {}))

    def _tell_of(self, record: dict[str, Any]) -> dict[str, Any]:
        """Tell what an aggregate came to; its record."""
        made, round = record["aggregation"], record["round"]
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
        return record

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
