"""minimize_packed(): equal to one minimize() after another, whatever members differ in, stop at or resume from."""

import copy
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raysubset.config import MinimizeConfig, ModelConfig
from raysubset.config.minimizing import AveragingConfig, ExtrapolationConfig, SkippingConfig
from raysubset.data import Examples
from raysubset.data.examples import OwnAugmentation
from raysubset.models import build_model
from raysubset.tasks import CrossEntropy, Spec, SquaredError
from raysubset.training import (
    DivergedError,
    MinimizeResult,
    Progress,
    minimize,
    minimize_packed,
    packed,
    try_packing,
    why_not_packed,
)
from tests.tiny import (
    CROSS_ENTROPY,
    SQUARED_ERROR,
    cnn,
    examples,
    linear,
    losses_between_steps,
    noisy_network,
    same_bits,
    through_a_file,
    weights,
    zero,
)

RECIPE = MinimizeConfig(epochs=3.0, batch_size=8, learning_rate=0.05)


class Untraceable(nn.Module):
    """Batch-norm, a frozen scale, tied layers, and a branch on the data that torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.head = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(images).flatten(1)
        if images.shape[0] > 1:
            features = torch.relu(self.first(features)) * self.scale
        return self.head(self.second(features))


class Counting(nn.Module):
    """forward() changes buffers itself: a counter, in place or by assignment, and a moving mean by assignment."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.head, self.in_place = linear(64), in_place
        self.register_buffer("num", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.head(images)
        if self.in_place:
            self.num += 1
        else:
            self.num = self.num + 1
            self.mean = 0.9 * self.mean + 0.1 * outputs.detach().mean(0)
        return outputs if self.in_place else outputs - self.mean


def of_layers(kind: str) -> nn.Module:
    """Layers that are not what their classes say: parametrized, or with hooks on them or on the whole network; or with
    an attribute that cannot be copied."""
    first = nn.Conv2d(1, 4, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(first)
    elif kind == "lock":
        first.lock = threading.Lock()  # pyright: ignore[reportAttributeAccessIssue]
    elif kind == "layer_hook":
        first.register_forward_hook(lambda _, inputs, outputs: outputs - outputs.mean(1, keepdim=True))
    else:
        model.register_forward_hook(lambda _, inputs, outputs: outputs.mul(2))
    return model


MADE: dict[str, Callable[[], nn.Module]] = {
    "untraceable": Untraceable,
    "counting": partial(Counting, in_place=True),
    "assigning": partial(Counting, in_place=False),
    **{kind: partial(of_layers, kind) for kind in ("weight_norm", "lock", "layer_hook", "network_hook")},
}


def build(name: str, seed: int) -> nn.Module:
    options: dict[str, Any] = {"cifar_resnet": {"width": 4, "depth": 8}, "mlp": {"width": 8}, "cnn": {"width": 4}}
    if name in MADE:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return MADE[name]()
    norm: Any = "group" if name == "group_cnn" else "batch"
    config = ModelConfig(name=name.removeprefix("group_"), norm=norm, **options[name.removeprefix("group_")])
    model = build_model(config, Spec((1, 8, 8), (3,)), seed=seed)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@dataclass
class Members:
    """Members with weights, examples and orders of their own, in float64."""

    sizes: Sequence[int] = (30, 30, 30)
    augmentation: Any = "crop_flip"
    network: Callable[[int], nn.Module] = field(default=lambda seed: cnn(seed=seed))
    objective: CrossEntropy | SquaredError = CROSS_ENTROPY
    own_augmentation: OwnAugmentation | None = None

    def models(self) -> list[nn.Module]:
        return [self.network(seed).double() for seed in range(len(self.sizes))]

    def examples(self) -> list[Examples]:
        options: dict[str, Any] = {"augmentation": self.augmentation, "objective": self.objective}
        members = [examples(size, seed=i, **options) for i, size in enumerate(self.sizes)]
        return [replace(member, augmentation=self.own_augmentation) for member in members]

    def one_by_one(
        self, config: MinimizeConfig, **options: Sequence[Any]
    ) -> tuple[list[nn.Module], list[MinimizeResult]]:
        models, results = self.models(), []
        for i, (model, own) in enumerate(zip(models, self.examples(), strict=True)):
            mine = {name.removesuffix("s"): copy.deepcopy(value[i]) for name, value in options.items()}
            results.append(minimize(model, own, config, seed=100 + i, **mine))
        return models, results

    def packed(self, config: MinimizeConfig, **options: Any) -> tuple[list[nn.Module], list[Any]]:
        models = self.models()
        seeds = [100 + i for i in range(len(models))]
        return models, minimize_packed(models, self.examples(), config, seeds=seeds, **options)


def assert_same(a: Any, b: Any) -> None:
    """Nested states equal to 1e-10, keys, dtypes and counts exactly."""
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-10, abs=1e-10, nan_ok=True)
    else:
        assert a == b


def assert_same_results(
    packed: tuple[list[nn.Module], list[Any]], one_by_one: tuple[list[nn.Module], list[MinimizeResult]]
) -> None:
    for i, (result, expected) in enumerate(zip(packed[1], one_by_one[1], strict=True)):
        assert_same(weights(packed[0][i]), weights(one_by_one[0][i]))
        assert result.outcome == expected.outcome
        assert [record.to_dict() for record in result.history] == [
            pytest.approx(record.to_dict(), rel=1e-10, nan_ok=True) for record in expected.history
        ]
        assert_same(result.optimizer, expected.optimizer)
        counts = (result.cost.num_forward, result.cost.num_backward, result.cost.num_steps)
        assert counts == (expected.cost.num_forward, expected.cost.num_backward, expected.cost.num_steps)


@pytest.mark.parametrize("name", ["cnn", "group_cnn", "mlp", "cifar_resnet", *MADE])
def test_packed_equals_one_by_one_for_every_kind_of_network(name: str) -> None:
    members = Members(network=lambda seed: build(name, seed))
    assert_same_results(members.packed(RECIPE), members.one_by_one(RECIPE))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam", "learning_rate": 0.01},
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"optimizer": "muon", "weight_decay": 0.1},
        {"optimizer": "muon", "momentum": 0.0},
        {"clip_norm": 0.3},
        {"objective": SQUARED_ERROR},
        {"objective": CrossEntropy(label_smoothing=0.1), "schedule": "one_cycle"},
        {"channels_last": False, "schedule": "warmup_linear"},
        {"epochs": 2.4},
    ],
)
def test_packed_equals_one_by_one_for_every_recipe(changes: dict[str, Any]) -> None:
    recipe: dict[str, Any] = {"epochs": 3.0, "batch_size": 8, "learning_rate": 0.05} | changes
    members = Members(objective=recipe.pop("objective", CROSS_ENTROPY))
    config = MinimizeConfig(**recipe)
    assert_same_results(members.packed(config), members.one_by_one(config))


@pytest.mark.parametrize("sizes", [(30, 30, 30), (30, 31, 47)])
def test_a_users_augmentation_gets_the_batches_of_one_member(sizes: Sequence[int]) -> None:
    members = Members(sizes, own_augmentation=OwnAugmentation("tests.own_augmentations:mixed"))
    assert_same_results(members.packed(RECIPE), members.one_by_one(RECIPE))


def test_members_of_unequal_size_have_batches_rates_and_ends_of_their_own() -> None:
    members = Members(sizes=(30, 31, 47, 9))
    packed = members.packed(RECIPE)
    assert [result.cost.num_steps for result in packed[1]] == [12, 12, 18, 6]
    assert_same_results(packed, members.one_by_one(RECIPE))


@pytest.mark.parametrize("changes", [{"target_loss": 1.0}, {"tolerance": 0.02}])
def test_each_member_stops_at_its_own_loss(changes: dict[str, float]) -> None:
    config = MinimizeConfig(epochs=12.0, batch_size=8, learning_rate=0.05, **changes)  # pyright: ignore
    members = Members()
    packed = members.packed(config)
    assert len({len(result.history) for result in packed[1]}) > 1
    assert_same_results(packed, members.one_by_one(config))


def test_a_member_that_diverges_goes_back_to_its_best_weights_and_the_others_go_on() -> None:
    config = MinimizeConfig(epochs=10.0, batch_size=8, learning_rate=0.05, schedule="one_cycle")
    members = Members(
        network=lambda seed: Scaled(4.0 if seed == 1 else 1.0), objective=SQUARED_ERROR
    )  # 16 times the curvature
    packed = members.packed(config)
    assert [result.outcome for result in packed[1]] == ["epochs", "diverged", "epochs"]
    assert_same_results(packed, members.one_by_one(config))


def test_a_member_whose_last_step_goes_to_infinity_goes_back_to_its_best_weights() -> None:
    config = MinimizeConfig(epochs=2, batch_size=64, learning_rate=1e304, momentum=0, schedule="cosine")
    span = (1.0, 0.0)  # backwards: of rates 0 and 5e303, in float64
    members = Members(network=lambda seed: Scaled(1e6 if seed == 1 else 1e-3))  # times which the gradient overflows
    packed = members.packed(config, schedule_span=span)
    assert [result.outcome for result in packed[1]] == ["epochs", "diverged", "epochs"]
    assert_same_results(packed, members.one_by_one(config, schedule_spans=[span] * 3))


class Scaled(nn.Module):
    """A linear layer over the pixels, enlarged."""

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = linear(64)
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images * self.factor)


def test_a_member_without_a_finite_loss_is_an_error_of_its_own() -> None:
    members = Members()
    models = members.models()
    with torch.no_grad():
        next(iter(models[1].parameters())).fill_(math.nan)
    results = minimize_packed(models, members.examples(), RECIPE, seeds=[100, 101, 102])
    assert isinstance(results[1], DivergedError)
    assert "the loss became nan in epoch 1" in str(results[1])
    expected, _ = members.one_by_one(RECIPE)
    for i in (0, 2):
        assert_same(weights(models[i]), weights(expected[i]))


@pytest.mark.parametrize(("optimizer", "step"), [("sgd", 3), ("adam", 4), ("muon", 7), ("muon", 3), ("sgd", 7)])
def test_a_packed_state_is_the_loops_own_and_goes_on_in_either(optimizer: Any, step: int) -> None:
    config = MinimizeConfig(epochs=3.0, batch_size=8, learning_rate=0.02, optimizer=optimizer)
    members, taken, expected = Members(), {}, {}

    def stop_pack(progress: Mapping[int, Progress]) -> bool:
        if progress[0].step == step:
            taken.update({i: through_a_file(own.capture()) for i, own in progress.items()})
        return progress[0].step == step

    _, results = members.packed(config, on_step=stop_pack)
    assert [result.outcome for result in results] == ["stopped"] * 3

    def stop_at(i: int) -> Callable[[Progress], bool]:
        def stop(progress: Progress) -> bool:
            if progress.step == step:
                expected[i] = through_a_file(progress.capture())
            return progress.step == step

        return stop

    members.one_by_one(config, on_steps=[stop_at(i) for i in range(3)])
    assert_same(taken, expected)

    whole, _ = members.one_by_one(config)
    for states in ([taken[i] for i in range(3)], [expected[i] for i in range(3)], [taken[0], None, expected[2]]):
        for models, _ in (members.packed(config, states=states), members.one_by_one(config, states=states)):
            for model, reference in zip(models, whole, strict=True):
                assert_same(weights(model), weights(reference))


class ConvolvedLayouts(TorchDispatchMode):
    """Remembers whether each convolution's images lie channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args[0].stride(1) == 1)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num", [1, 2])
def test_images_lie_channels_last_also_for_the_last_member_of_a_pack(num: int) -> None:
    models = [cnn(seed=seed) for seed in range(num)]
    with ConvolvedLayouts() as layouts:
        minimize_packed(models, [examples()] * num, MinimizeConfig(epochs=0.1), seeds=list(range(num)))
    assert layouts.seen == [True, True]  # both convolutions


def test_the_next_round_starts_with_each_members_momenta() -> None:
    members = Members()
    _, first = members.one_by_one(RECIPE)
    momenta = [result.optimizer for result in first]
    config, span = RECIPE, (0.5, 1.0)
    expected = members.one_by_one(config, optimizer_states=momenta, schedule_spans=[span] * 3)
    assert_same_results(members.packed(config, optimizer_states=momenta, schedule_span=span), expected)


def test_a_state_at_the_end_is_done_at_once() -> None:
    members, states = Members(), {}
    members.one_by_one(
        RECIPE, on_steps=[lambda p, i=i: states.update({i: through_a_file(p.capture())}) for i in range(3)]
    )
    models, results = members.packed(RECIPE, states=[states[i] for i in range(3)])
    assert [(result.outcome, result.cost.num_steps) for result in results] == [("epochs", 0)] * 3
    assert all(same_bits(weights(model), states[i]["model"]) for i, model in enumerate(models))


def test_the_time_of_a_pack_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(packed, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))  # a second a look
    _, results = Members(sizes=(30, 30, 9)).packed(RECIPE)
    assert sum(result.cost.device_s for result in results) == pytest.approx(next(clock) - 1)


def test_another_thread_that_asks_for_a_members_running_loss_is_told_of_none_or_of_one_epochs() -> None:
    members = Members(sizes=(24, 16), augmentation="none", network=lambda seed: zero(64))
    recipe = replace(RECIPE, epochs=10_000, learning_rate=1e-12)
    losses = losses_between_steps(lambda on_step: members.packed(recipe, on_step=on_step))
    told = [loss for loss in losses if not math.isnan(loss)]
    assert told
    assert told == pytest.approx([math.log(3)] * len(told))


def test_what_cannot_be_packed_is_told() -> None:
    assert why_not_packed(cnn(), RECIPE) is None
    assert "dropout" in str(why_not_packed(noisy_network(), RECIPE))
    for words, config in {
        "lbfgs": MinimizeConfig(optimizer="lbfgs"),
        "extrapolation": MinimizeConfig(extrapolation=ExtrapolationConfig(kind="past_local")),
        "averaging": MinimizeConfig(averaging=AveragingConfig(kind="ema")),
        "skipping": MinimizeConfig(skipping=SkippingConfig(kind="wus")),
        "epoch_fraction": MinimizeConfig(epoch_fraction=0.5),
        "compile": MinimizeConfig(compile=True),
    }.items():
        assert words in str(why_not_packed(cnn(), config))
    hooked = [linear(64), linear(64), linear(64)]
    next(hooked[0].parameters()).register_hook(lambda gradient: 0 * gradient)
    hooked[1].register_full_backward_hook(lambda *_: None)
    hooked[2].register_forward_hook(lambda _, inputs, outputs: outputs.add(hooked[2].get_parameter("1.bias")))
    assert all("hooks on gradients" in str(why_not_packed(model, RECIPE)) for model in hooked)


def test_noise_that_a_forward_function_draws_is_refused_by_vmap() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 3)

        def forward(self, images: Tensor) -> Tensor:
            return F.dropout(self.head(images.flatten(1)), training=self.training)

    with pytest.raises(RuntimeError, match="randomness"):
        Members(network=lambda seed: Noisy()).packed(RECIPE)


def test_mixed_precision_follows_one_by_one_within_its_rounding() -> None:
    config = MinimizeConfig(epochs=1.0, batch_size=8, learning_rate=0.01, precision="bfloat16")
    models, alone = [cnn(seed=i) for i in range(2)], [cnn(seed=i) for i in range(2)]
    own = [examples(seed=i) for i in range(2)]
    minimize_packed(models, own, config, seeds=[0, 1])
    for i in range(2):
        minimize(alone[i], own[i], config, seed=i)
        for key, value in weights(alone[i]).items():
            torch.testing.assert_close(weights(models[i])[key], value, rtol=2e-2, atol=5e-3)


def test_a_trial_times_both_ways_counts_its_cost_and_leaves_the_models_alone() -> None:
    models, own = [linear(64, seed=i) for i in range(3)], [examples(seed=i) for i in range(3)]
    before = [weights(model) for model in models]
    trial = try_packing(models, own, MinimizeConfig(batch_size=8))
    assert trial.ratio == trial.packed_s / (3 * trial.single_s)
    assert trial.pays == (trial.ratio < 0.9)
    assert trial.cost.num_steps == 5 * 11 * 4  # repeats × steps × (one and three members)
    assert all(same_bits(weights(model), was) for model, was in zip(models, before, strict=True))


def test_a_trial_refuses_what_would_not_equal_one_by_one() -> None:
    class Partly(nn.Module):
        def __init__(self, branch: bool) -> None:
            super().__init__()
            self.head, self.unused = nn.Linear(64, 3), nn.Linear(2, 2)
            self.branch = branch

        def forward(self, images: Tensor) -> Tensor:
            outputs = self.head(images.flatten(1))
            return outputs * 2 if self.branch and outputs.sum() > 0 else outputs

    own = [examples(seed=i) for i in range(2)]
    with pytest.raises(ValueError, match=r"the loss does not depend on the parameter unused\.weight"):
        try_packing([Partly(False), Partly(False)], own, RECIPE)
    branching = [Partly(True), Partly(True)]
    for model in branching:
        del model.unused
    with pytest.raises(ValueError, match="data-dependent control flow"):
        try_packing(branching, own, RECIPE)
