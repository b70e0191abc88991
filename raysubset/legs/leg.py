"""Legs: the pieces of work that runs and arms are made of, each with what it needs; equal ones have one name."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from raysubset.aggregation import Send
from raysubset.config import Config, TrainingStage, shaping
from raysubset.ledger import Ledger, Work
from raysubset.run_directory import RunDirectory, mean_optimizer_path, momentum_path, optimizer_path
from raysubset.training import Measure
from raysubset.work import TEST_PATH, AggregatePiece, Output, Piece, TestPiece

LegKind = Literal["minimize", "aggregate", "train"]
StartKind = Literal["fresh", "independent", "warm", "shrink_perturb", "reinit"]


@dataclass(frozen=True)
class Start:
    """The weights a leg starts from."""

    kind: StartKind
    leg: "Leg | None" = None  # whose result it is made of; None for fresh weights

    @property
    def legs(self) -> "tuple[Leg, ...]":
        """Legs whose work it needs. `reinit` needs its leg too: the stage that is thrown away is paid for."""
        return () if self.leg is None else (self.leg,)


@dataclass(frozen=True, eq=False)
class Leg:
    """A minimization in one process, an aggregation, or a Ray Train job."""

    place: RunDirectory | str | None
    """Its run's directory, in which it has a folder; or the path below which it has a directory of its own, named by
    all that its result depends on; None: it is only planned."""
    kind: LegKind
    config: Config
    stage: TrainingStage
    epochs: float  # of what it minimizes on
    start: Start
    size: int | None = None  # examples that it minimizes on, as planned; None: the full set
    round: int = 0
    subset: int | None = None  # None: the full set
    span: tuple[float, float] = (0.0, 1.0)  # of the schedule
    members: "tuple[Leg, ...]" = ()  # what an aggregation is of; of a subsample, its subset's minimum, made before it
    predecessor: "Leg | None" = None  # whose optimizer state, or with rounds.overlap whose way, it goes on with
    num_workers: int = 1
    statistics: tuple[str, ...] = ()  # kinds that an aggregation of it needs
    is_subsample: bool = False  # on a part of the subset, as savgm needs it
    measures: tuple[Measure, ...] = ("validation",)

    @cached_property
    def key(self) -> str:
        """A digest of all that shapes the result; in a run, its name. Legs with equal keys are one piece of work."""
        if not isinstance(self.place, str):
            if self.kind == "aggregate":
                return f"round-{self.round:04d}"
            return self.stage if self.subset is None else f"{self.told_stage}-{self.round}-{self.subset}"
        config = {name: value for name, value in shaping(self.config.to_dict()).items() if self._depends_on(name)}
        own: dict[str, Any] = {
            "kind": self.kind,
            "stage": self.stage,
            "epochs": self.epochs,
            "start": [self.start.kind, *(leg.key for leg in self.start.legs)],
            "round": self.round,
            "subset": self.subset,
            "span": self.span,
            "members": [leg.key for leg in self.members],
            "predecessor": self.predecessor and self.predecessor.key,
            "num_workers": self.num_workers,
            "statistics": self.statistics,
        }
        if self.is_subsample:
            own["is_subsample"] = True
        if self.measures != ("validation",):  # as keys were before
            own |= {"measures": self.measures} if self.measures else {"is_measured": False}
        text = json.dumps(own | {"config": config}, sort_keys=True)
        return f"{self.stage}-{self.kind}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    def _depends_on(self, name: str) -> bool:
        """Whether a field can matter to this leg, beyond what its start and members stand for already."""
        rooms = {"seed", "data", "task", "model", "minimize", "actors"}
        if self.subset is not None or self.kind == "aggregate":
            rooms |= {"subsets", "rounds", "aggregation"}
        if self.stage in ("trunk", "fine_tuning"):
            rooms |= {self.stage}
        if name in ("minimize.epochs", "trunk.epochs", "fine_tuning.epochs", "rounds.num", "rounds.evaluate_every"):
            return False  # `epochs`, `round`, `span` and `measures` stand for them
        if name in ("actors.num_gpus", "actors.quorum"):
            return False
        if name.startswith("aggregation.") and self.kind != "aggregate":
            return bool(self.statistics) or (self.is_subsample and name == "aggregation.savgm_fraction")
        if name.startswith("rounds.outer") and self.kind != "aggregate":
            return False
        return name.partition(".")[0] in rooms

    @cached_property
    def directory(self) -> RunDirectory:
        """Where it leaves what it makes."""
        assert self.place is not None
        return RunDirectory(self.place, self.key) if isinstance(self.place, str) else self.place

    @cached_property
    def piece(self) -> Piece | AggregatePiece:
        """What a process is told to do; of a Ray Train job, what each of its workers is."""
        return self._aggregation() if self.kind == "aggregate" else self._minimization()

    @property
    def _name(self) -> str:
        """What its piece is called: in a run, by stage and subset."""
        return self.key if isinstance(self.place, str) else ""

    @property
    def _has_next_round(self) -> bool:
        return self.stage == "subsets" and not self.is_subsample and self.round + 1 < self.config.rounds.num

    def _minimization(self) -> Piece:
        seed_ids = {"fresh": "initial", "reinit": "fine_tuning", "independent": f"independent-{self.subset}"}
        seed_id = seed_ids.get(self.start.kind)
        start = None if seed_id else self.start.leg
        return Piece(
            self.config,
            self.directory,
            self.stage,
            subset_id=self.subset,
            round=self.round,
            epochs=self.epochs,
            schedule_span=self.span,
            start=start and start.output,
            is_perturbed=self.start.kind == "shrink_perturb",
            start_id=seed_id or (start.key if start else ""),
            optimizer=self._optimizer(),
            statistics=self.statistics,
            measures=self.measures,
            send=self._send,
            moved=self.predecessor.output if self.predecessor and self.config.rounds.overlaps else None,
            is_subsample=self.is_subsample,
            by_train=self.kind == "train",
            teachers=tuple(member.output for member in self.members) if self.stage == "fine_tuning" else (),
            name=self._name,
        )

    @property
    def _send(self) -> Send:
        """How its minimum is stored: other than whole where the next round has a use for less, or needs differences."""
        rounds = self.config.rounds
        if self._has_next_round and rounds.send != "float32":
            return rounds.send
        return "difference" if rounds.overlaps and self.stage == "subsets" else "float32"

    def _optimizer(self) -> tuple[RunDirectory, str] | None:
        """The checkpoint of the optimizer state that it begins with: its predecessor's, or the mean of all."""
        if self.predecessor is not None and self.config.rounds.optimizer_state == "keep":
            return self.predecessor.directory, optimizer_path(self.predecessor.piece.folder)
        if self.round and self.config.rounds.optimizer_state == "average" and self.start.leg is not None:
            return self.start.leg.directory, mean_optimizer_path(self.round - 1)
        return None

    def _aggregation(self) -> AggregatePiece:
        start, momentum = self.start.leg and self.start.leg.output, None
        if start and self.round and self.config.rounds.has_outer_step():
            momentum = Output(start.directory, start.record_path, momentum_path(self.round - 1))
        return AggregatePiece(
            self.config,
            self.directory,
            tuple(member._minimization() for member in self.members if not member.is_subsample),
            self.round,
            parts=tuple(member._minimization() for member in self.members if member.is_subsample),
            start=start,
            momentum=momentum,
            averages_optimizers=self._has_next_round and self.config.rounds.optimizer_state == "average",
            measures=self.measures,
            name=self._name,
        )

    @property
    def output(self) -> Output:
        return self.piece.output

    @property
    def test(self) -> TestPiece:
        """The reading of the test split by its weights."""
        return TestPiece(self.config, self.output, f"test of {self.key}")

    def validation(self) -> dict[str, Any] | None:
        """Its metrics on validation data, once it is done; None where they are not measured."""
        return validation_of(self.directory.read_json(self.output.record_path))

    def tested(self) -> dict[str, Any] | None:
        """Its metrics on the test split; None if that was not read."""
        return self.directory.read_json_or_none(TEST_PATH)

    def works(self) -> list[Work]:
        """Its ledger: every attempt."""
        return Ledger(self.directory).read()

    @property
    def inputs(self) -> "tuple[Leg, ...]":
        """Legs that must be done before."""
        before = () if self.predecessor is None else (self.predecessor,)
        return (*self.start.legs, *self.members, *before)

    @property
    def told_stage(self) -> str:
        """What events, records and the ledger call its stage."""
        return "subsamples" if self.is_subsample else self.stage

    def passes(self, num_train: int) -> float:
        """What it trains for, in passes over a full set of so many examples."""
        return self.epochs if self.size is None else self.epochs * self.size / num_train

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leg) and other.key == self.key


def validation_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a leg's record says of its metrics on validation data; None where they are not measured."""
    return record.get("aggregation", record)["validation"]


def closure(leg: Leg) -> Iterator[Leg]:
    """The leg and all it needs, inputs first, each once."""
    seen: set[str] = set()

    def visit(one: Leg) -> Iterator[Leg]:
        if one.key not in seen:
            seen.add(one.key)
            for before in one.inputs:
                yield from visit(before)
            yield one

    yield from visit(leg)


def critical_path(legs: Iterable[Leg], measure: Callable[[Leg], float]) -> float:
    """The largest sum of a measure along any chain of the legs, inputs first: as if each had its own device."""
    longest: dict[str, float] = {}
    for one in legs:
        longest[one.key] = measure(one) + max((longest[before.key] for before in one.inputs), default=0.0)
    return max(longest.values())
