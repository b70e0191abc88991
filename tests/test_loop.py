"""minimize(): equal to a loop by hand, to the last bit, and equal to itself however it is interrupted."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysubset.aggregation import mean_optimizer_state
from raysubset.config import ExtrapolationConfig, MinimizeConfig, SkippingConfig, derive_seed
from raysubset.data import Examples
from raysubset.tasks import Classification, CrossEntropy, SquaredError
from raysubset.training import (
    Cost,
    DivergedError,
    EpochRecord,
    MinimizeResult,
    Progress,
    Shard,
    minimize,
    num_steps_per_epoch,
)
from raysubset.training.optimizers import learning_rate_at
from raysubset.training.records import reached
from tests.tiny import (
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


def optimizer_by_hand(model: nn.Module, config: MinimizeConfig) -> torch.optim.Optimizer:
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight") and "norm" not in name]
    spared = [p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0}]
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0 and config.extrapolation.kind == "none"
        return torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=nesterov, fused=True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](groups, fused=True)


def loss_by_hand(outputs: Tensor, labels: Tensor, objective: CrossEntropy | SquaredError) -> Tensor:
    """Summed over the examples."""
    if isinstance(objective, SquaredError):
        targets = torch.eye(outputs.shape[1], dtype=outputs.dtype)[labels]
        return (outputs - targets).square().sum() / outputs.shape[1]
    return F.cross_entropy(outputs, labels, label_smoothing=objective.label_smoothing, reduction="sum")


def loop_by_hand(model: nn.Module, data: Examples, config: MinimizeConfig, seed: int) -> list[float]:
    """An epoch's order and augmentation come from its number, a step's dropout from the step's; returns mean losses."""
    assert isinstance(data.task, Classification)
    optimizer = optimizer_by_hand(model, config)
    per_epoch = math.ceil(len(data) / config.batch_size)
    num_steps, losses, step = round(config.epochs * per_epoch), [], 0
    model.train()
    for epoch in range(math.ceil(config.epochs)):
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        order = torch.randperm(len(data), generator=generator)
        draws = data.draw(derive_seed(seed, "augmentation", epoch))
        summed, num = 0.0, 0
        for indices in order.tensor_split(per_epoch)[: num_steps - step]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(config, step, num_steps=num_steps)
            torch.manual_seed(derive_seed(seed, "noise", 0, step))
            images, labels = data.batch(indices, draws=draws, channels_last=config.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                outputs = model(images)
            loss = loss_by_hand(outputs.float(), labels, data.task.objective)
            optimizer.zero_grad()
            (loss * (1 / len(indices))).backward()
            optimizer.step()
            summed, num, step = summed + loss.item(), num + len(indices), step + 1
        losses.append(summed / num)
    return losses


EXTRAPOLATIONS: list[Literal["past_local", "past_global", "isotropic", "filter_scaled"]]
EXTRAPOLATIONS = ["past_local", "past_global", "isotropic", "filter_scaled"]  # by nothing: heavy-ball momentum
RECIPES = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant"},
    {"optimizer": "sgd", "schedule": "one_cycle", "label_smoothing": 0.1},
    {"optimizer": "sgd", "schedule": "warmup_linear", "weight_decay": 0.1},
    {"optimizer": "adam", "weight_decay": 0.1},
    {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "one_cycle"},
    {"optimizer": "sgd", "precision": "bfloat16"},
    *({"extrapolation": ExtrapolationConfig(kind=kind, rate=0.0), "weight_decay": 0.1} for kind in EXTRAPOLATIONS),
]


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: "-".join(str(getattr(v, "kind", v)) for v in recipe.values())
)
@pytest.mark.parametrize("network", [cnn, noisy_network])
def test_the_loop_equals_one_written_by_hand_to_the_last_bit(network, recipe):
    changes = dict(recipe)
    objective = CrossEntropy(label_smoothing=changes.pop("label_smoothing", 0.0))
    config = MinimizeConfig(epochs=2.5, batch_size=8, **changes)
    data = examples(30, augmentation="crop_flip", objective=objective)
    ours, by_hand = network(), network()
    result = minimize(ours, data, config, seed=3)
    losses = loop_by_hand(by_hand, data, config, seed=3)
    assert same_bits(weights(ours), weights(by_hand))
    assert [record.loss for record in result.history] == pytest.approx(losses, rel=1e-12)
    assert result.outcome == "epochs"


def test_squared_error_is_the_mean_over_examples_and_outputs():
    config, data = MinimizeConfig(epochs=2, batch_size=8, learning_rate=0.01), examples(objective=SQUARED_ERROR)
    ours, by_hand = cnn(), cnn()
    result = minimize(ours, data, config, seed=3)
    losses = loop_by_hand(by_hand, data, config, seed=3)
    assert [record.loss for record in result.history] == pytest.approx(losses, rel=1e-5)
    for name, value in weights(by_hand).items():
        torch.testing.assert_close(weights(ours)[name], value)


def test_without_gradients_weight_decay_moves_weights_and_spares_biases_and_norms():
    model = cnn()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
    model.head.weight.data.zero_()  # type: ignore[union-attr]  # so that no gradient reaches the blocks
    before = weights(model)
    config = MinimizeConfig(
        epochs=1, batch_size=64, momentum=0, weight_decay=0.25, learning_rate=0.1, schedule="constant"
    )
    minimize(model, examples(), config, seed=0)
    after = weights(model)
    torch.testing.assert_close(after["block0.conv.weight"], before["block0.conv.weight"] * (1 - 0.1 * 0.25))
    assert torch.equal(after["block0.norm.weight"], before["block0.norm.weight"])
    assert torch.equal(after["block0.norm.bias"], before["block0.norm.bias"])


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_a_batch_passed_in_parts_has_the_whole_batchs_gradient_and_cost(num_parts):
    recipe, data = MinimizeConfig(epochs=2.5, batch_size=8), examples(30, augmentation="crop_flip")
    whole, model = (cnn("none").to(torch.float64) for _ in range(2))
    expected = minimize(whole, data, recipe, seed=3)
    result = minimize(model, data, replace(recipe, accumulation=num_parts), seed=3)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=0, atol=1e-11)
    assert replace(result.cost, device_s=0) == replace(expected.cost, device_s=0)
    assert [record.loss for record in result.history] == pytest.approx([r.loss for r in expected.history], rel=1e-9)


def test_a_part_at_a_time_is_passed_forward_and_what_is_watched_is_the_whole_batch():
    sizes, watched, data, model = list[int](), list[int](), examples(30), linear(64)
    model.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))

    class Watched(Classification):
        def watched(self, outputs: Tensor, targets: Tensor) -> Tensor:
            watched.append(len(outputs))
            return super().watched(outputs, targets)

    assert isinstance(data.task, Classification)
    data = replace(data, task=Watched(data.task.inputs, data.task.class_names, data.task.objective))
    recipe = MinimizeConfig(epochs=1, batch_size=8, accumulation=3, skipping=SkippingConfig(kind="wus"))
    minimize(model, data, recipe, seed=0)
    assert sizes == [3, 3, 2, 3, 3, 2, 3, 2, 2, 3, 2, 2]
    assert watched == [8, 8, 7, 7]


@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_a_longer_gradient_is_scaled_to_the_length_asked_for_and_a_shorter_one_left(clip_norm):
    recipe = MinimizeConfig(epochs=1, batch_size=30, learning_rate=0.1, momentum=0, weight_decay=0, schedule="constant")
    moves = []
    for changes in ({}, {"clip_norm": clip_norm}):
        model = linear(64)
        before = weights(model)
        minimize(model, examples(), replace(recipe, **changes), seed=0)
        moves.append(torch.cat([(value - before[key]).flatten() for key, value in weights(model).items()]) / 0.1)
    plain, clipped = moves
    assert 0.05 < plain.norm() < 100
    assert clipped.norm().item() == pytest.approx(min(clip_norm, plain.norm().item()), rel=1e-4)
    torch.testing.assert_close(clipped / clipped.norm(), plain / plain.norm(), atol=1e-4, rtol=0)


def test_a_tolerance_stops_at_the_first_epoch_that_gains_less_than_its_share():
    recipe = MinimizeConfig(epochs=30, batch_size=8, learning_rate=0.02, schedule="constant")
    losses = [record.loss for record in minimize(linear(64), examples(), recipe, seed=1).history]
    gains = [1 - b / a for a, b in itertools.pairwise(losses)]
    tolerance = sorted(gains)[len(gains) // 2]
    first = next(i for i, gain in enumerate(gains) if gain < tolerance)
    result = minimize(linear(64), examples(), replace(recipe, tolerance=tolerance), seed=1)
    assert result.outcome == "tolerance"
    assert [record.loss for record in result.history] == losses[: first + 2]


def test_a_target_stops_at_the_first_epoch_that_reaches_it():
    recipe = MinimizeConfig(epochs=10, batch_size=8, learning_rate=0.02, schedule="constant")
    losses = [record.loss for record in minimize(linear(64), examples(), recipe, seed=1).history]
    target = losses[4]
    result = minimize(linear(64), examples(), replace(recipe, target_loss=target), seed=1)
    assert result.outcome == "target"
    assert len(result.history) == 1 + next(i for i, loss in enumerate(losses) if loss <= target)


@pytest.mark.parametrize(
    ("epochs", "num_steps", "epochs_seen"),
    [(0.01, 1, [0.25]), (0.5, 2, [0.5]), (1.0, 4, [1.0]), (1.25, 5, [1.0, 1.25]), (2.5, 10, [1.0, 2.0, 2.5])],
)
def test_fractions_of_epochs_stop_within_one(epochs, num_steps, epochs_seen):
    result = minimize(linear(64), examples(30), MinimizeConfig(epochs=epochs, batch_size=8), seed=0)
    assert result.cost.num_steps == num_steps
    assert [record.epoch for record in result.history] == epochs_seen


def test_divergence_restores_the_best_epochs_weights_and_forgets_the_moments():
    recipe = MinimizeConfig(epochs=20, batch_size=64, learning_rate=50, momentum=0.9, schedule="constant")
    data, model, best = examples(objective=SQUARED_ERROR), linear(64), linear(64)
    result = minimize(model, data, recipe, seed=1)
    losses = [record.loss for record in result.history]
    assert result.outcome == "diverged"
    assert losses[-1] > 10 * losses[0]
    assert max(losses[:-1]) <= 10 * losses[0]
    minimize(best, data, replace(recipe, epochs=1 + losses.index(min(losses))), seed=1)
    assert same_bits(weights(model), weights(best))
    slower = replace(recipe, epochs=1, learning_rate=0.01)
    other = minimize(linear(64), data, slower, seed=1)
    assert same_bits(mean_optimizer_state([result.optimizer, other.optimizer]), other.optimizer)  # zeros would halve it
    begun, anew = linear(64), linear(64)
    minimize(begun, data, slower, seed=2, optimizer_state=result.optimizer)
    minimize(anew, data, slower, seed=2)
    assert same_bits(weights(begun), weights(anew))


def test_a_loss_that_is_nan_in_the_first_epoch_is_refused_with_a_way_out():
    config = MinimizeConfig(epochs=2, batch_size=8, learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"epoch 1 with a peak learning rate of 1e\+30: lower the"):
        minimize(cnn("none"), examples(), config, seed=0)


def test_a_last_step_to_infinity_is_a_divergence_although_no_loss_has_seen_it():
    one_step = MinimizeConfig(epochs=1, batch_size=64, learning_rate=1e39, schedule="constant")
    with pytest.raises(DivergedError, match="the loss became nan in epoch 1"):
        minimize(linear(64), examples(), one_step, seed=0)
    two_steps = replace(one_step, epochs=2, schedule="cosine")
    model = linear(64)
    result = minimize(model, examples(), two_steps, seed=0, schedule_span=(1.0, 0.0))  # backwards: of rates 0 and 5e38
    assert result.outcome == "diverged"
    assert same_bits(weights(model), weights(linear(64)))


@dataclass(frozen=True, eq=False)
class Recorded(Examples):
    """Remembers which examples were asked for."""

    batches: list[list[int]] = field(default_factory=list)

    def batch(self, indices: Tensor, **options) -> tuple[Tensor, Tensor]:
        self.batches.append(indices.tolist())
        return super().batch(indices, **options)


def recorded(num: int) -> Recorded:
    data = examples(num)
    return Recorded(data.rows, data.task)


@pytest.mark.parametrize("num", [1, 7, 8, 9, 17, 30])
def test_batches_are_all_but_equal_and_cover_every_example_once_an_epoch(num):
    data, config = recorded(num), MinimizeConfig(epochs=3, batch_size=8)
    minimize(linear(64), data, config, seed=2)
    per_epoch = num_steps_per_epoch(num, config)
    assert len(data.batches) == 3 * per_epoch
    epochs = [data.batches[i : i + per_epoch] for i in range(0, len(data.batches), per_epoch)]
    for batches in epochs:
        assert sorted(itertools.chain(*batches)) == list(range(num))
        sizes = {len(batch) for batch in batches}
        assert max(sizes) <= 8
        assert max(sizes) - min(sizes) <= 1
    assert num < 7 or epochs[0] != epochs[1]


def test_another_seed_gives_another_minimum_and_the_same_seed_the_same():
    def ends_at(seed: int) -> dict[str, Tensor]:
        model = noisy_network()
        minimize(model, examples(), MinimizeConfig(epochs=1, batch_size=8), seed=seed)
        return weights(model)

    assert same_bits(ends_at(1), ends_at(1))
    assert not same_bits(ends_at(1), ends_at(2))


def test_the_global_generator_neither_matters_nor_moves():
    def ends_at(global_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        before, model = torch.get_rng_state(), noisy_network()
        minimize(model, examples(augmentation="crop_flip"), MinimizeConfig(epochs=1, batch_size=8), seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        return weights(model)

    assert same_bits(ends_at(0), ends_at(1))


def test_cost_counts_every_example_and_step():
    costs: list[Cost] = []
    data = examples(30)
    result = minimize(
        linear(64), data, MinimizeConfig(epochs=1.5, batch_size=8), seed=0, on_step=lambda p: costs.append(p.cost)
    )
    assert [cost.num_forward for cost in costs] == [8, 16, 23, 30, 38, 46]  # batches of 8, 8, 7 and 7
    assert [cost.num_steps for cost in costs] == [1, 2, 3, 4, 5, 6]
    assert (result.cost.num_forward, result.cost.num_backward, result.cost.num_steps) == (46, 46, 6)
    assert result.cost.device_s >= costs[-1].device_s > costs[0].device_s > 0


def rates(result: MinimizeResult) -> list[float]:
    return [record.learning_rate for record in result.history]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "warmup_linear"])
def test_two_rounds_of_half_a_schedule_have_the_learning_rates_of_one_run(schedule):
    recipe = MinimizeConfig(epochs=5, batch_size=64, schedule=schedule)  # one step an epoch, so each rate is recorded
    whole = minimize(linear(64), examples(), replace(recipe, epochs=10), seed=0)
    halves = [minimize(linear(64), examples(), recipe, seed=0, schedule_span=span) for span in ((0.0, 0.5), (0.5, 1.0))]
    assert [*rates(halves[0]), *rates(halves[1])] == pytest.approx(rates(whole), rel=1e-12)


def test_a_second_round_goes_on_with_the_moments_of_the_first():
    recipe = MinimizeConfig(epochs=5, batch_size=64, schedule="constant", learning_rate=0.01)
    unbroken, model = linear(64, dtype=torch.float64), linear(64, dtype=torch.float64)
    minimize(unbroken, examples(), replace(recipe, epochs=10), seed=0)
    first = minimize(model, examples(), recipe, seed=0)
    minimize(model, examples(), recipe, seed=1, optimizer_state=through_a_file(first.optimizer))
    for name, value in weights(unbroken).items():  # whole batches: the order only changes the sums' last bits
        torch.testing.assert_close(weights(model)[name], value, rtol=0, atol=1e-12)


def test_bfloat16_is_refused_where_it_would_be_ignored():
    with pytest.raises(ValueError, match=r"needs float32 parameters; these are float64: set it to auto"):
        minimize(linear(64, dtype=torch.float64), examples(), MinimizeConfig(precision="bfloat16"), seed=0)


def test_more_workers_than_examples_in_a_batch_are_refused():
    with pytest.raises(ValueError, match="batches of 3 examples cannot be shared by 4 workers"):
        minimize(linear(64), examples(7), MinimizeConfig(batch_size=4), seed=0, shard=Shard(0, 4))


def test_both_memory_layouts_end_at_the_same_minimum():
    config = MinimizeConfig(epochs=1, batch_size=8, learning_rate=0.01)
    last, default = cnn(), cnn().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    minimize(last, examples(), config, seed=0)
    minimize(default, examples(), replace(config, channels_last=False), seed=0)
    for name, value in weights(default).items():
        torch.testing.assert_close(weights(last)[name], value, rtol=1e-3, atol=1e-4)


def test_a_compiled_network_ends_at_the_same_minimum(monkeypatch: pytest.MonkeyPatch):
    """As torch traces it. That inductor's code computes the same is torch's to test: 10 s of a CPU without a cache."""
    graphs: list[nn.Module] = []

    def as_traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=as_traced))
    config = MinimizeConfig(epochs=1, batch_size=15, learning_rate=0.01)
    compiled, eager = linear(64), linear(64)
    minimize(compiled, examples(), replace(config, compile=True), seed=0)
    assert graphs
    minimize(eager, examples(), config, seed=0)
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], value)


def test_progress_tells_epochs_and_the_last_epochs_loss():
    told: list[tuple[float, float, bool]] = []
    result = minimize(
        linear(64),
        examples(30),
        MinimizeConfig(epochs=1.5, batch_size=8),
        seed=0,
        on_step=lambda p: told.append((p.epoch, p.loss, p.epoch_ended)),
    )
    assert [epoch for epoch, _, _ in told] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    assert [ended for _, _, ended in told] == [False, False, False, True, False, True]
    assert math.isnan(told[0][1])
    assert [told[3][1], told[4][1], told[5][1]] == [result.history[i].loss for i in (0, 0, 1)]
    assert result.history[0] == EpochRecord(1.0, told[3][1], result.history[0].learning_rate, 4)


@pytest.mark.parametrize("size", [9, 3])
def test_another_thread_that_asks_for_the_running_loss_is_told_of_none_or_of_one_epochs(size: int):
    recipe = MinimizeConfig(epochs=10_000, batch_size=size, learning_rate=1e-12)
    losses = losses_between_steps(lambda on_step: minimize(zero(64), examples(9), recipe, seed=0, on_step=on_step))
    told = [loss for loss in losses if not math.isnan(loss)]
    assert told == pytest.approx([math.log(3)] * len(told))  # as each example's, and no sum by another epoch's number
    assert bool(told) == (size < 9)  # an epoch of one batch has ended whenever it is asked


@pytest.mark.parametrize(
    ("losses", "outcome"),
    [
        ([-1.0, -1.1], None),
        ([-1.0, 0.5], None),
        ([-1.0, 8.5], "diverged"),
        ([-1.0, -1.001], "tolerance"),
        ([-1.0, -1.009], "tolerance"),
        ([1.0, 9.5], "tolerance"),
        ([1.0, 10.5], "diverged"),
        ([0.0, 1e-9], "diverged"),
    ],
)
def test_losses_below_zero_diverge_and_stand_still_by_their_size(losses, outcome):
    recipe = MinimizeConfig(tolerance=0.01 if outcome == "tolerance" else None)
    history = [EpochRecord(number, loss, 0.1, number) for number, loss in enumerate(losses, 1)]
    assert reached(recipe, Progress(9, 1, history=history)) == outcome


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_parameters_without_elements_change_nothing(optimizer):
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.none = linear(64), nn.ParameterList([torch.zeros(4, 0), torch.zeros(0)])

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images) + sum(parameter.sum() for parameter in self.none)

    recipe = MinimizeConfig(optimizer=optimizer, epochs=1.0, batch_size=8)
    plain, model = linear(64), Empty()
    for each in (plain, model):
        minimize(each, examples(), recipe, seed=0)
    assert same_bits(weights(model.net), weights(plain))
