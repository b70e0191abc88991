"""Drawing: the method, drawn once as legs. A run does them, an arm scales them, a plan sums them up."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from raysubset.aggregation import method_of
from raysubset.config import Config, TrainingStage
from raysubset.legs.leg import Leg, LegKind, Start
from raysubset.run_directory import RunDirectory
from raysubset.training import MEASURES
from raysubset.work import round_spans, subsample_size

FRESH = Start("fresh")


@dataclass(frozen=True)
class Drawing:
    """[trunk] → rounds × (members → [their subsamples] → aggregate) → fine-tuning, or a conventional run."""

    config: Config
    place: RunDirectory | str | None  # of its legs
    sizes: Sequence[int] = ()  # of the subsets, by id
    statistics: tuple[str, ...] = ()  # kinds that members leave for the aggregation
    scale: float = 1.0  # what all stages' epochs are multiplied by
    is_lean: bool = False
    """Measured on validation data alone, and fine-tuned without looks at it on the way unless the config needs them: as
    a comparison does, which has evaluation on top of a budget."""
    aggregates: bool = True  # else the only subset's minimum stands for the aggregate

    def legs(self, *, num_workers: int = 1) -> Iterator[Leg]:
        """All legs of subset pretraining, inputs first.

        Args:
            num_workers: of fine-tuning.
        """
        start, members, rounds = FRESH, tuple[Leg, ...](), self.config.rounds
        if self.config.trunk.epochs:
            start = Start("warm", self.trunk())
            yield from start.legs
        before = start
        for round in range(rounds.num):
            members = self.members(round, before if rounds.overlaps else start, members)
            parts = self.parts(members)
            yield from (*members, *parts)
            last = members[0]
            if self.aggregates:
                last = self.aggregate(round, start, members + parts)
                yield last
            before, start = start, Start("warm", last)
        if self.config.fine_tuning.epochs:
            yield self.fine_tuning(start, members, num_workers=num_workers)

    def conventional(self, epochs: float, *, num_workers: int) -> Leg:
        """The one leg of a conventional run."""
        return self._on_full_set("conventional", epochs, FRESH, num_workers)

    def trunk(self) -> Leg:
        """The short run on the full set that all members start from."""
        return self._on_full_set("trunk", self.config.trunk.epochs * self.scale, FRESH, self.config.trunk.num_workers)

    def members(self, round: int, start: Start, before: Sequence[Leg]) -> tuple[Leg, ...]:
        """The minimizations of a round, a subset each.

        Args:
            start: what its shared start is made of; with rounds.overlap the aggregate before the last.
            before: the members of the round before, as far as they are aggregated.
        """
        rounds, (begin, end) = self.config.rounds, self._spans[round]
        share = rounds.num * (end - begin) if rounds.lengths == "quadratic" else 1.0
        independent = self.config.subsets.start == "independent"
        predecessors = {leg.subset: leg for leg in before if rounds.overlaps or rounds.optimizer_state == "keep"}
        return tuple(
            self._leg(
                "minimize",
                "subsets",
                self.config.minimize.epochs * self.scale * share,
                Start("independent") if independent else start,
                size=size,
                round=round,
                subset=subset,
                span=(begin, end),
                predecessor=predecessors.get(subset),
                statistics=self.statistics,
            )
            for subset, size in enumerate(self.sizes)
        )

    def parts(self, members: Sequence[Leg]) -> tuple[Leg, ...]:
        """The members once more on a part of their subsets, where the aggregation needs it, on the same devices."""
        if not (self.aggregates and method_of(self.config.aggregation).needs.parts):
            return ()
        return tuple(
            replace(
                member,
                members=(member,),
                is_subsample=True,
                statistics=(),
                size=subsample_size(self.config, member.size or 0),
            )
            for member in members
        )

    def aggregate(self, round: int, start: Start, members: tuple[Leg, ...]) -> Leg:
        """The aggregation of members, and of their parts, which began at this start."""
        return self._leg("aggregate", "subsets", 0.0, start, round=round, members=members)

    def fine_tuning(self, start: Start, members: tuple[Leg, ...], *, num_workers: int) -> Leg:
        """The training on the full set that follows, from what start is made of, with the last members as teachers."""
        tuning = self.config.fine_tuning
        return self._on_full_set(
            "fine_tuning",
            tuning.epochs * self.scale,
            replace(start, kind=tuning.start),
            num_workers,
            by_train=not self.is_lean or tuning.keep == "best" or tuning.distillation > 0,
            members=members if tuning.distillation else (),
        )

    def _on_full_set(
        self,
        stage: TrainingStage,
        epochs: float,
        start: Start,
        num_workers: int,
        *,
        by_train: bool = False,
        **more: Any,
    ) -> Leg:
        kind = "train" if by_train or num_workers > 1 else "minimize"
        return self._leg(kind, stage, epochs, start, num_workers=num_workers, **more)

    def _leg(
        self, kind: LegKind, stage: TrainingStage, epochs: float, start: Start, *, round: int = 0, **more: Any
    ) -> Leg:
        measures = ("validation",) if self.is_lean else MEASURES
        if stage == "subsets" and not self.config.rounds.evaluated(round):
            measures = ()
        return Leg(self.place, kind, self.config, stage, epochs, start, round=round, measures=measures, **more)

    @cached_property
    def _spans(self) -> Sequence[tuple[float, float]]:
        return round_spans(self.config, self.config.rounds.num)
