"""Rounds finds the subset minima of each round in parallel, aggregates them, and reads back what is done."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

from raysubset.aggregation import method_of
from raysubset.errors import counted, listed
from raysubset.events import AggregateDone, MinimaFound, Note, stage_event
from raysubset.legs import FRESH, Leg, Start, needs_of
from raysubset.pipeline.decisions import Decisions
from raysubset.pipeline.node_speeds import slot_of
from raysubset.planning import Plan, manifest
from raysubset.quality import metrics_in_words
from raysubset.run_directory import (
    CorruptFile,
    aggregate_path,
    aggregate_weights_path,
    at_once,
    mean_optimizer_path,
    minima_folder,
    momentum_path,
    subsamples_folder,
    subsets_path,
)
from raysubset.subset_actors import ActorPool, Backlog, Outcome, Pack, in_packs, minimum_done, name_of
from raysubset.subsets import Subset
from raysubset.work import AnyPiece, Piece, Run, cut_subsets, seeded_model

logger = logging.getLogger(__name__)

Legs = tuple[Leg, ...]


class Rounds:
    """Does the rounds of one run.

    All that needs no choice is queued at once, the members of the next round too. They start as soon as what they need
    is done: the last round's aggregate, or with rounds.overlap their own minima and the aggregate before. What happens
    if processes die is said by ActorPool.
    """

    def __init__(self, run: Run, plan: Plan, decisions: Decisions) -> None:
        self._config, self._directory, self._full_set, self._tell = run.config, run.directory, run.full_set, run.tell
        self._plan, self._decisions = plan, decisions
        self._drawing = plan.drawing(run.config, run.directory)
        self.members: Legs = ()  # the aggregated members of the last round
        self._last_start: Start | None = None  # the start of the round before
        self._cut = lru_cache(maxsize=2)(self._new_cut)  # of the rounds at work
        self._chooses = run.config.actors.quorum is not None  # else a round's aggregate is of all members
        self._backlog = Backlog(())  # of all rounds that are not done
        self._results: Iterator[tuple[AnyPiece, Outcome]] | None = None  # of the backlog
        self._held: dict[str, Outcome] = {}  # by names of pieces that are done, and not waited for yet
        self._queued: dict[int, tuple[Legs, Leg | None]] = {}  # by round, its members and aggregate in the backlog
        self._stored: set[Leg] = set()  # legs of these rounds that were done before

    def run(self, pool: ActorPool, round: int, start: Start) -> tuple[Leg, dict[str, Any]]:
        """Find the round's subset minima in parallel and aggregate them, or read the aggregate back if it is done.

        Args:
            start: the start of the round: after the first, the aggregate that the last call returned.

        Returns:
            The aggregate's leg, without its members (which would keep all rounds in memory), and its record.

        Raises:
            SubsetFailed, ValueError: if too many members failed for good.
            TimeoutError, CorruptFile: as ActorPool.results() does.
        """
        self._cut(round)
        members, _ = self._queued.get(round) or (self._members(round, start, self.members, self._last_start), None)
        if (record := self._read(round)) is None:
            record = self._aggregate_round(pool, members, start)
        self._last_start = start
        self._tidy(round)
        subset_ids = {minimum["subset_id"] for minimum in record["minima"]}
        self.members = _apart([member for member in members if member.subset in subset_ids])
        return self._drawing.aggregate(round, FRESH, ()), record

    def _members(self, round: int, start: Start, last_members: Legs, last_start: Start | None) -> Legs:
        return self._drawing.members(round, start, last_members, last_start=last_start)

    def _new_cut(self, round: int) -> tuple[Subset, ...]:
        """Return the subsets of a round, after writing their manifest."""
        subsets = self._plan.subsets
        if round:
            subsets = cut_subsets(self._config, self._full_set, round, shares=self._decisions.shares)
        self._write_manifest(round, subsets)
        return subsets

    def _aggregate_round(self, pool: ActorPool, members: Legs, start: Start) -> dict[str, Any]:
        """Have actors find the round's missing minima and aggregate all of them; return the aggregate's record."""
        config, round = self._config, members[0].round
        sizes = sorted({len(subset.indices) for subset in self._cut(round)})
        which = f"round {round + 1} of {config.rounds.num}: " if config.rounds.num > 1 else ""
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        text = f"{which}{len(members)} × {size} examples, {counted(members[0].epochs, 'epoch')} each"
        self._tell(stage_event("subsets", text, round))
        if self._results is None:
            self._open(pool, members)
        if round not in self._queued:
            self._queue(members, start)
        if not self._chooses and round + 1 < config.rounds.num and self._read(round + 1) is None:
            self._cut(round + 1)
            next_start = Start("warm", self._drawing.aggregate(round, FRESH, ()))
            self._queue(self._members(round + 1, next_start, _apart(members), start), next_start)
        members = self._find(members)
        if parts := self._drawing.parts(members):
            text = f"{config.aggregation.savgm_fraction:g} of each of {len(members)} subsets once more"
            self._tell(stage_event("subsamples", text, round))
            if self._chooses:
                self._add(parts)
            parts = self._find(parts)
            members = tuple(part.members[0] for part in parts)
        text = f"{config.aggregation.method} of {len(members)} minima"
        self._tell(stage_event("aggregation", text, round))
        aggregate = self._queued.pop(round)[1] or self._add_aggregate(members + parts, start)
        ((_, record),) = self._wait((aggregate,))
        if isinstance(record, Exception):
            raise record
        self._report(record)
        return record

    def _open(self, pool: ActorPool, members: Legs) -> None:
        """Begin to give these members and those of later rounds to the pool, in packs of one size."""
        self._per_actor = self._decisions.per_actor(pool, self._pieces(members))
        # actors read a start that is in storage themselves
        weights = None if members[0].start.leg else seeded_model(self._config, self._full_set).state_dict()
        keeps_one = self._decisions.may_go_alone or self._chooses  # which aggregates
        self._results_of_backlog = partial(pool.results, self._backlog, weights, keep=float(keeps_one))
        self._results = self._results_of_backlog()

    def _queue(self, members: Legs, start: Start) -> None:
        """Queue a round: members, and all that needs no choice, their parts if there are any and the aggregate."""
        aggregate = None
        self._add(members)
        if not self._chooses:
            if parts := self._drawing.parts(members):
                self._add(parts)
            aggregate = self._add_aggregate(members + parts, start)
        self._queued[members[0].round] = members, aggregate

    def _add_aggregate(self, members: Legs, start: Start) -> Leg:
        aggregate = self._drawing.aggregate(members[0].round, start, members)
        self._backlog.add([Pack((aggregate.piece,))], needs_of((aggregate,)))
        return aggregate

    def _add(self, legs: Legs) -> None:
        """Queue minimizations. Those whose minima are in storage are done."""
        pieces = self._pieces(legs)
        packs, records = in_packs(pieces, self._per_actor), at_once(Piece.record, pieces)
        self._stored |= {leg for leg, record in zip(legs, records, strict=True) if record is not None}
        folders = {leg.piece.folder for leg in self._stored}
        missing = [tuple(piece for piece in pack.pieces if piece.folder not in folders) for pack in packs]
        self._backlog.num_in_later_rounds = (self._config.rounds.num - 1 - legs[0].round) * len(packs)
        self._backlog.add([Pack(some) for some in missing if some], needs_of(legs))

    def _wait(self, legs: Sequence[Leg]) -> Iterator[tuple[Leg, Outcome]]:
        """Yield these legs, which were queued, as they are done. Others that are done meanwhile are held until then."""
        by_name = {name_of(leg.piece): leg for leg in legs}
        for name in [name for name in self._held if name in by_name]:
            yield by_name.pop(name), self._held.pop(name)
        while by_name:
            assert self._results
            result = next(self._results, None)
            if result is None:  # all was done before more was added
                self._results = self._results_of_backlog()
                result = next(self._results)
            piece, outcome = result
            if leg := by_name.pop(name_of(piece), None):
                yield leg, outcome
            else:
                self._held[name_of(piece)] = outcome

    def _find(self, legs: Legs) -> Legs:
        """Return the legs that have minima: all of them, or with a quorum at least that many."""
        found = self._stored.intersection(legs)
        self._stored -= found
        if found and len(found) < len(legs):
            text = f"{len(found)} of {len(legs)} minima are already there"
            subsets = tuple(leg.subset for leg in found if leg.subset is not None)
            self._tell(MinimaFound(text, legs[0].told_stage, legs[0].round, subsets))
        num_left, least = len(legs), self._config.actors.quorum or len(legs)
        for leg, record in self._wait([leg for leg in legs if leg not in found]):
            piece = leg.piece
            assert isinstance(piece, Piece)
            if isinstance(record, Exception):
                num_left -= 1
                if num_left < least:
                    raise record
                self._tell(Note(f"continuing without {piece.label}: {record}", is_warning=True))
                continue
            found.add(leg)
            self._tell(minimum_done(piece, record, self._full_set.quality, f"{len(found)} of {len(legs)}"))
        return tuple(leg for leg in legs if leg in found)

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
                directory.delete(momentum_path(old_round - 1))
            if self._config.rounds.sends_whole(old_round):  # no aggregate differs from earlier ones any more
                for earlier in reversed(range(old_round)):
                    directory.delete(aggregate_weights_path(earlier))
                    if self._config.rounds.sends_whole(earlier):
                        break

    def finish(self) -> None:
        """Delete the last round's minima if rounds.keep_minima is 0. The aggregate's record includes theirs."""
        if self._config.rounds.keep_minima == 0:
            self._delete_minima(self._config.rounds.num - 1)

    def _delete_minima(self, round: int) -> None:
        for path in (minima_folder(round), subsamples_folder(round)):
            self._directory.delete(path)

    def _pieces(self, legs: Legs) -> list[Piece]:
        """Return the pieces of a round's minimizations, with their subsets."""
        subsets, slots, pieces = self._cut(legs[0].round), self._decisions.slots, list[Piece]()
        for leg in legs:
            assert isinstance(leg.piece, Piece)
            assert leg.subset is not None
            speed = slot_of(slots, leg.subset).speed if slots else None
            pieces.append(dataclasses.replace(leg.piece, indices=subsets[leg.subset].indices, node_speed=speed))
        return pieces

    def _report(self, record: dict[str, Any]) -> None:
        aggregation, quality = record["aggregation"], self._full_set.quality
        subset_ids = [str(subset_id) for subset_id in aggregation["subset_ids"]]
        text = f"{aggregation['method']} of subsets {listed(subset_ids, most=16)}"
        if validation := aggregation["validation"]:
            best, ensemble = (quality.show(aggregation[name][quality.name]) for name in ("best_member", "ensemble"))
            barrier = "not finite" if aggregation["barrier"] is None else f"{aggregation['barrier']:+.4f}"
            text += f": validation {metrics_in_words(validation, quality)}; best member {best}, ensemble {ensemble}, "
            text += f"barrier {barrier}"
        self._tell(AggregateDone(text, record["round"], aggregation))
        if of_first := aggregation["of_first"]:
            self._tell(Note(f"not averaged, but taken from the member of subset {subset_ids[0]}: {listed(of_first)}"))
        if not aggregation["shared_start"] and method_of(self._config.aggregation).needs.shared_start:
            text = "this mean is of minima that share no start, which aggregation.allow_independent permits"
            self._tell(Note(text, is_warning=True))

    def _write_manifest(self, round: int, subsets: tuple[Subset, ...]) -> None:
        """Write which examples each subset has. If the manifest is there, compare it.

        Raises:
            ValueError: if a run of the same name used other data.
        """
        table, path = manifest(subsets, self._full_set), subsets_path(round)
        try:
            stored = self._directory.read_table(path)
        except (FileNotFoundError, CorruptFile) as error:
            if isinstance(error, CorruptFile):
                logger.warning("%s; it is written again", error)
            self._directory.write_table(path, table, is_durable=False)
            return
        if not stored.equals(table, check_metadata=True):
            raise ValueError(
                f"{path} in {self._directory.uri} names other examples than the data now give: the content of "
                f"{self._config.data.name} has changed; choose another --name, or start over with --fresh"
            )


def _apart(members: Sequence[Leg]) -> Legs:
    """Return members without what they needed, which would keep all rounds in memory."""
    return tuple(dataclasses.replace(member, predecessor=None) for member in members)
