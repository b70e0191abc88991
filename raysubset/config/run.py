"""Define Config: all settings of a run."""

import dataclasses
import functools
import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar, cast

from raysubset.config.inputs import DataConfig, ModelConfig, SubsetsConfig
from raysubset.config.minimizing import WHOLE_SUBSET, MinimizeConfig, TrainingStage
from raysubset.config.places import ActorsConfig, ClusterConfig, TrackingConfig
from raysubset.config.stages import AggregationConfig, ConventionalConfig, FineTuningConfig, RoundsConfig, TrunkConfig
from raysubset.config.task import TaskConfig
from raysubset.config.trees import Part, flatten, from_tree, nearest, shaping
from raysubset.errors import counted

UNKNOWN_FIELD = "; see raysubset run --help"
_NAME_BYTES = 255  # most bytes of a file name, on all usual file systems
_NAME_CHARACTERS = 60  # most characters of the data's and of the model's name in a run's default name

_MAY_BE_FUNCTIONS = (  # fields that can name the user's own: package.module:function
    *("data.name", "data.augmentation", "task.name", "model.name", "subsets.function", "minimize.optimizer"),
    *("minimize.objective", "minimize.loop", "actors.on_step", "aggregation.method"),
)

# Settings that shape subset pretraining alone: a conventional run of a given length does not depend on them
OF_SUBSET_PRETRAINING = (
    *("subsets.", "trunk.", "rounds.", "aggregation.", "fine_tuning."),
    *("minimize.epochs", "actors.quorum"),
)

Learned = tuple[DataConfig, TaskConfig]


class Config(Part):
    name: str | None = None
    """Name of the run: running again under the same name resumes. By default data, model (if named) and a digest."""
    storage_path: str = "~/ray_results"
    """Path or URI (pyarrow.fs: s3://…, gs://…) of the run directories; all nodes of a cluster must share it."""
    seed: Annotated[int, "(-∞, ∞)"] = 0
    """Seed of everything drawn at random except the splits."""
    method: Literal["subset_pretraining", "conventional"] = "subset_pretraining"
    """conventional: one plain run on the full set, of equal total cost, for comparison."""
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    subsets: SubsetsConfig = field(default_factory=SubsetsConfig)
    minimize: MinimizeConfig = field(default_factory=MinimizeConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    conventional: ConventionalConfig = field(default_factory=ConventionalConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> Iterator[str]:
        name, num, quorum = self.name or "", self.subsets.num, self.actors.quorum
        if "/" in name or name in (".", ".."):
            yield f"name = {name!r} must be a plain folder name"
        if (num_bytes := len(name.encode())) > _NAME_BYTES:
            yield f"--name has {num_bytes} bytes: give at most {_NAME_BYTES}, a file name's"
        if self.subsets.start == "independent":
            if self.trunk.epochs:
                yield "subsets.start=independent and a trunk contradict each other: set trunk.epochs to 0"
            if self.model.weights:
                yield f"model.weights = {self.model.weights} would start all subsets alike: leave out subsets.start"
            if self.rounds.num > 1:
                yield "rounds.num > 1 starts every round from the last mean: subsets.start must be shared"
        loop = self.minimize.whole_loop
        on_full_set = self.method == "conventional" or self.trunk.epochs or self.fine_tuning.epochs
        if loop and self.data.streamed and on_full_set:
            yield f"{loop} needs all examples in memory, and data.streamed holds none: use sgd, or no full-set stage"
        if self.subsets.per_actor > 1 and (self.minimize.patience or self.minimize.validate_every):
            yield "subsets.per_actor trains without measuring: leave out minimize.patience and validate_every"
        usual_noise = self.data.name in ("cifar10", "cifar100")
        is_noisy = usual_noise if self.data.augmentation == "auto" else self.data.augmentation != "none"
        if self.minimize.optimizer in WHOLE_SUBSET and is_noisy:
            yield f"{self.minimize.optimizer} needs a loss without noise: set --data.augmentation=none"
        if num and quorum and quorum > num:
            yield f"actors.quorum = {quorum} exceeds subsets.num = {num}: give at most that"
        yield from self._problems_of_rounds()
        yield from self._problems_of_stages()

    def _problems_of_rounds(self) -> Iterator[str]:
        if self.rounds.num == 1:
            return
        state, loop = self.rounds.optimizer_state, self.minimize.whole_loop
        if loop and state != "reset":
            yield f"{loop} has no rounds.optimizer_state to keep: set it to reset, or use sgd, adam or adamw"
        if self.minimize.has_own_optimizer and state == "average":
            yield f"rounds.optimizer_state=average knows no state of {self.minimize.optimizer}: set keep or reset"
        for reason, is_set in (
            ("rounds.optimizer_state=average needs all members of the last round", state == "average"),
            ("actors.quorum loses members, and each starts from its own minimum", self.actors.quorum is not None),
            ("fine_tuning.distillation learns from minima, stored as differences", self.fine_tuning.distillation > 0),
        ):
            if self.rounds.overlaps and is_set:
                yield f"{reason} with rounds.overlap: leave one of them out"
        for name in ("tolerance", "patience"):
            if getattr(self.minimize, name):
                yield f"minimize.{name} cuts a schedule that spans all rounds: use it with rounds.num=1"

    def _problems_of_stages(self) -> Iterator[str]:
        """Yield techniques that would do nothing in a stage, or something other than meant."""
        stages: list[tuple[TrainingStage, float | None]] = [("conventional", self.conventional.epochs)]
        if self.method == "subset_pretraining":
            stages = [
                ("trunk", self.trunk.epochs),
                ("subsets", self.minimize.epochs),
                ("fine_tuning", self.fine_tuning.epochs),
            ]
        for stage, epochs in stages:
            if not epochs:
                continue
            averaging = self.stage(stage, epochs=epochs).averaging  # stage() refuses what does not fit its rate
            if averaging.kind == "swa" and (num := averaging.num_epochs_averaged(epochs)) <= 1:
                text = f"swa would average {counted(num, 'epoch')} in the stage {stage}, of {counted(epochs, 'epoch')}"
                yield f"{text}: name others in minimize.averaging.stages, or lower minimize.averaging.swa_start"
        averaging, tuning = self.minimize.for_stage("fine_tuning").averaging, self.fine_tuning
        if tuning.keep == "best" and tuning.epochs and averaging.kind != "none" and not averaging.restarts():
            yield f"fine_tuning.keep=best chooses among epochs, but {averaging.kind} averages over them: use last"
        objective, loop = self.minimize.objective, self.minimize.whole_loop
        for is_set, why in (
            (self.method == "conventional", "learns from minima, which method=conventional does not have: set it to 0"),
            (objective, f"is a share of the task's loss, which {objective} replaces: leave one of them out"),
            (loop, f"needs sgd, adam or adamw: {loop} minimizes the labels' loss"),
        ):
            if tuning.distillation and is_set:
                yield f"fine_tuning.distillation {why}"

    def run_name(self) -> str:
        """Return the run directory's name: `name`, or data, model if named, and a digest of what shapes the result."""
        if self.name:
            return self.name
        digest = _digest(json.dumps(shaping(self.to_dict()), sort_keys=True), 4).hex()
        names = [self.data.name.rstrip("/").rsplit("/", 1)[-1]]
        names += [self.model.name] if self.model.name != "auto" else []
        names += ["conventional"] if self.method == "conventional" else []
        plain = ("".join(c if c.isalnum() or c in "._-" else "-" for c in name[:_NAME_CHARACTERS]) for name in names)
        return "-".join([*plain, digest])

    @property
    def learned(self) -> "Learned":
        """Return the settings that a full set is read by: runs that agree in them share one."""
        return self.data, self.task

    def functions(self) -> dict[str, str]:
        """Return the user's own functions that a run calls, package.module:function, by the field that names each."""
        names = {field: operator.attrgetter(field)(self) or "" for field in _MAY_BE_FUNCTIONS}
        return {field: name for field, name in names.items() if ":" in name and "/" not in name}

    def stage(self, stage: TrainingStage, *, epochs: float | None = None) -> MinimizeConfig:
        """Return a stage's recipe: `minimize` with its learning rate, schedule and epochs (or the given ones)."""
        base = self.minimize.for_stage(stage)
        changes: dict[str, Any] = {} if stage == "subsets" else {"tolerance": None, "target_loss": None}
        if own := {"trunk": self.trunk, "fine_tuning": self.fine_tuning}.get(stage):
            rate = base.learning_rate if own.learning_rate is None else own.learning_rate
            changes |= {"epochs": own.epochs, "learning_rate": rate}
        if stage == "trunk":
            changes["schedule"] = self.trunk.schedule
        if stage == "subsets" and self.rounds.learning_rate_scale != 1:
            changes["learning_rate"] = base.peak_learning_rate() * self.rounds.learning_rate_scale
        return dataclasses.replace(base, **changes | ({} if epochs is None else {"epochs": epochs}))

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Config":
        """Return a copy with single fields set by dotted name.

        Raises:
            ValueError: for an unknown name (with the nearest known one) or a value that a check refuses.
        """
        fields, changes = _field_names(), dict[str, Any]()
        for key, value in overrides.items():
            if key not in fields:
                if field := next((field for field in fields if field.startswith(f"{key}.")), None):
                    raise ValueError(f"{key} is a group of settings: give single ones, such as {field}")
                raise ValueError(f"there is no config field {key}{nearest(key, fields) or UNKNOWN_FIELD}")
            *parents, leaf = key.split(".")
            functools.reduce(lambda part, name: part.setdefault(name, {}), parents, changes)[leaf] = value
        return _changed(self, changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as nested dicts, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Config":
        """Build a config from what to_dict() returns; fields left out keep their defaults.

        Raises:
            ValueError: for unknown fields or values of the wrong type.
        """
        return from_tree(cls, tree)


@functools.cache
def _field_names() -> tuple[str, ...]:
    """Return the dotted names of all settings."""
    return tuple(flatten(Config().to_dict()))


_P = TypeVar("_P", bound=Part)


def _changed(part: _P, changes: Mapping[str, Any]) -> _P:
    """Return a copy with some fields set. Only groups of settings that change are made and checked again."""
    values, record = dict[str, Any](), cast(Any, part)
    for name in (name for name in record.__dataclass_fields__ if name in changes):  # in this order mistakes are told
        old, new = getattr(part, name), changes[name]
        values[name] = _changed(old, new) if isinstance(old, Part) else new
    return dataclasses.replace(record, **values)


def derive_seed(seed: int, *path: int | str) -> int:
    """Derive an independent 63-bit seed for each path below one seed: the same on every machine and Python version."""
    return int.from_bytes(_digest(json.dumps([seed, *path]), 8), "big") >> 1


def _digest(text: str, num_bytes: int) -> bytes:
    import hashlib  # loads OpenSSL: parsing flags should not wait for it

    return hashlib.blake2b(text.encode(), digest_size=num_bytes).digest()


def of_now(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded config of a run, comparison or sweep as today's version writes it.

    New fields get their defaults. A config that this version cannot read, and any other tree, is returned unchanged.
    """
    if "minimize" not in tree:
        return dict(tree)
    names = {field.name for field in dataclasses.fields(Config)}
    try:
        config = Config.from_dict({key: value for key, value in tree.items() if key in names}).to_dict()
    except ValueError:
        return dict(tree)
    return {key: value for key, value in tree.items() if key not in names} | config
