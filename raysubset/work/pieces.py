"""Pieces of work. Each is complete: beside the full set, the process that does it needs nothing else."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from raysubset.aggregation import Minimum, Send, from_differences, shrink_perturb
from raysubset.config import Config, TrainingStage
from raysubset.data import FullSet
from raysubset.errors import CorruptFile
from raysubset.models import trainable_names
from raysubset.run_directory import (
    RunDirectory,
    Seal,
    aggregate_path,
    aggregate_weights_path,
    minimum_folder,
    minimum_path,
    outputs_path,
    statistics_path,
    subsample_folder,
    weights_path,
)
from raysubset.run_directory.ledger import Stage
from raysubset.run_directory.recent import RECENT
from raysubset.training import MEASURES, Cost, Measure, Metrics, Weights
from raysubset.work.cutting import cut_subsample, cut_subsets
from raysubset.work.starting import random_model, seeded_model

TEST_PATH = "test.json"  # in the directory of a TestPiece


@dataclass(frozen=True)
class Output:
    """The files of a piece of work: its weights, and the record that names them, which is written last."""

    directory: RunDirectory
    record_path: str
    weights_path: str

    def record(self, *, whole: bool = False) -> dict[str, Any] | None:
        """Return the record; None, with a warning, if it or a file that it names is damaged or gone."""
        return self.directory.read_record(self.record_path, whole=whole)

    def files(self) -> dict[str, Seal]:
        """Return the seals of the files, by path."""
        return self.directory.read_json(self.record_path)["files"]

    def weights(self) -> Weights:
        """Return the weights. If they are stored as differences from those of a base, they are added up.

        Raises:
            CorruptFile: if a file is damaged or gone, or the base is not what it was.
        """
        return self._sum(self.directory.read_json(self.record_path))

    def stored(self) -> Weights:
        """Return what its file of weights holds: the weights, or differences."""
        return self.directory.read_weights(self.weights_path, self.files())

    def as_base(self, directory: RunDirectory) -> dict[str, str]:
        """Return the entry "base" of a record whose weights are stored as differences from these.

        Args:
            directory: the directory of that record: this one, or one beside it.
        """
        base = {"record": self.record_path, "weights": self.weights_path, "seal": self.files()[self.weights_path]}
        return base if directory.uri == self.directory.uri else base | {"name": self.directory.name}

    def _sum(self, record: dict[str, Any]) -> Weights:
        files, path = record["files"], self.weights_path
        if (base := record.get("base")) is None:
            return self.directory.read_weights(path, files)
        if (weights := self._newest(files[path])) is None:
            weights = from_differences(self.directory.read_weights(path, files), self._base_weights(base))
            RECENT.sum = (self.directory.uri, path, files[path]), weights
        return {name: tensor.clone() for name, tensor in weights.items()}

    def _newest(self, seal: Seal) -> Weights | None:
        """Return the weights if they are those that this process added up last; else None."""
        key, weights = RECENT.sum
        return weights if key == (self.directory.uri, self.weights_path, seal) else None

    def _base_weights(self, base: dict[str, str]) -> Weights:
        directory = RunDirectory(self.directory.storage_path, base["name"]) if "name" in base else self.directory
        output = Output(directory, base["record"], base["weights"])
        if (newest := output._newest(base["seal"])) is not None:
            return newest
        try:
            record = directory.read_json(output.record_path)
        except FileNotFoundError as error:
            text = f"{output.record_path} in {directory.uri} is gone, though later weights need it"
            raise CorruptFile(output.record_path, text) from error
        if record["files"].get(output.weights_path) != base["seal"]:
            text = f"in {self.directory.uri} holds differences from {output.weights_path}, which is another file now"
            raise CorruptFile(self.weights_path, f"{self.weights_path} {text}")
        return output._sum(record)


@dataclass(frozen=True)
class Piece:
    """One minimization: on a subset, or on the full set by an actor or a Ray Train job."""

    config: Config = field(repr=False)
    directory: RunDirectory
    stage: TrainingStage
    subset_id: int | None = None
    round: int = 0
    indices: np.ndarray | None = field(default=None, repr=False, compare=False)
    """The subset, int64 positions in the training split. None: what config and round give, or the full set."""
    epochs: float | None = None  # in place of the recipe's
    schedule_span: tuple[float, float] = (0.0, 1.0)  # begin and end of its part of the learning rate schedule
    start: Output | None = None  # the output that it starts from; None: given weights, or seeded by start_id
    is_perturbed: bool = False  # the start is shrunk and perturbed first (fine_tuning.start)
    start_id: str = "initial"
    moved: Output | None = None  # its predecessor's minimum as differences, which are added to its start
    optimizer: tuple[RunDirectory, str] | None = None  # the checkpoint of its first optimizer state
    node_speed: float | None = None  # of the node it is sized for, if sizes follow speeds
    statistics: tuple[str, ...] = ()  # kinds to leave beside the minimum
    measures: Collection[Measure] = MEASURES  # what its minimum is measured on
    send: Send = "float32"  # how its minimum is stored: whole, or as differences from its first weights
    is_subsample: bool = False  # of a part of the subset, with the recipe of subsets
    by_train: bool = False  # by Ray Train, in its local mode if an actor does it
    num_workers: int = 0  # of a Ray Train job; 0: an actor does it
    teachers: tuple[Output, ...] = ()  # minima to distil from, by Ray Train
    name: str = ""  # its label, if not by its subset or stage

    @property
    def ledger_key(self) -> tuple[Stage, int, int | None]:
        """Stage, round and subset of its ledger entries."""
        return "subsamples" if self.is_subsample else self.stage, self.round, self.subset_id

    @property
    def folder(self) -> str:
        """The folder of its minimum."""
        if self.is_subsample:
            assert self.subset_id is not None
            return subsample_folder(self.round, self.subset_id)
        return self.stage if self.subset_id is None else minimum_folder(self.round, self.subset_id)

    @property
    def output(self) -> Output:
        return Output(self.directory, minimum_path(self.folder), weights_path(self.folder))

    @property
    def label(self) -> str:
        part = "a part of " if self.is_subsample else ""
        return self.name or (self.stage if self.subset_id is None else f"{part}subset {self.subset_id}")

    def record(self) -> dict[str, Any] | None:
        """Return its record; None if it is not done."""
        return self.output.record()

    def positions(self, full_set: FullSet) -> np.ndarray | None:
        """Return the examples that it minimizes on, int64 positions in the training split; None: all."""
        if self.subset_id is None:
            return None
        indices = self.indices
        if indices is None:
            indices = cut_subsets(self.config, full_set, self.round)[self.subset_id].indices
        return cut_subsample(self.config, indices, self.round, self.subset_id) if self.is_subsample else indices

    def start_weights(self, full_set: FullSet) -> Weights | None:
        """Return the weights of its start, shrunk and perturbed if `is_perturbed`, before moved_on().

        None means that its seed alone gives them. They are returned all the same if its minimum is stored as
        differences from them.
        """
        if self.start is None:
            seeded = self.send != "float32"
            return seeded_model(self.config, full_set, self.start_id).state_dict() if seeded else None
        weights = self.start.weights()
        return perturbed(self.config, full_set, weights) if self.is_perturbed else weights

    def moved_on(self, start: Weights) -> Weights:
        """Return its first weights: the start that it shares with other members, plus its predecessor's displacement.

        With rounds.overlap a minimum θ is stored as its displacement d = θ - s from its first weights s. Member k
        begins round r + 1 at s_k(r+1) = a(r-1) + d_k(r). The aggregate a(r) is of these same weights, with its outer
        step from a(r-1); a(-1) is the first start. This is local SGD whose averages come a round late (DaSGD, Zhou et
        al. 2020, arXiv:2006.00441; Streaming DiLoCo, arXiv:2501.18512, delays them likewise). Without momentum the mean
        of a round's starts is the aggregate that nobody waited for, and members differ by their last displacements
        alone. If these were taken from the minimum before instead, differences of members would never fade: their
        recursion would be e(r+1) = e(r) - e(r-1). On a quadratic loss an outer step of rate 1 and momentum m converges
        for any curvature, by at worst √m a round.
        """
        return start if self.moved is None else from_differences(self.moved.stored(), start)

    def minimum(
        self,
        record: dict[str, Any],
        part: "Piece | None" = None,
        *,
        start: Weights | None = None,
        averaged: frozenset[str] | None = None,
    ) -> Minimum:
        """Return the minimum of its record; weights and other large data are read when they are needed.

        Args:
            part: the same minimization on a part of the subset, for savgm.
            start: the weights to which stored differences are added: its first weights, or a later aggregate.
            averaged: models.averaged_names().
        """
        files = record["files"]

        def load_weights() -> Weights:
            stored = self.directory.read_weights(self.output.weights_path, files)
            if record.get("send", "float32") == "float32":
                return stored
            assert start is not None
            return from_differences(stored, start)

        return Minimum(
            **{name: record[name] for name in ("subset_id", "num_examples", "start_id", "outcome")},
            training=record["training"] and Metrics.from_dict(record["training"]),
            validation=record["validation"] and Metrics.from_dict(record["validation"]),
            cost=Cost.from_dict(record["cost"]),
            averaged=averaged,
            load_weights=load_weights,
            load_outputs=lambda: self.directory.read_weights(outputs_path(self.folder), files)["outputs"],
            load_statistics=partial(self._statistics, files, part),
        )

    def _statistics(self, files: Mapping[str, Seal], part: "Piece | None", kind: str) -> Weights:
        if kind == "subsample" and part is not None:
            return part.output.weights()
        if (path := statistics_path(self.folder, kind)) in files:
            return self.directory.read_weights(path, files)
        raise ValueError(
            f"the minimum of {self.label} has no {kind} statistics: they cannot be taken, or it was for another method"
        )


@dataclass(frozen=True)
class AggregatePiece:
    """The aggregation of a round's minima."""

    config: Config = field(repr=False)
    directory: RunDirectory
    members: tuple[Piece, ...]
    round: int = 0
    parts: tuple[Piece, ...] = ()  # the members on a part of their subsets, in the same order, if savgm needs them
    start: Output | None = None  # the members' start, to which stored differences are added; None: given or seeded
    momentum: Output | None = None  # of the outer step, from the round before
    send: Send = "float32"  # how its weights and its momentum are stored: whole, or as differences from the start
    averages_optimizers: bool = False  # it writes the mean of its members' optimizer states too
    measures: Collection[Measure] = MEASURES
    lists_minima: bool = False  # its record has its members' records
    name: str = ""

    @property
    def ledger_key(self) -> tuple[Stage, int, None]:
        return "aggregation", self.round, None

    @property
    def folder(self) -> str:
        return f"rounds/{self.round:04d}"

    @property
    def output(self) -> Output:
        return Output(self.directory, aggregate_path(self.round), aggregate_weights_path(self.round))

    @property
    def label(self) -> str:
        return self.name or f"aggregation of round {self.round}"

    def record(self) -> dict[str, Any] | None:
        """Return its record; None if it is not done."""
        return self.output.record()

    def start_weights(self, full_set: FullSet) -> Weights:
        """Return the weights that its members started from."""
        if self.start is not None:
            return self.start.weights()
        return seeded_model(self.config, full_set).state_dict()

    def last_momentum(self, names: Collection[str], start: Weights) -> Weights:
        """Return the outer step's momentum after the round before; {} in the first."""
        if self.momentum is None:
            return {}
        record = self.momentum.directory.read_json(self.momentum.record_path)
        stored = self.momentum.directory.read_weights(self.momentum.weights_path, record["files"])
        return from_differences(stored, zeros_of(start, names)) if "base" in record else stored


@dataclass(frozen=True)
class TestPiece:
    """One reading of the test split, with the weights of another piece of work.

    That of a run's final model has a ledger entry and leaves predictions; others leave TEST_PATH.
    """

    __test__ = False  # or pytest would take it for a test
    folder = "test"
    ledger_key: ClassVar[tuple[Stage, int, None]] = ("test", 0, None)

    config: Config = field(repr=False)
    of: Output
    label: str
    is_final: bool = False

    @property
    def directory(self) -> RunDirectory:
        return self.of.directory

    def record(self) -> dict[str, Any] | None:
        """Return the metrics; None if the split was not read yet. The final reading is repeated if its actor dies."""
        return None if self.is_final else self.directory.read_json_or_none(TEST_PATH)


@dataclass(frozen=True)
class TrialPiece:
    """A trial of whether it pays to pack these pieces, which belong to one run and stage. It leaves no files."""

    folder = "measuring"
    ledger_key: ClassVar[tuple[Stage, int, None]] = ("measuring", 0, None)

    pieces: tuple[Piece, ...]

    @property
    def directory(self) -> RunDirectory:
        return self.pieces[0].directory

    @property
    def label(self) -> str:
        return f"packing trial of {len(self.pieces)} subsets"

    def record(self) -> None:
        """Return None: a trial is repeated if its actor dies."""


def zeros_of(weights: Weights, names: Collection[str]) -> Weights:
    """Return what a momentum that is sent differs from."""
    return {name: torch.zeros_like(weights[name]) for name in names}


AnyPiece = Piece | AggregatePiece | TestPiece | TrialPiece


def perturbed(config: Config, full_set: FullSet, weights: Weights) -> Weights:
    """Return the weights shrunk and perturbed (arXiv:1910.08475) by new ones, with fine_tuning.shrink and .perturb."""
    fresh = random_model(config, full_set, "fine_tuning")
    tuning, names = config.fine_tuning, trainable_names(fresh)
    return shrink_perturb(
        weights, fresh.state_dict(), shrink=tuning.shrink, perturb=tuning.perturb, parameter_names=names
    )
