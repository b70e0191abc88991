"""Config: round trips, overrides, every relation, names that change exactly when the result may, stable seeds."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from raysubset.config import (
    ActorsConfig,
    ClusterConfig,
    Config,
    ConventionalConfig,
    DataConfig,
    FineTuningConfig,
    MinimizeConfig,
    ModelConfig,
    RoundsConfig,
    SubsetsConfig,
    TaskConfig,
    TrackingConfig,
    TrunkConfig,
    derive_seed,
    differences,
    field_type,
    flatten,
    from_tree,
    nearest,
    of_now,
    parse_value,
    shapes_result,
)

FULL = Config(
    name="mine",
    seed=7,
    data=DataConfig(name="mnist", image_size=32),
    model=ModelConfig(name="cnn", width=16, norm="group"),
    subsets=SubsetsConfig(num=3, size=100, scheme="dirichlet", alpha=0.1),
    minimize=MinimizeConfig(optimizer="adamw", learning_rate=1e-3, target_loss=0.1),
    fine_tuning=FineTuningConfig(num_workers=4, min_workers=2),
)


@pytest.mark.parametrize("config", [Config(), FULL])
def test_a_config_survives_json(config):
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fields_left_out_keep_their_defaults():
    assert Config.from_dict({"data": {"name": "mnist"}}) == Config(data=DataConfig(name="mnist"))


def test_overrides_set_single_fields_by_dotted_name():
    changed = Config(seed=3).with_overrides({"data.name": "mnist", "subsets.size": 5000, "minimize.epochs": 2})
    assert changed == Config(
        seed=3, data=DataConfig(name="mnist"), subsets=SubsetsConfig(size=5000), minimize=MinimizeConfig(epochs=2.0)
    )
    assert type(changed.minimize.epochs) is float


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "minimize.lerning_rate",
            0.1,
            "there is no config field minimize.lerning_rate; did you mean minimize.learning",
        ),
        ("zzz", 1, "there is no config field zzz; see raysubset run --help$"),
        ("data", {}, "data is a group of settings: give single ones, such as data.name"),
        (
            "minimize.optimizer",
            "adamm",
            "'adamm' is not one of sgd, .*, gauss_newton, levenberg_marquardt, nor a .*; did you mean adam",
        ),
        ("minimize.epochs", "8", "minimize.epochs = '8' should be float"),
        ("minimize.batch_size", 1.5, "minimize.batch_size = 1.5 should be int"),
        ("minimize.batch_size", True, "minimize.batch_size = True should be int"),
        ("minimize.epochs", True, "minimize.epochs = True should be float"),
        ("subsets.num", "4", "subsets.num = '4' should be int or NoneType"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused_with_the_nearest_word(key, value, message):
    with pytest.raises(ValueError, match=message):
        Config().with_overrides({key: value})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sed": 1}, "there is no config field sed; did you mean seed"),
        (
            {"data": {"nam": "x"}},
            "there is no config field data.nam; did you mean name",
        ),
        ({"data": 3}, "data should be an object, not 3"),
        ([], "config should be an object, not "),
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(tree)


@dataclass(frozen=True)
class Leaf:
    size: int
    share: float = 0.5


@dataclass(frozen=True)
class Record:
    kind: Literal["a", "b"]
    shape: tuple[int, int, int]
    leaf: Leaf | None
    leaves: tuple[Leaf, ...]
    names: tuple[str, ...] = ()


GOOD = {"kind": "a", "shape": [1, 2, 3], "leaf": None, "leaves": [{"size": 2, "share": 1}]}


def test_a_record_comes_back_from_json_with_tuples_and_records_in_it():
    tree = {**GOOD, "leaf": {"size": 1}, "names": ["x"]}
    expected = Record("a", (1, 2, 3), Leaf(1), (Leaf(2, 1.0),), ("x",))
    assert from_tree(Record, json.loads(json.dumps(tree)), noun="value") == expected
    assert from_tree(Record, GOOD, noun="value").leaf is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "c"}, "kind = 'c' is not one of a, b"),
        ({"kind": ["a"]}, "is not one of a, b"),
        ({"shape": [1, 2]}, "shape = .1, 2. should be tuple"),
        ({"shape": [1, 2, "3"]}, r"shape\[2\] = '3' should be int"),
        ({"shape": 3}, "shape = 3 should be tuple"),
        ({"leaf": []}, "leaf = .. should be Leaf or None"),
        ({"leaf": {}}, "the value leaf.size is missing"),
        ({"leaf": {"size": 1, "share": float("inf")}}, "leaf.share = inf is no finite number"),
        ({"leaves": {}}, "leaves = .. should be tuple"),
        ({"leaves": [None]}, r"leaves\[0\] should be an object, not None"),
        ({"leaves": [{"size": 1, "siz": 2}]}, r"there is no value leaves\[0\].siz; did you mean size"),
        ({"names": [None]}, r"names\[0\] = None should be str"),
        ({"names": "y" * 1000}, "names = 'yyy"),
    ],
)
def test_a_record_of_another_shape_or_type_is_refused_by_the_value(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        from_tree(Record, {**GOOD, **changes}, noun="value")
    assert len(str(refused.value)) < 200


def test_nearest_is_silent_where_nothing_is_near():
    assert nearest("mnits", ["mnist", "cifar10"]) == "; did you mean mnist?"
    assert nearest("qqq", ["mnist", "cifar10"]) == ""


REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (DataConfig, {"name": ""}, "data.name is empty"),
    (DataConfig, {"validation_fraction": 0.0}, r"must be in \(0, 1\)"),
    (DataConfig, {"test_fraction": 1.0}, r"must be in \(0, 1\)"),
    (DataConfig, {"image_size": 0}, "data.image_size = 0"),
    (ModelConfig, {"name": ""}, "model.name is empty"),
    (ModelConfig, {"width": 0}, "model.width = 0"),
    (ModelConfig, {"depth": -1}, "model.depth = -1"),
    (ModelConfig, {"name": "resnet18", "width": 8}, "model.width does not apply to resnet18"),
    (ModelConfig, {"name": "lenet5", "depth": 8}, "model.depth does not apply to lenet5"),
    (ModelConfig, {"name": "mlp", "norm": "none"}, "model.norm does not apply to mlp"),
    (ModelConfig, {"name": "cifar_resnet", "depth": 18}, r"depth = 18: a CIFAR ResNet has 6n \+ 2"),
    (ModelConfig, {"name": "cifar_resnet", "depth": 2}, "depth = 2"),
    (SubsetsConfig, {"num": 2, "size": 3, "fraction": 0.5}, "at most two"),
    (SubsetsConfig, {"size": 3, "fraction": 0.5}, "say the same"),
    (SubsetsConfig, {"num": 0}, "subsets.num = 0"),
    (SubsetsConfig, {"size": 0}, "subsets.size = 0"),
    (SubsetsConfig, {"fraction": 1.5}, "subsets.fraction = 1.5"),
    (SubsetsConfig, {"alpha": 0.0}, "subsets.alpha = 0.0"),
    (SubsetsConfig, {"scheme": "column"}, "subsets.scheme=column and subsets.column go together"),
    (SubsetsConfig, {"column": "site"}, "subsets.scheme=column and subsets.column go together"),
    (SubsetsConfig, {"scheme": "function"}, "subsets.scheme=function and subsets.function go together"),
    (SubsetsConfig, {"scheme": "column", "column": "site", "num": 2}, "follows from the column's values"),
    (MinimizeConfig, {"epochs": 0.0}, "minimize.epochs = 0.0 must be positive"),
    (MinimizeConfig, {"epochs": float("inf")}, "epochs = inf"),
    (MinimizeConfig, {"batch_size": 0}, "minimize.batch_size = 0"),
    (MinimizeConfig, {"learning_rate": 0.0}, "learning_rate = 0.0"),
    (MinimizeConfig, {"learning_rate": float("nan")}, "learning_rate = nan"),
    (MinimizeConfig, {"momentum": 1.0}, "minimize.momentum = 1.0"),
    (MinimizeConfig, {"weight_decay": -1.0}, "minimize.weight_decay = -1.0"),
    (TaskConfig, {"label_smoothing": 1.0}, "task.label_smoothing = 1.0"),
    (MinimizeConfig, {"warmup_fraction": 1.0}, "minimize.warmup_fraction = 1.0"),
    (MinimizeConfig, {"tolerance": 0.0}, "minimize.tolerance = 0.0"),
    (
        MinimizeConfig,
        {"optimizer": "gauss_newton", "learning_rate": 2.0},
        "takes that share of its full step, at most 1",
    ),
    (MinimizeConfig, {"optimizer": "cg", "precision": "bfloat16"}, "cg needs a more precise loss .*precision=float32"),
    (TaskConfig, {"loss": "squared_error", "label_smoothing": 0.1}, "label_smoothing belongs to cross_entropy"),
    (TrunkConfig, {"epochs": -1.0}, "trunk.epochs = -1.0"),
    (TrunkConfig, {"num_workers": 0}, "trunk.num_workers = 0"),
    (RoundsConfig, {"num": 0}, "rounds.num = 0"),
    (RoundsConfig, {"outer_learning_rate": 0.0}, "rounds.outer_learning_rate = 0.0"),
    (RoundsConfig, {"outer_momentum": 1.0}, "rounds.outer_momentum = 1.0"),
    (FineTuningConfig, {"epochs": -1.0}, "fine_tuning.epochs = -1.0"),
    (FineTuningConfig, {"shrink": 1.5}, "fine_tuning.shrink = 1.5"),
    (FineTuningConfig, {"perturb": -0.5}, "fine_tuning.perturb = -0.5"),
    (FineTuningConfig, {"num_workers": 0}, "fine_tuning.num_workers = 0"),
    (FineTuningConfig, {"min_workers": 1}, "must be between 1 and fine_tuning.num_workers = auto"),
    (FineTuningConfig, {"min_workers": 3, "num_workers": 2}, "must be between 1 and fine_tuning.num_workers = 2"),
    (ConventionalConfig, {"epochs": 0.0}, "conventional.epochs = 0.0"),
    (ConventionalConfig, {"num_workers": 0}, "conventional.num_workers = 0"),
    (ActorsConfig, {"num_cpus": 0}, "actors.num_cpus = 0"),
    (ActorsConfig, {"num_gpus": 1.5}, "actors.num_gpus = 1.5"),
    (ActorsConfig, {"max_num": 0}, "actors.max_num = 0"),
    (ActorsConfig, {"quorum": 0}, "actors.quorum = 0"),
    (ActorsConfig, {"max_attempts": 0}, "actors.max_attempts = 0"),
    (ActorsConfig, {"checkpoint_s": 0.0}, "must be positive"),
    (ActorsConfig, {"checkpoint_epochs": 0.0}, "must be positive"),
    (ActorsConfig, {"stall_s": 0.0}, "actors.stall_s = 0.0 must be positive"),
    (ClusterConfig, {"address": "auto", "num_cpus": 2}, "leave them out with cluster.address"),
    (ClusterConfig, {"num_cpus": 0}, "cluster.num_cpus = 0"),
    (TrackingConfig, {"project": ""}, "tracking.project is empty"),
    (TrackingConfig, {"uri": "http://host:5000"}, "set tracking.to=mlflow or both"),
    (DataConfig, {"name": "s3://key:secret@bucket/set.parquet"}, "^(?!.*secret).*AWS_SECRET_ACCESS_KEY"),
    (DataConfig, {"name": "s3://key:sec/ret@bucket/set.parquet"}, "^(?!.*ret@).*AWS_SECRET_ACCESS_KEY"),
    (DataConfig, {"name": "abfs://box@account/set?sas_token=secret"}, "^(?!.*=secret).*AZURE_CLIENT_SECRET"),
    (DataConfig, {"name": "s3://bucket/set?access_key=me&secret_key=it"}, "^(?!.*=it).*AWS_SECRET_ACCESS_KEY"),
    (TrackingConfig, {"to": "mlflow", "uri": "https://me:secret@host/x"}, "^(?!.*secret).*MLFLOW_TRACKING_PASSWORD"),
    (TrackingConfig, {"to": "mlflow", "uri": "https://me:sec/ret@host/x"}, "^(?!.*ret@).*MLFLOW_TRACKING_PASSWORD"),
    (
        TrackingConfig,
        {"to": "mlflow", "uri": "https://host/x?token=secret"},
        "^(?!.*=secret).*MLFLOW_TRACKING_URI",
    ),
    (ClusterConfig, {"address": "me:secret@host:6379"}, "^(?!.*secret).*RAY_AUTH_TOKEN"),
    (ClusterConfig, {"address": "ray://host:10001?token=secret"}, "^(?!.*secret).*RAY_AUTH_TOKEN"),
    (Config, {"name": ""}, "name is empty"),
    (Config, {"name": "a/b"}, "must be a plain folder name"),
    (Config, {"name": ".."}, "must be a plain folder name"),
    (Config, {"name": "é" * 128}, "--name has 256 bytes: give at most 255"),
    (Config, {"name": "a\nb"}, r"name = 'a\\nb' holds '\\n'"),
    (Config, {"storage_path": ""}, "storage_path is empty"),
    (DataConfig, {"root": "a\0b"}, r"data.root = 'a\\x00b' holds"),
    (Config, {"seed": "x"}, "seed = 'x' should be int"),
    (ActorsConfig, {"num_cpus": 1.5}, "actors.num_cpus = 1.5 should be int"),
    (MinimizeConfig, {"batch_size": 2**63}, r"must be at least 1 and below 2\^63"),
    (TrunkConfig, {"epochs": math.inf}, "trunk.epochs = inf must be 0 or more and finite"),
    (TrunkConfig, {"epochs": 10**400}, "trunk.epochs = inf"),
]


@pytest.mark.parametrize(
    ("part", "fields", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_each_part_refuses_what_cannot_be(part, fields, message):
    with pytest.raises(ValueError, match=message):
        part(**fields)


def kinds_of(key: str) -> tuple[type, ...]:
    """The types that the field's annotation names."""
    part: Any = Config
    for name in key.split("."):
        part = typing.get_type_hints(part)[name]
    return typing.get_args(part) or (part,)


def test_every_number_has_a_range_that_ends():
    for key in flatten(Config().to_dict()):
        if not {int, float} & set(kinds_of(key)):
            continue
        beyond = [math.nan, math.inf, -math.inf] if float in kinds_of(key) else [2**63, -(2**63) - 1]
        for value in beyond:
            with pytest.raises(ValueError, match=re.escape(f"{key} = {value} must be ")):
                Config().with_overrides({key: value})


@pytest.mark.parametrize("key", ["minimize", "trunk", "fine_tuning"])
def test_a_learning_rate_of_nought_is_not_the_default(key):
    with pytest.raises(ValueError, match=rf"{key}.learning_rate = 0.0 must be positive"):
        Config().with_overrides({f"{key}.learning_rate": 0.0})


@pytest.mark.parametrize(
    "overrides", [{"trunk.learning_rate": 2.0}, {"fine_tuning.learning_rate": 2.0}, {"rounds.learning_rate_scale": 2.0}]
)
def test_what_an_optimizer_cannot_take_is_refused_in_every_stage(overrides):
    with pytest.raises(ValueError, match="at most 1"):
        Config().with_overrides({"minimize.optimizer": "gauss_newton", **overrides})


def test_whole_numbers_are_floats_where_floats_are_due():
    assert (
        Config(minimize=MinimizeConfig(epochs=3)).run_name() == Config(minimize=MinimizeConfig(epochs=3.0)).run_name()
    )


INDEPENDENT = {"subsets.start": "independent", "trunk.epochs": 0.0, "aggregation.method": "select_best"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (INDEPENDENT | {"trunk.epochs": 1.0}, "a trunk contradict each other: set trunk.epochs to 0"),
        (INDEPENDENT | {"rounds.num": 2}, "subsets.start must be shared"),
        ({"rounds.num": 2, "minimize.optimizer": "lbfgs"}, "use sgd, adam or adamw"),
        ({"rounds.num": 2, "minimize.tolerance": 0.1}, "use it with rounds.num=1"),
        ({"minimize.accumulation": 65}, "minimize.accumulation = 65 exceeds minimize.batch_size = 64"),
        ({"minimize.optimizer": "cg", "minimize.clip_norm": 1.0}, "minimize.clip_norm is for steps on batches"),
        ({"subsets.num": 2, "actors.quorum": 3}, "actors.quorum = 3 exceeds subsets.num = 2"),
        ({"subsets.shares": "A100=3, A100=1"}, "like A100=3.5,T4=1, each once"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_with_a_way_out(overrides, message):
    with pytest.raises(ValueError, match=message):
        Config().with_overrides(overrides)


def test_seeds_are_hashes_of_their_path():
    text = b'[3, "order", 0]'
    assert derive_seed(3, "order", 0) == int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") // 2
    paths = [(s, *p) for s in range(20) for p in [(), ("a",), ("b",), ("a", 0), ("a", 1), ("a", "0"), (0, "a")]]
    seeds = {derive_seed(*path) for path in paths}
    assert len(seeds) == len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_and_names_are_the_same_in_every_process():
    code = "from raysubset.config import *; print(derive_seed(5, 'minimize', 2), Config(seed=5).run_name())"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        told = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        assert told.split() == [str(derive_seed(5, "minimize", 2)), Config(seed=5).run_name()]


FREE = {  # where a run is kept and how it is placed
    "name",
    "storage_path",
    "data.root",
    "data.download",
    "actors.max_num",
    "actors.max_attempts",
    "actors.checkpoint_epochs",
    "actors.checkpoint_s",
    "actors.stall_s",
    "rounds.keep_minima",
    "actors.on_step",
    "actors.profile",
    "cluster.address",
    "cluster.num_cpus",
    "cluster.num_gpus",
    "cluster.wait_timeout_s",
    "tracking.to",
    "tracking.uri",
    "tracking.project",
    "tracking.group",
}
TOGETHER = {  # where one field cannot change alone
    "subsets.scheme": {"subsets.scheme": "iid"},
    "subsets.column": {"subsets.scheme": "column", "subsets.column": "site"},
    "subsets.function": {"subsets.scheme": "function", "subsets.function": "m:f"},
    "subsets.fraction": {"subsets.fraction": 0.5},
    "subsets.start": INDEPENDENT,
    "model.name": {"model.name": "mlp"},
    "minimize.objective": {"minimize.objective": "m:f"},
    "minimize.loop": {"minimize.loop": "m:f"},
    "actors.on_step": {"actors.on_step": "m:f"},
    "minimize.gradients": {"minimize.gradients": "bfloat16"},
    "minimize.gradient_tolerance": {"minimize.optimizer": "cg", "minimize.gradient_tolerance": 1e-3},
    "minimize.patience": {"minimize.optimizer": "cg", "minimize.patience": 3},
    "tracking.uri": {"tracking.to": "mlflow", "tracking.uri": "sqlite:///runs.db"},
    "fine_tuning.num_workers": {"fine_tuning.num_workers": 2},
    "fine_tuning.min_workers": {"fine_tuning.num_workers": 2, "fine_tuning.min_workers": 1},
}


WORDS = (
    "measured",
    "average",
    "true",
    "activations",
    "evaluate",
    "pswa",
    "isotropic",
    "wus",
    "conventional",
    "group",
    "adam",
    "constant",
    "cosine",
    "squared_error",
    "wandb",
    "float32",
    "select_best",
    "mean",
    "characters",
    "regression",
    "balanced",
    "quadratic",
    "int8",
)
VALUES = (True, False, 1, 2, 0.25, 0.75, *WORDS, "validation_loss", "reinit", "best", "none", "x")


def other_values(key: str) -> dict[str, Any]:
    """Overrides that change this field of the default config, and others only where they must."""
    if key in TOGETHER:
        return TOGETHER[key]
    value = flatten(Config().to_dict())[key]
    for candidate in VALUES:
        if value is None or (type(candidate) is type(value) and candidate != value):
            with contextlib.suppress(ValueError):
                Config().with_overrides({key: candidate})
                return {key: candidate}
    raise AssertionError(f"no other value for {key}")


def test_the_runs_name_changes_exactly_with_what_shapes_the_result():
    usual, usual_name = Config().to_dict(), Config().run_name()
    for key in flatten(usual):
        changed = Config().with_overrides(other_values(key))
        found = {name for name, _, _ in differences(usual, changed.to_dict())}
        if key == "name":
            assert changed.run_name() == changed.name
        else:
            assert (changed.run_name() != usual_name) == (key not in FREE), key
        assert (key in found) == (key not in FREE), key
        assert shapes_result(key) == (key not in FREE), key


def test_a_runs_name_tells_data_model_and_method():
    config = Config(data=DataConfig(name="s3://bucket/photos v2.parquet"), method="conventional")
    assert len(Config(data=DataConfig(name="x" * 300)).run_name()) < 100
    assert Config(model=ModelConfig(name="cnn")).run_name().startswith("digits-cnn-")
    name = config.run_name()
    assert name.startswith("photos-v2.parquet-conventional-")
    assert Config(name=name).name == name  # a plain folder name


def test_differences_tell_old_and_new():
    old, new = Config(), Config(seed=4, storage_path="/elsewhere").with_overrides({"minimize.epochs": 2.0})
    assert list(differences(old.to_dict(), new.to_dict())) == [("minimize.epochs", 8.0, 2.0), ("seed", 0, 4)]
    assert list(differences({"gone": 1}, {})) == [("gone", 1, None)]


def test_stages_take_their_own_epochs_learning_rate_and_schedule():
    config = Config(minimize=MinimizeConfig(learning_rate=0.3, target_loss=0.1)).with_overrides(
        {"trunk.epochs": 2.0, "fine_tuning.epochs": 3.0, "fine_tuning.learning_rate": 0.02}
    )
    assert config.stage("subsets") == config.minimize
    trunk, fine_tuning = config.stage("trunk"), config.stage("fine_tuning")
    assert (trunk.epochs, trunk.learning_rate, trunk.schedule, trunk.target_loss) == (2.0, 0.3, "constant", None)
    assert (fine_tuning.epochs, fine_tuning.learning_rate, fine_tuning.target_loss) == (3.0, 0.02, None)
    assert config.stage("fine_tuning", epochs=0.5).epochs == config.stage("trunk", epochs=0.5).epochs == 0.5
    assert config.stage("conventional", epochs=5.0) == dataclasses.replace(
        config.minimize, epochs=5.0, target_loss=None
    )


def test_each_optimizer_and_model_has_defaults_of_its_own():
    assert [MinimizeConfig(optimizer=name).peak_learning_rate() for name in ("sgd", "adam", "lbfgs")] == [0.1, 2e-3, 1]
    assert MinimizeConfig(learning_rate=0.5).peak_learning_rate() == 0.5
    assert ModelConfig(name="cifar_resnet").size() == (16, 20)
    assert ModelConfig(name="cnn", width=32).size() == (32, 2)


def test_a_written_value_is_a_number_a_truth_value_none_or_a_word():
    written = {"100": 100, "0.05": 0.05, "1e-3": 1e-3, "true": True, "False": False, "None": None, "cosine": "cosine"}
    assert {word: parse_value(word) for word in written} == written
    assert type(parse_value("1")) is int


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("data.target", {"1": "1", "true": "true", "None": None}),  # the names of columns
        ("model.name", {"3": "3", "None": "None"}),
        ("data.augmentation", {"none": "none"}),
        ("subsets.size", {"100": 100, "None": None}),
        ("fine_tuning.num_workers", {"2": 2, "auto": "auto"}),
        ("data.nothing.like.it", {"1": 1}),
    ],
)
def test_the_value_of_a_setting_that_is_text_is_never_read_as_a_number(name, values):
    assert {word: parse_value(word, field_type(Config, name)) for word in values} == values


def test_a_config_from_before_a_field_was_added_has_its_default_and_what_is_unreadable_stays():
    now = Config(name="x").to_dict()
    before = {**now, "data": {"name": "digits"}, "kind": "sweep"}
    assert of_now(before) == now | {"kind": "sweep"}
    assert of_now({"minimize": {"of_tomorrow": 1}}) == {"minimize": {"of_tomorrow": 1}}


@pytest.mark.parametrize(
    ("give", "text"),
    [
        (lambda: Config(minimize={"epochs": 3}), "minimize = {'epochs': 3} is no MinimizeConfig: give a Min"),  # type: ignore[arg-type]
        (lambda: MinimizeConfig(averaging="ema"), "minimize.averaging = 'ema' is no AveragingConfig: give an?"),  # type: ignore[arg-type]
        (lambda: Config(data=None), "data = None is no DataConfig"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_part_of_a_config_is_refused_in_a_line(give, text):
    with pytest.raises(ValueError, match=text):
        give()
