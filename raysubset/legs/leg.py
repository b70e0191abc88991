"""Leg is one piece of work of a run or an arm, with its inputs. Equal legs have one name."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from raysubset.aggregation import Send
from raysubset.config import Config, TrainingStage, shaping
from raysubset.costs import taught_passes
from raysubset.run_directory import RunDirectory, mean_optimizer_path, momentum_path, optimizer_path
from raysubset.run_directory.ledger import Ledger, Work
from raysubset.training import Measure
from raysubset.work import TEST_PATH, AggregatePiece, Output, Piece, TestPiece

LegKind = Literal["minimize", "aggregate", "train"]
StartKind = Literal["fresh", "independent", "warm", "shrink_perturb", "reinit"]


@dataclass(frozen=True)
class Start:
    """The weights that a leg starts from."""

    kind: StartKind
    leg: "Leg | None" = None  # the leg whose result it is; None for fresh weights

    @property
    def legs(self) -> "tuple[Leg, ...]":
        """Return the legs that it needs. `reinit` needs its leg too, as the cost of the discarded stage counts."""
        return () if self.leg is None else (self.leg,)


@dataclass(frozen=True, eq=False)
class Leg:
    """A minimization in one process, an aggregation, or a Ray Train job."""

    place: RunDirectory | str | None
    """The run's directory, in which the leg has a folder; or the path below which the leg has its own directory, named
    by its key; None: the leg is only planned."""
    kind: LegKind
    config: Config
    stage: TrainingStage
    epochs: float  # over the examples that it minimizes on
    start: Start
    size: int | None = None  # examples that it minimizes on, as planned; None: the full set
    round: int = 0
    subset: int | None = None  # None: the full set
    span: tuple[float, float] = (0.0, 1.0)  # of the schedule
    members: "tuple[Leg, ...]" = ()  # the minima that are aggregated; for a subsample, the minimum of its subset
    predecessor: "Leg | None" = None  # the last member, if its optimizer state or displacement is used
    num_workers: int = 1
    statistics: tuple[str, ...] = ()  # kinds that its aggregation needs
    is_subsample: bool = False  # on a part of the subset, for savgm
    measures: tuple[Measure, ...] = ("validation",)
    label: str = ""  # what it is for, in a comparison; not part of its key

    @cached_property
    def key(self) -> str:
        """Return a digest of all that shapes the result, or in a run the leg's name. Legs with equal keys are equal."""
        if not isinstance(self.place, str):
            if self.kind == "aggregate":
                return f"round-{self.round:04d}"
            return self.stage if self.subset is None else f"{self.told_stage}-{self.round}-{self.subset}"
        config = {name: value for name, value in shaping(self.config.to_dict()).items() if self._depends_on(name)}
        shape: dict[str, Any] = {
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
            shape["is_subsample"] = True
        if self.measures != ("validation",):  # keys of older runs have no measures
            shape |= {"measures": self.measures} if self.measures else {"is_measured": False}
        text = json.dumps(shape | {"config": config}, sort_keys=True)
        return f"{self.stage}-{self.kind}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    def _depends_on(self, name: str) -> bool:
        """Return True if the field can change this leg's result other than by its inputs."""
        rooms = {"seed", "data", "task", "model", "minimize", "actors"}
        if self.subset is not None or self.kind == "aggregate":
            rooms |= {"subsets", "rounds", "aggregation"}
        if self.stage in ("trunk", "fine_tuning"):
            rooms |= {self.stage}
        if name in ("minimize.epochs", "trunk.epochs", "fine_tuning.epochs", "rounds.num", "rounds.evaluate_every"):
            return False  # `epochs`, `round`, `span` and `measures` stand for them
        if name in ("actors.num_gpus", "actors.quorum"):
            return False
        if name == "fine_tuning.sync_batch_norm" and self.config.fine_tuning.sync_batch_norm and self.num_workers > 1:
            return True  # of any Ray Train job; keys of older runs lack the default
        if name.startswith("aggregation.") and self.kind != "aggregate":
            return bool(self.statistics) or (self.is_subsample and name == "aggregation.savgm_fraction")
        if name.startswith("rounds.outer") and self.kind != "aggregate":
            return False
        return name.partition(".")[0] in rooms

    @cached_property
    def directory(self) -> RunDirectory:
        """Return the directory of its results."""
        assert self.place is not None
        return RunDirectory(self.place, self.key) if isinstance(self.place, str) else self.place

    @cached_property
    def piece(self) -> Piece | AggregatePiece:
        """Return the work as a process gets it. Each worker of a Ray Train job gets the same."""
        return self._aggregation() if self.kind == "aggregate" else self._minimization()

    @property
    def name(self) -> str:
        """Return its name in messages; "" in a run, where stage and subset name it."""
        if not (self.label and isinstance(self.place, str)):
            return self.key if isinstance(self.place, str) else ""
        if self.stage == "conventional":
            return self.label
        of_round = f" of round {self.round + 1}" if self.stage == "subsets" and self.config.rounds.num > 1 else ""
        what = "aggregate" if self.kind == "aggregate" else self.told_stage.replace("_", "-")
        if self.subset is not None:
            what = f"{'a part of ' if self.is_subsample else ''}subset {self.subset}"
        return f"{self.label}, {what}{of_round}"

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
            num_workers=self.num_workers if self.num_workers > 1 else 0,
            teachers=tuple(member.output for member in self.members) if self.stage == "fine_tuning" else (),
            name=self.name,
        )

    @property
    def _send(self) -> Send:
        """Return how its minimum is stored: as rounds.send says, or as differences that rounds.overlap needs."""
        rounds = self.config.rounds
        if self._has_next_round and rounds.send != "float32":
            return rounds.send
        return "difference" if rounds.overlaps and self.stage == "subsets" else "float32"

    def _optimizer(self) -> tuple[RunDirectory, str] | None:
        """Return the checkpoint of its first optimizer state: its predecessor's, or the mean of all members'."""
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
            send="float32" if self.config.rounds.sends_whole(self.round) else self.config.rounds.send,
            averages_optimizers=self._has_next_round and self.config.rounds.optimizer_state == "average",
            measures=self.measures,
            lists_minima=not isinstance(self.place, str),
            name=self.name,
        )

    @property
    def output(self) -> Output:
        return self.piece.output

    @property
    def test(self) -> TestPiece:
        """Return the piece that evaluates its weights on the test split."""
        return TestPiece(self.config, self.output, f"test of {self.name}")

    def validation(self) -> dict[str, Any] | None:
        """Return its metrics on validation data, once it is done; None if they are not measured."""
        return validation_of(self.directory.read_json(self.output.record_path))

    def tested(self) -> dict[str, Any] | None:
        """Return its metrics on the test split; None if it was not evaluated there."""
        return self.directory.read_json_or_none(TEST_PATH)

    def works(self) -> list[Work]:
        """Return its ledger entries, one for each attempt, once nothing runs: open ones are closed as lost."""
        return Ledger(self.directory).close_lost()

    @property
    def inputs(self) -> "tuple[Leg, ...]":
        """Return the legs that must be done before it."""
        return (*self.start.legs, *self.members, *([self.predecessor] if self.predecessor else ()))

    @property
    def bases(self) -> "Iterator[Leg]":
        """Yield the aggregates that its start is added up from: each differs from the next, and the last is whole."""
        leg = self.start.leg
        while leg and leg.kind == "aggregate" and not leg.config.rounds.sends_whole(leg.round):
            if leg := leg.start.leg:  # a leg that was drawn without its inputs names none
                yield leg

    @property
    def told_stage(self) -> str:
        """Return its stage as events, records and the ledger name it: a subsample has a name of its own."""
        return "subsamples" if self.is_subsample else self.stage

    def passes(self, num_train: int) -> float:
        """Return its training in passes over a full set of `num_train` examples."""
        return self.epochs if self.size is None else self.epochs * self.size / num_train

    def planned_passes(self, num_train: int, forward_share: float) -> float:
        """Return its training as passes() does, with those of the members that teach it."""
        passes, num_teachers = self.passes(num_train), len(self.members) if self.stage == "fine_tuning" else 0
        return passes + taught_passes(passes, num_teachers, forward_share)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leg) and other.key == self.key


def validation_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the metrics on validation data of a leg's record; None if they were not measured."""
    return record.get("aggregation", record)["validation"]


def closure(*legs: Leg) -> Iterator[Leg]:
    """Yield the legs and all they need, inputs first, each once."""
    keys: set[str] = set()

    def visit(current: Leg) -> Iterator[Leg]:
        if current.key not in keys:
            keys.add(current.key)
            for needed in current.inputs:
                yield from visit(needed)
            yield current

    for leg in legs:
        yield from visit(leg)


def critical_path(legs: Iterable[Leg], measure: Callable[[Leg], float]) -> float:
    """Return the largest sum of a measure along any chain of the legs, as if each had its own device.

    Args:
        legs: inputs come first.
    """
    lengths: dict[str, float] = {}
    for leg in legs:
        lengths[leg.key] = measure(leg) + max((lengths[needed.key] for needed in leg.inputs), default=0.0)
    return max(lengths.values())
