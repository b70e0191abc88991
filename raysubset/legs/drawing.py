"""Drawing describes the method once, as legs. A run does them, an arm scales them, a plan sums them up."""

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
    """Draws [trunk] → rounds × (members → [their subsamples] → aggregate) → fine-tuning, or a conventional run."""

    config: Config
    place: RunDirectory | str | None  # Leg.place
    sizes: Sequence[int] = ()  # of the subsets, by id
    statistics: tuple[str, ...] = ()  # kinds that members leave for the aggregation
    scale: float = 1.0  # factor of all stages' epochs
    is_lean: bool = False
    """Legs are evaluated on validation data only, and fine-tuning evaluates only at its end unless the config needs
    more. Comparisons do so, because evaluation comes on top of their budgets."""
    label: str = ""  # Leg.label
    aggregates: bool = True  # False: the minimum of the only subset replaces the aggregate

    def legs(self, *, num_workers: int = 1) -> Iterator[Leg]:
        """Yield all legs of subset pretraining, inputs first.

        Args:
            num_workers: of fine-tuning.
        """
        start, members, rounds = FRESH, tuple[Leg, ...](), self.config.rounds
        if self.config.trunk.epochs:
            start = Start("warm", self.trunk())
            yield from start.legs
        last_start = start
        for round in range(rounds.num):
            members = self.members(round, start, members, last_start=last_start)
            parts = self.parts(members)
            yield from (*members, *parts)
            result = members[0]
            if self.aggregates:
                result = self.aggregate(round, start, members + parts)
                yield result
            last_start, start = start, Start("warm", result)
        if self.config.fine_tuning.epochs:
            yield self.fine_tuning(start, members, num_workers=num_workers)

    def conventional(self, epochs: float, *, num_workers: int) -> Leg:
        """Return the one leg of a conventional run."""
        return self._leg("conventional", epochs, FRESH, num_workers=num_workers)

    def trunk(self) -> Leg:
        """Return the short run on the full set from which all members start."""
        trunk = self.config.trunk
        return self._leg("trunk", trunk.epochs * self.scale, FRESH, num_workers=trunk.num_workers)

    def members(
        self, round: int, start: Start, last_members: Sequence[Leg], *, last_start: Start | None = None
    ) -> tuple[Leg, ...]:
        """Return the minimizations of a round, one for each subset.

        Args:
            start: the shared start.
            last_members: the aggregated members of the round before.
            last_start: the start of the round before, from which members start with rounds.overlap; None: of no round.
        """
        rounds, (begin, end) = self.config.rounds, self._spans[round]
        if last_start and rounds.overlaps:
            start = last_start
        share = rounds.num * (end - begin) if rounds.lengths == "quadratic" else 1.0
        independent = self.config.subsets.start == "independent"
        predecessors = {leg.subset: leg for leg in last_members if rounds.overlaps or rounds.optimizer_state == "keep"}
        return tuple(
            self._leg(
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
        """Return the members again, each on a part of its subset; () if the aggregation does not need them."""
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
        """Return the aggregation of members, and of their parts, that started from this start."""
        return self._leg("subsets", 0.0, start, kind="aggregate", round=round, members=members)

    def fine_tuning(self, start: Start, members: tuple[Leg, ...], *, num_workers: int) -> Leg:
        """Return the training on the full set after the last round, whose members teach it if it distils.

        Args:
            start: the last aggregate; fine_tuning.start says what becomes of it.
        """
        tuning = self.config.fine_tuning
        by_train = not self.is_lean or tuning.keep == "best" or tuning.distillation > 0
        return self._leg(
            "fine_tuning",
            tuning.epochs * self.scale,
            replace(start, kind=tuning.start),
            kind="train" if by_train else "minimize",
            num_workers=num_workers,
            members=members if tuning.distillation else (),
        )

    def _leg(
        self,
        stage: TrainingStage,
        epochs: float,
        start: Start,
        *,
        kind: LegKind = "minimize",
        round: int = 0,
        num_workers: int = 1,
        **more: Any,
    ) -> Leg:
        """Return a leg. Several workers make it a Ray Train job."""
        measures = ("validation",) if self.is_lean else MEASURES
        if stage == "subsets" and not self.config.rounds.evaluated(round):
            measures = ()
        more |= {"round": round, "measures": measures, "label": self.label, "num_workers": num_workers}
        return Leg(self.place, "train" if num_workers > 1 else kind, self.config, stage, epochs, start, **more)

    @cached_property
    def _spans(self) -> Sequence[tuple[float, float]]:
        return round_spans(self.config, self.config.rounds.num)
