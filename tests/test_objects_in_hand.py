"""Objects in the place of names: what stands for them, what other processes get, and what tells that they changed."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray import cloudpickle
from torch import nn

from raysubset import fingerprints
from raysubset.comparison.checks import checked_arms
from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.objects_in_hand import accepts_objects, hold_objects
from raysubset.pipeline import run
from raysubset.planning import make_plan
from raysubset.run_directory import RunDirectory
from raysubset.tasks import Regression, Spec, Task, task_to_dict
from raysubset.trained_model import ModelRecord, load_model, save_model
from raysubset.user_code import source_files
from raysubset.user_code.given import Given, held_objects, hold
from raysubset.user_code.object_digests import object_fingerprint
from raysubset.user_code.source_files import Workplace
from raysubset.work import seeded_model
from raysubset.work.identity import identify
from tests.tiny import default_dtype, same_bits, weights

DRAWS = np.random.default_rng(0)
ARRAYS = {"inputs": DRAWS.normal(size=(80, 4)).astype(np.float32), "target": DRAWS.normal(size=80)}


def net(*, bias: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    nn.init.constant_(network[2].bias, bias)  # pyright: ignore[reportArgumentType]
    return network


def local_class() -> type[nn.Module]:
    """A class that no process finds by its name, as one of a notebook."""

    class Net(nn.Module):
        def __init__(self, spec: Spec) -> None:
            super().__init__()
            self.layer = nn.Linear(spec.inputs[0], spec.outputs[0])

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(inputs)

    return Net


class Halves(Task):
    quality = "near"

    def fit(self, train):
        self.largest = float(train["target"].max())
        return self

    def spec(self):
        return Spec((4,), (1,))

    def batch(self, rows, draws):
        return rows["inputs"], rows["target"][:, None] / 2

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum()

    def measure(self, outputs, targets):
        return {"near": (outputs - targets).abs().squeeze(1) < 1}


def config_of(**overrides: object) -> Config:
    return Config().with_overrides({"task.name": "regression", "subsets.num": 2} | overrides)


@pytest.mark.parametrize(
    "data",
    [
        ARRAYS,
        (ARRAYS["inputs"], ARRAYS["target"]),
        {name: torch.from_numpy(array) for name, array in ARRAYS.items()},
        {"train": ARRAYS, "test": {name: array[:20] for name, array in ARRAYS.items()}},
        pa.table({f"x{k}": ARRAYS["inputs"][:, k] for k in range(4)} | {"target": ARRAYS["target"]}),
        torch.utils.data.TensorDataset(torch.from_numpy(ARRAYS["inputs"]), torch.from_numpy(ARRAYS["target"])),
        lambda: ARRAYS,
    ],
    ids=["dict", "pair", "tensors", "splits", "table", "Dataset", "function"],
)
def test_data_in_hand_are_read_as_what_a_function_returns(data):
    with hold_objects(config_of(), data=data) as config:
        assert config.data.name == "given:data"
        full_set = load_full_set(*config.learned)
    assert full_set.spec == Spec((4,), (1,))
    assert full_set.notes[0].endswith("examples of the data given")


def test_texts_in_hand_are_learned():
    with hold_objects(
        config_of(**{"task.name": "next_token", "data.window": 8}), data=["a text of some words " * 20]
    ) as config:
        assert load_full_set(*config.learned).spec.num_values == 256


def test_a_network_in_hand_is_the_shared_start_and_stays_as_it_is():
    given = net(bias=2.0)
    with hold_objects(config_of(), data=ARRAYS, model=given) as config:
        assert config.model.name == "given:Sequential"
        full_set = load_full_set(*config.learned)
        plan = make_plan(config, full_set)
        made = seeded_model(config, full_set)
        nn.init.zeros_(made[0].weight)  # pyright: ignore[reportIndexIssue]
        assert same_bits(weights(seeded_model(config, full_set)), weights(net(bias=2.0)))
    assert same_bits(weights(given), weights(net(bias=2.0)))
    assert "given:Sequential brings its own weights, which the shared start has, whatever the seed" in map(
        str, plan.advice
    )


def test_a_class_in_hand_draws_its_weights_by_the_seed():
    with hold_objects(config_of(), data=ARRAYS, model=local_class()) as config:
        full_set = load_full_set(*config.learned)
        ours, other = seeded_model(config, full_set), seeded_model(config.with_overrides({"seed": 1}), full_set)
        assert config.model.name == "given:Net"
        assert same_bits(weights(ours), weights(seeded_model(config, full_set)))
        assert not same_bits(weights(ours), weights(other))


def test_a_function_without_arguments_makes_a_network():
    with hold_objects(config_of(), data=ARRAYS, model=lambda: net()) as config:
        assert config.model.name == "given:function"
        assert seeded_model(config, load_full_set(*config.learned))(torch.zeros(2, 4)).shape == (2, 1)


def test_two_objects_of_one_name_stay_two():
    network, task = lambda: net(), lambda: 3
    with hold_objects(config_of(**{"task.name": "auto"}), model=network, task=task) as config:
        assert held_objects().objects[config.model.name] is network
        assert held_objects().objects[config.task.name] is task


def test_threads_that_hold_objects_of_one_name_at_once_have_their_own():
    both_hold = threading.Barrier(2, timeout=20)
    widths = {}

    def hold_one(width: int) -> None:
        with hold_objects(config_of(), model=nn.Linear(4, width)) as config:
            both_hold.wait()
            widths[width] = held_objects().objects[config.model.name]().out_features
            both_hold.wait()

    other = threading.Thread(target=hold_one, args=(1,))
    other.start()
    hold_one(2)
    other.join()
    assert widths == {1: 1, 2: 2}
    assert not held_objects().objects


@pytest.mark.parametrize(
    "of_caller",
    [torch.inference_mode, torch.no_grad, partial(torch.device, "meta"), partial(default_dtype, torch.float64)],
)
def test_what_the_caller_has_set_in_torch_changes_nothing_and_stays(of_caller):
    @accepts_objects
    def plan(config: Config, *, data: Any = None) -> nn.Module:
        full_set = load_full_set(*config.learned)
        make_plan(config, full_set)
        return seeded_model(config, full_set)

    with of_caller():
        before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        model = plan(config_of(), data=ARRAYS)
        assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    model(torch.zeros(2, 4)).sum().backward()
    assert same_bits(weights(model), weights(plan(config_of(), data=ARRAYS)))


def test_what_a_module_has_is_named_by_it():
    with hold_objects(Config(), model=net, task=Regression, data=config_of) as config:
        assert (config.model.name, config.data.name) == ("tests.test_objects_in_hand:net", f"{__name__}:config_of")
        assert config.task.name == "raysubset.tasks.regression:Regression"
        assert not held_objects().objects


def test_another_process_has_what_the_driver_was_given_without_the_data(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = local_class()(Spec((4,), (1,)))
    with hold_objects(config_of(), data=ARRAYS, model=model) as config:
        full_set = load_full_set(*config.learned)
        sent = cloudpickle.dumps(held_objects().for_others())  # pyright: ignore
        fingerprints = held_objects().fingerprints
    assert not held_objects().objects
    place = Workplace(str(tmp_path / "missing"), (), partial(cloudpickle.loads, sent))
    try:
        place.enter()
        assert {*held_objects().objects} == {"given:Net"}
        assert held_objects().fingerprints == fingerprints
        with hold_objects(config):  # as a sweep's trial calls run()
            assert held_objects().load is place.load_given  # for the processes that this one starts
        with hold_objects(config_of(), data=ARRAYS):
            assert held_objects().load is None
        assert same_bits(weights(seeded_model(config, full_set)), weights(model))
        identity = identify([config], {config.learned: full_set}, None)  # as a sweep's trial, which has the full set
        assert [table.equals(full_set.fingerprint) for table in identity.data.values()] == [True]
    finally:
        hold(Given())


def changes(**objects) -> list[str]:
    """What tells a run of ARRAYS and net() that it is resumed with others."""

    def identity(data=ARRAYS, model=None):
        with hold_objects(config_of(), data=data, model=model or net()) as config:
            return identify([config], {}, None)

    return identity(**objects).changed(identity())


def test_changed_objects_under_an_old_name_are_found():
    assert not changes()
    shifted, scaled = ({"target": change(ARRAYS["target"])} for change in (lambda x: x + 1, np.exp))
    assert changes(data=ARRAYS | shifted)[0].startswith("data changed: what training rows decide ")
    assert "train target has other bytes" in changes(data=ARRAYS | scaled)[0]
    assert changes(model=net(bias=1.0)) == ["code changed: given:Sequential's tensors has other bytes"]
    relu = nn.Sequential(*net()[:1], nn.ReLU(), net()[2])  # pyright: ignore[reportIndexIssue]
    (changed,) = changes(model=relu)
    assert changed.startswith("code changed: given:Sequential ")


def test_modes_gradients_and_where_tensors_are_do_not_count_as_changes():
    trained = net()
    trained(torch.ones(2, 4)).sum().backward()
    assert not changes(model=torch.nn.DataParallel(trained.eval()))


SCALE = 1.0


def test_code_is_known_by_what_it_does():
    def made(factor: float, *, scaled: bool = False):
        def inner(x):
            return x * factor * SCALE if scaled else x * factor

        return inner

    digests = [object_fingerprint("f", made(*options)) for options in ((1.0,), (1.0,), (2.0,))]
    assert digests[0] == digests[1] != digests[2]
    first = object_fingerprint("f", made(1.0, scaled=True))
    globals()["SCALE"] = 2.0
    try:
        assert object_fingerprint("f", made(1.0, scaled=True)) != first
    finally:
        globals()["SCALE"] = 1.0


@pytest.mark.parametrize(
    ("imported", "used"),
    [
        ("from tools_in_hand import part", "part.double(3)"),
        ("import tools_in_hand.part as tools", "tools.double(3)"),
        ("import tools_in_hand", "(lambda: tools_in_hand.part.double(3))()"),
        ("from tools_in_hand.part import double", "double(3)"),
    ],
)
def test_changes_of_modules_that_code_in_hand_uses_are_found(tmp_path, monkeypatch, imported: str, used: str):
    """Its files are what other processes import."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(source_files, "_first_read", {})
    (tmp_path / "tools_in_hand").mkdir()
    part = tmp_path / "tools_in_hand" / "part.py"
    part.write_text("def double(x): return 2 * x\n")
    script: dict[str, Any] = {"__name__": "__main__"}
    exec(f"import tools_in_hand.part\n{imported}\ndef function(): return {used}", script)
    try:
        assert script["function"]() == 6
        first = object_fingerprint("f", script["function"])
        assert first == object_fingerprint("f", script["function"])
        part.write_text("def double(x): return 3 * x\n")
        with pytest.raises(ValueError, match=r"call importlib.reload\(tools_in_hand.part\)"):
            object_fingerprint("f", script["function"])
        source_files._first_read.clear()  # as in a later process
        (changed,) = fingerprints.changes(first, object_fingerprint("f", script["function"]))
        assert changed == "tools_in_hand/part.py has other bytes"
    finally:
        for name in ("tools_in_hand", "tools_in_hand.part"):
            sys.modules.pop(name, None)


def test_digests_are_the_same_in_every_process(tmp_path):
    """Without the order of sets, addresses and the random numbers that pickled classes have."""
    script = tmp_path / "script.py"
    script.write_text(
        "from raysubset.user_code.object_digests import object_fingerprint\n"
        "def helper(x): return x in {'a', 'b', 'c'} and again(x)\n"
        "def again(x): return helper(x)\n"
        "class Base:\n    words = frozenset(('d', 'e', 'f'))\n"
        "class Made(Base):\n    @property\n    def one(self): return helper(1)\n"
        "    @staticmethod\n    def two(x=helper): return super\n"
        "made = Made(); made.own = {'x', 'y', 'z'}, [1.5, None], helper, {helper, again, made}\n"
        "print(object_fingerprint('given:Made', made).to_pylist())\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def hooked() -> nn.Module:
    network = net()
    network.get_parameter("2.weight").register_hook(lambda gradient: 0 * gradient)
    return network


def locked() -> nn.Module:
    network = net()
    network.lock = threading.Lock()  # pyright: ignore[reportArgumentType]
    return network


INDEPENDENT = {"subsets.start": "independent", "trunk.epochs": 0, "aggregation.method": "select_best"}

MISTAKES = {
    "name too": (
        {"model": net()},
        {"model.name": "mlp"},
        "model is given as an object, and model.name = 'mlp' too: leave",
    ),
    "data too": ({"data": ARRAYS}, {"data.name": "diabetes"}, "data.name = 'diabetes' too: leave one of them out"),
    "a path": ({"data": "a.csv"}, {}, "data = 'a.csv' is a name, or a path: set data.name of the config; texts are"),
    "a name": ({"model": "mlp"}, {}, "model = 'mlp' is a name, or a path: set model.name of the config"),
    "hooked": ({"model": hooked()}, {}, "a hook on the gradient of 2.weight, .*: give a function that creates"),
    "lazy": ({"model": nn.LazyLinear(1)}, {}, r"without a shape yet \(weight, bias\): pass a batch through it first"),
    "locked": (
        {"model": locked()},
        {},
        "given:Sequential cannot be given to other processes, .* '_thread.lock' object",
    ),
    "no network": ({"model": 3}, {}, "model is an int: give an nn.Module, or a function of a Spec that"),
    "no task": ({"task": 3}, {"task.name": "auto"}, "task is an int: give a raysubset.tasks.Task, or a class of it"),
    "no data": ({"data": 3}, {}, "data is an int: give an Arrow table"),
    "other outputs": ({"model": nn.Linear(4, 2)}, {}, r"given:Linear gave float32 \[2, 2\] for two inputs"),
    "other task": ({"task": lambda: 3}, {"task.name": "auto"}, "made an int: it should be a raysubset.tasks.Task"),
    "independent": ({"model": net()}, INDEPENDENT, "subsets.start=independent draws new weights"),
    "perturbed": ({"model": net()}, {"fine_tuning.start": "shrink_perturb"}, "start=shrink_perturb draws new weights"),
}


@pytest.mark.parametrize(("objects", "overrides", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_stand_for_a_name_is_refused_in_a_line_before_ray(objects, overrides, message):
    with (
        pytest.raises(ValueError, match=message) as caught,
        hold_objects(
            config_of(**overrides), **{"data": None if "data.name" in overrides else ARRAYS} | objects
        ) as config,
    ):
        make_plan(config, load_full_set(*config.learned))
    assert "\n" not in str(caught.value)
    assert not held_objects().objects


def test_settings_in_a_dict_are_refused_with_the_call_that_takes_them():
    with pytest.raises(ValueError, match=r"^config is a dict: give a raysubset.Config, such as Config\(\).with_overr"):
        run({"seed": 3})  # pyright: ignore[reportArgumentType]


def test_a_config_that_names_an_object_asks_for_it_again():
    with hold_objects(config_of(), data=ARRAYS) as config:
        full_set = load_full_set(*config.learned)
    for field in ("data", "model", "task"):
        config = Config().with_overrides({f"{field}.name": "given:Net"})
        with pytest.raises(ValueError, match=rf"{field}.name = 'given:Net' stands for .*: give it again, {field}=…"):
            identify([config], {} if field == "data" else {config.learned: full_set}, None)
    with hold_objects(
        config_of(**{"model.name": "given:Sequential", "data.name": "given:data"}), data=ARRAYS, model=net()
    ):
        pass  # as a resume by the run's own config.json


@pytest.mark.parametrize("arm", ["E", "F"])
def test_a_comparison_refuses_arms_that_draw_weights_anew_for_a_network_in_hand(arm):
    with hold_objects(config_of(), model=net()) as config:
        with pytest.raises(ValueError, match="draws new weights, and given:Sequential is a network that has its own"):
            checked_arms(config, [0, 1], [2.0], ["B", "G", arm], [0.1])
        checked_arms(config, [0, 1], [2.0], ["B", "G"], [0.1])


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) * float(np.asarray(self.layer.bias.detach()).sum() > -9)


def saved(directory: RunDirectory, model: nn.Module) -> dict[str, torch.Tensor]:
    with hold_objects(config_of(), data=ARRAYS, model=model) as config:
        record = ModelRecord(config.model, load_full_set(*config.learned).task)
        save_model(directory, weights(model), record)
    return weights(model)


def test_a_model_is_loaded_elsewhere_by_its_graph_or_by_the_object_again(tmp_path):
    directory = RunDirectory(str(tmp_path), "traced")
    own = saved(directory, net(bias=1.0))
    inputs = torch.from_numpy(ARRAYS["inputs"])
    outputs = load_model(directory.uri)(inputs)
    again = load_model(directory.uri, model=net())
    assert same_bits(weights(again.network), own)
    torch.testing.assert_close(again(inputs), outputs)
    with pytest.raises(ValueError, match="the run was given no task as an object, but one by name: leave task out"):
        load_model(directory.uri, task=Regression)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("given", [{}, {"model": net(), "task": Halves()}])
def test_a_loaded_model_is_copied_and_pickled_and_its_copy_trains_alone(tmp_path, again, given):
    directory = RunDirectory(str(tmp_path), "traced")
    task = given.get("task")
    with hold_objects(Config() if task else config_of(), data=ARRAYS, model=net(), task=task) as config:
        record = ModelRecord(config.model, load_full_set(*config.learned).task)
        save_model(directory, weights(net(bias=1.0)), record)
    model, inputs = load_model(directory.uri, **given), torch.from_numpy(ARRAYS["inputs"])
    outputs, same = model(inputs), again(model)
    assert torch.equal(same(inputs), outputs)
    assert task_to_dict(same.record.task) == task_to_dict(model.record.task)
    same(inputs).sum().backward()
    with torch.no_grad():
        for parameter in same.parameters():
            parameter -= parameter.grad
    assert not torch.equal(same(inputs), outputs)
    assert torch.equal(model(inputs), outputs)
    model.load_state_dict(same.state_dict())
    assert torch.equal(model(inputs), same(inputs))


def test_a_graph_that_is_set_to_train_warns_that_it_remains_that_of_evaluation(tmp_path):
    saved(RunDirectory(str(tmp_path), "traced"), net())
    model = load_model(RunDirectory(str(tmp_path), "traced").uri)
    with pytest.warns(UserWarning, match="its batch norms keep their statistics"):
        model.train()


def test_a_network_without_a_graph_is_asked_for_again(tmp_path):
    directory = RunDirectory(str(tmp_path), "untraced")
    own = saved(directory, _Untraceable())
    for trusted in (False, True):
        with pytest.raises(ValueError, match=r"give it again, "):
            load_model(directory.uri, trust_code=trusted)
    assert same_bits(weights(load_model(directory.uri, model=_Untraceable()).network), own)
