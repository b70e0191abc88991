"""Extrapolation, averaging, skipping and distillation against recursions written out, torch's own and hand counts."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from raysubset.config import AveragingConfig, Config, ExtrapolationConfig, MinimizeConfig, SkippingConfig
from raysubset.data import load_full_set
from raysubset.planning import make_plan
from raysubset.training import Distillation, MinimizeResult, Progress, Shard, evaluate, minimize, recompute_batch_norm
from raysubset.training.techniques.averaging import Averaging
from raysubset.training.techniques.extrapolation import Extrapolation
from raysubset.training.techniques.skipping import Skipping
from tests.tiny import (
    SQUARED_ERROR,
    cnn,
    examples,
    linear,
    noisy_network,
    same_bits,
    through_a_file,
    weights,
    with_labels,
)

STEADY = MinimizeConfig(batch_size=8, epochs=3, learning_rate=0.02, schedule="constant")  # 4 steps an epoch of 30


# Extrapolation


def descend(
    start: Tensor,
    gradient: Callable[[Tensor], Tensor],
    config: ExtrapolationConfig,
    *,
    rate: float,
    num_steps: int,
    momentum: float = 0.0,
    decay: float = 0.0,
) -> list[Tensor]:
    """Where one worker's weights go on a field of gradients."""
    w = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([w], lr=rate, momentum=momentum, weight_decay=decay)
    extrapolation, path = Extrapolation(config, optimizer, seed=0, rank=0), []
    for step in range(num_steps):
        extrapolation.look_ahead(rate, step)
        w.grad = gradient(w.detach().clone())
        extrapolation.come_back(lambda: None)
        optimizer.step()
        path.append(w.detach().clone())
    return path


@pytest.mark.parametrize("kind", ["past_local", "past_global"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_one_worker_follows_the_past_extragradient_recursion(kind, accelerated):
    curvature = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    rate, share, momentum, decay = 0.2, 0.75, 0.6, 0.05
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    config = ExtrapolationConfig(kind=kind, rate=share, accelerated=accelerated)
    ours = descend(start, lambda w: curvature @ w, config, rate=rate, num_steps=20, momentum=momentum, decay=decay)
    w, v, g = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for at in ours:
        half = w - share * rate * g - (rate * momentum * v if accelerated else 0)
        g = curvature @ half + decay * half
        v = momentum * v + g
        w = w - rate * v
        torch.testing.assert_close(at, w, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("times", [0.97, 1.03])
def test_it_is_stable_on_a_curvature_up_to_two_over_rate_and_twice_the_extrapolation(share, times):
    curvature = 3.0
    rate = times * 2 / (curvature * (1 + 2 * share))  # γλ + 2γ̂λ = 2 at 1; then γ̂λ < 1 holds
    start = torch.ones(1, dtype=torch.float64)
    config = ExtrapolationConfig(kind="past_local", rate=share)
    end = descend(start, lambda w: curvature * w, config, rate=rate, num_steps=1000)[-1].abs().item()
    assert end < 1e-3 if times < 1 else end > 1e3


def test_it_converges_on_a_rotation_where_plain_descent_diverges():
    def rotation(w: Tensor) -> Tensor:
        return torch.stack((w[1], -w[0]))

    start = torch.ones(2, dtype=torch.float64)
    with_it = descend(start, rotation, ExtrapolationConfig(kind="past_local", rate=1.0), rate=0.5, num_steps=200)
    plain = descend(start, rotation, ExtrapolationConfig(kind="past_local", rate=0.0), rate=0.5, num_steps=200)
    assert with_it[-1].norm() < 1e-6
    assert plain[-1].norm() > 1e6


KINDS = ["past_local", "past_global", "isotropic", "filter_scaled"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accelerated", [False, True])
def test_weights_come_back_to_the_same_bits_in_the_same_memory_with_one_buffer_beside_them(kind, accelerated):
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    config = ExtrapolationConfig(kind=kind, accelerated=accelerated)
    extrapolation = Extrapolation(config, optimizer, seed=0, rank=0)
    for step in range(3):
        before, places = weights(model), [p.data_ptr() for p in model.parameters()]
        extrapolation.look_ahead(0.1, step)
        assert same_bits(before, weights(model)) == (step == 0 and kind.startswith("past"))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        extrapolation.come_back(lambda: None)
        assert same_bits(before, weights(model))
        assert [p.data_ptr() for p in model.parameters()] == places
        held = [value for value in vars(extrapolation).values() if isinstance(value, dict)]
        assert sum(b.numel() for buffers in held for b in buffers.values()) == sum(
            p.numel() for p in model.parameters()
        )
        optimizer.step()


def noise(kind: str, model: nn.Module, *, rank: int = 0, step: int = 0) -> list[Tensor]:
    """How far the weights are moved, with a learning rate of 0.1 and a rate of 0.5."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    extrapolation = Extrapolation(ExtrapolationConfig(kind=kind, rate=0.5), optimizer, seed=3, rank=rank)  # type: ignore[arg-type]
    extrapolation.look_ahead(0.1, step)
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


def test_isotropic_noise_has_the_extrapolation_rate_for_standard_deviation():
    (moved, _) = noise("isotropic", linear(1000, 100, dtype=torch.float64))
    assert moved.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(moved.mean().item()) < 0.001


def test_filter_scaled_noise_is_as_long_as_the_rate_times_each_filter():
    model = cnn("none")
    for p, moved in zip(model.parameters(), noise("filter_scaled", model), strict=True):
        before = p.detach() - moved
        if p.ndim > 1:
            torch.testing.assert_close(moved.flatten(1).norm(dim=1), 0.05 * before.flatten(1).norm(dim=1))
        else:
            torch.testing.assert_close(moved.norm(), 0.05 * before.norm())


def test_noise_is_drawn_anew_by_step_and_worker_and_again_by_seed():
    same, again = noise("isotropic", cnn()), noise("isotropic", cnn())
    assert same_bits(same, again)
    assert not same_bits(same, noise("isotropic", cnn(), step=1))
    assert not same_bits(same, noise("isotropic", cnn(), rank=1))


def test_extrapolation_costs_no_pass():
    plain = minimize(cnn(), examples(), STEADY, seed=0).cost
    ahead = minimize(cnn(), examples(), replace(STEADY, extrapolation=ExtrapolationConfig(kind="past_local")), seed=0)
    assert (ahead.cost.num_forward, ahead.cost.num_backward) == (plain.num_forward, plain.num_backward) == (90, 90)


# Averaging


def along_the_way(recipe: MinimizeConfig, network: Callable[[], nn.Module] = cnn, num: int = 30) -> list[nn.Module]:
    """Copies of the network after every step of a run."""
    model, copies = network(), []

    def keep(progress: Progress) -> None:
        copy = network()
        copy.load_state_dict(weights(model))
        copies.append(copy)

    minimize(model, examples(num), recipe, seed=3, on_step=keep)
    return copies


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def mean(models: list[nn.Module]) -> list[Tensor]:
    return [torch.stack(values).mean(0) for values in zip(*map(parameters, models), strict=True)]


def averaged(recipe: MinimizeConfig, **averaging: Any) -> nn.Module:
    model = cnn()
    minimize(model, examples(), replace(recipe, averaging=AveragingConfig(**averaging)), seed=3)
    return model


def assert_close(ours: nn.Module, expected: list[Tensor]) -> None:
    for value, other in zip(parameters(ours), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)


def test_pswa_that_evaluates_ends_at_the_mean_of_the_last_epochs_samples():
    ours = averaged(STEADY, kind="pswa", period=0.5, feedback="evaluate")
    path = along_the_way(STEADY)
    assert_close(ours, mean([path[9], path[11]]))  # after steps 10 and 12


def test_pswa_that_evaluates_ends_at_the_last_epoch_that_had_samples():
    recipe = replace(STEADY, epochs=2.25)  # the last part is a single step
    ours = averaged(recipe, kind="pswa", period=0.5, feedback="evaluate")
    path = along_the_way(recipe)
    assert_close(ours, mean([path[5], path[7]]))  # after steps 6 and 8


def test_pwalks_that_evaluates_ends_at_the_mean_of_the_last_k_samples_of_whatever_epoch():
    ours = averaged(STEADY, kind="pwalks", period=0.5, num_samples=5, feedback="evaluate")
    path = along_the_way(STEADY)
    assert_close(ours, mean([path[i] for i in (3, 5, 7, 9, 11)]))


def test_pswm_is_the_moving_mean_of_the_samples():
    ours = averaged(STEADY, kind="pswm", period=0.5, decay=0.6, feedback="evaluate")
    path = along_the_way(STEADY)
    expected = parameters(path[1])
    for i in (3, 5, 7, 9, 11):
        expected = [0.6 * e + 0.4 * p for e, p in zip(expected, parameters(path[i]), strict=True)]
    assert_close(ours, expected)


def test_ema_is_torchs():
    ours, reference = averaged(STEADY, kind="ema", decay=0.8), None
    for model in along_the_way(STEADY):
        reference = reference or AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        reference.update_parameters(model)
    assert reference is not None
    assert same_bits(parameters(ours), [p.detach() for p in reference.parameters()])


def test_swa_is_torchs_over_the_epochs_that_end_after_its_start():
    recipe = replace(STEADY, epochs=5)
    ours = averaged(recipe, kind="swa", swa_start=0.5)
    path = along_the_way(recipe)
    reference = AveragedModel(path[11], multi_avg_fn=get_swa_multi_avg_fn())
    for step in (12, 16, 20):
        reference.update_parameters(path[step - 1])
    assert same_bits(parameters(ours), [p.detach() for p in reference.parameters()])


@pytest.mark.parametrize("kind", ["pswa", "pwalks", "pswm"])
def test_a_restart_goes_on_from_the_average_with_the_momentum_as_it_was(kind):
    averaging = AveragingConfig(kind=kind, period=0.5, num_samples=3, decay=0.5)
    ours = cnn("group")
    minimize(ours, examples(), replace(STEADY, epochs=2, averaging=averaging), seed=3)

    recipe, by_hand, samples, states = replace(STEADY, epochs=2), cnn("group"), [], []

    def sample(progress: Progress) -> bool:
        if progress.step % 2 == 0:
            samples.append([p.clone() for p in parameters(by_hand)])
        if progress.epoch_ended:
            last = samples[-2:] if kind == "pswa" else samples[-3:]
            if kind == "pswm":
                now = samples[0]
                for other in samples[1:]:
                    now = [0.5 * a + 0.5 * b for a, b in zip(now, other, strict=True)]
            else:
                now = [torch.stack(values).mean(0) for values in zip(*last, strict=True)]
            with torch.no_grad():
                for p, value in zip(by_hand.parameters(), now, strict=True):
                    p.copy_(value)
            states.append(through_a_file(progress.capture()))
        return progress.epoch_ended

    minimize(by_hand, examples(), recipe, seed=3, on_step=sample)
    minimize(by_hand, examples(), recipe, seed=3, state=states[0], on_step=sample)
    assert_close(ours, parameters(by_hand))


@pytest.mark.parametrize("kind", ["pwalks", "ema"])
def test_a_state_from_another_device_goes_on_beside_the_parameters(kind):
    config = AveragingConfig(kind=kind, period=1.0)
    before = Averaging(config, cnn(), num_steps=4, num_steps_per_epoch=1)
    before.after_step(1)
    after = Averaging(config, cnn().to("meta"), num_steps=4, num_steps_per_epoch=1)
    after.load_state_dict(through_a_file(before.state_dict()))
    after.after_step(2)
    assert after.end_epoch(2, last=True)
    state = after.state_dict()
    held = [*state["average"], *(p for sample in state["samples"] for p in sample)]
    assert len(held) == (2 if kind == "pwalks" else 1) * len(list(cnn().parameters()))
    assert {p.device.type for p in held} == {"meta"}


def test_after_averaging_the_running_statistics_are_those_of_the_average():
    ours = averaged(STEADY, kind="pswa", period=0.25)
    found, counts = dict(ours.named_buffers()), weights(ours)
    recompute_batch_norm(ours, examples(), STEADY)
    assert any("running_mean" in name for name in found)
    for name, value in ours.named_buffers():
        torch.testing.assert_close(counts[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("feedback", "num_averages"), [("restart", 3), ("evaluate", 1)])
def test_the_examples_passed_forward_for_running_statistics_are_counted(feedback, num_averages):
    recipe = replace(STEADY, averaging=AveragingConfig(kind="pswa", period=0.5, feedback=feedback))
    cost = minimize(cnn(), examples(), recipe, seed=0).cost
    assert (cost.num_forward, cost.num_backward) == (3 * 30 + num_averages * 30, 3 * 30)
    assert minimize(cnn("group"), examples(), recipe, seed=0).cost.num_forward == 3 * 30


def test_running_statistics_take_a_bounded_number_of_examples_and_fewer_along_the_way():
    averaging = AveragingConfig(kind="pswm", period=1.0)
    recipe = replace(STEADY, epochs=3, batch_size=1000, averaging=averaging)
    assert minimize(cnn(), examples(3000, 4), recipe, seed=0).cost.num_forward == 3 * 3000 + 2 * 500 + 2048


# Skipping


def feed(skipping: Skipping, step: int, num_correct: int) -> None:
    """A step of ten examples of which so many are predicted rightly."""
    outputs = F.one_hot(torch.tensor([0] * num_correct + [1] * (10 - num_correct)), 3).float()
    skipping.after_step(step, outputs, torch.zeros(10, dtype=torch.int64), 10)


def frozen_after(accuracies: list[int], config: SkippingConfig) -> list[bool]:
    """Whether weights are frozen after each window of one step, from its correct predictions of ten."""
    skipping = Skipping(config, cnn(), examples().task, Shard(), num_steps_per_epoch=1)
    found = []
    for step, num_correct in enumerate(accuracies, start=1):
        feed(skipping, step, num_correct)
        found.append(skipping.is_frozen)
    return found


def test_weights_freeze_when_a_window_gains_too_little_and_thaw_in_time():
    config = SkippingConfig(kind="wus", threshold=0.15, epochs=2, drop=0.5)
    accuracies = [3, 5, 7, 8, 8, 8, 10, 10]
    assert frozen_after(accuracies, config) == [False, False, False, True, True, False, False, True]


def test_a_fall_of_accuracy_ends_a_freeze_early():
    config = SkippingConfig(kind="wus", threshold=0.15, epochs=5, drop=0.15)
    assert frozen_after([5, 5, 4, 4, 3, 9], config) == [False, True, True, True, False, False]


def test_windows_average_their_steps():
    skipping = Skipping(
        SkippingConfig(kind="wus", threshold=0.1, window=2), cnn(), examples().task, Shard(), num_steps_per_epoch=1
    )
    for step, num_correct in enumerate([1, 5, 5, 2], start=1):  # 3 and 3.5 of ten
        feed(skipping, step, num_correct)
        assert skipping.is_frozen == (step == 4)


ALTERNATING = SkippingConfig(kind="wus", threshold=0.999, drop=1.0)  # epochs 3, 5, 7, ... are frozen


def test_frozen_weights_stay_with_their_momentum_while_biases_move_and_all_move_again_at_the_end():
    model, seen = cnn("none"), []
    recipe = replace(STEADY, epochs=5, skipping=ALTERNATING)

    def keep(progress: Progress) -> None:
        if progress.epoch_ended:
            state = through_a_file(progress.capture())
            names = [name for name, _ in model.named_parameters()]
            big = [name for name, p in model.named_parameters() if p.ndim > 1]
            order = [*big, *(name for name in names if name not in big)]  # the optimizer's two groups
            momenta = {order[i]: s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
            seen.append((state["model"], momenta, [p.requires_grad for p in model.parameters()]))

    minimize(model, examples(), recipe, seed=0, on_step=keep)
    for epoch in range(1, 5):
        (before, momenta_before, _), (after, momenta, _) = seen[epoch - 1], seen[epoch]
        for name, p in model.named_parameters():
            stays = p.ndim > 1 and epoch in (2, 4)  # the third and the fifth
            assert torch.equal(before[name], after[name]) == stays, (epoch, name)
            assert torch.equal(momenta_before[name], momenta[name]) == stays, (epoch, name)
    assert [all(grads) for _, _, grads in seen] == [True, False, True, False, True]
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_step_counts_two_thirds_of_a_pass():
    cost = minimize(cnn(), examples(), replace(STEADY, epochs=5, skipping=ALTERNATING), seed=0).cost
    assert (cost.num_forward, cost.num_backward) == (5 * 30, 3 * 30 + 2 * 15)
    assert cost.passes(30) == pytest.approx(3 + 2 * 2 / 3)


def test_wus_lr_decays_the_learning_rate_at_each_freeze_for_good():
    skipping = replace(ALTERNATING, kind="wus_lr", decay=0.5)
    result = minimize(cnn(), examples(), replace(STEADY, epochs=6, skipping=skipping), seed=0)
    assert [record.learning_rate for record in result.history] == [0.02, 0.02, 0.01, 0.01, 0.005, 0.005]


def test_convolutions_add_their_biases_outside_while_frozen_and_compute_the_same():
    model = cnn("none").double()
    images, labels = next(iter(examples().in_order([30], dtype=torch.float64)))
    skipping = Skipping(replace(ALTERNATING, window=1.0), model, examples().task, Shard(), num_steps_per_epoch=1)

    def outputs_and_gradients() -> tuple[Tensor, list[Tensor]]:
        outputs = model(images)
        biases = [p for p in model.parameters() if p.ndim == 1]
        return outputs.detach(), list(torch.autograd.grad(F.cross_entropy(outputs, labels), biases))

    expected = outputs_and_gradients()
    feed(skipping, 1, 5)
    feed(skipping, 2, 5)
    assert skipping.is_frozen
    torch.testing.assert_close(outputs_and_gradients(), expected, rtol=1e-12, atol=1e-14)
    skipping.thaw()
    assert same_bits(outputs_and_gradients(), expected)


def test_a_network_without_biases_cannot_skip():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False))
    with pytest.raises(
        ValueError, match="kind=wus moves biases and normalisation parameters alone, and the network has"
    ):
        minimize(model, examples(), replace(STEADY, skipping=ALTERNATING), seed=0)


# RS2


def test_a_turn_takes_its_share_of_the_batches_and_epochs_count_steps_as_before():
    whole = minimize(linear(64), examples(), STEADY, seed=0)
    result = minimize(linear(64), examples(), replace(STEADY, epoch_fraction=0.5), seed=0)
    assert [record.epoch for record in result.history] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert result.cost.num_steps == whole.cost.num_steps == 12
    assert result.cost.num_forward == 6 * 16  # batches are of 8, 8, 7 and 7: a turn takes the first two


def test_every_turn_draws_its_examples_anew():
    data, drawn = examples(30), []

    class Recorded(type(data)):
        def batch(self, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            drawn.append(indices.tolist())
            return super().batch(indices, **options)

    recorded = Recorded(data.rows, data.task)
    minimize(linear(64), recorded, replace(STEADY, epoch_fraction=0.5, epochs=20), seed=0)
    turns = [set(a) | set(b) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    assert all(len(turn) == 16 for turn in turns)
    assert turns[0] != turns[1]
    assert set.union(*turns) == set(range(30))


# Distillation


def test_under_cross_entropy_it_is_t_squared_times_the_divergence_from_the_mean_probabilities():
    generator = torch.Generator().manual_seed(0)
    student, *teachers = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(4))
    ensemble = torch.stack([t.softmax(1) for t in teachers]).mean(0)
    tempered = ensemble**0.5 / (ensemble**0.5).sum(1, keepdim=True)  # T = 2
    expected = 4 * (tempered * (tempered.log() - (student / 2).log_softmax(1))).sum()
    distillation = Distillation([Constant(t) for t in teachers], share=0.3, temperature=2.0)
    targets = distillation.targets(torch.zeros(5, 1), examples().task)
    torch.testing.assert_close(targets.exp(), ensemble)
    loss = distillation.mixed(torch.tensor(7.0, dtype=torch.float64), student, targets, examples().task)
    torch.testing.assert_close(loss, 0.7 * 7.0 + 0.3 * expected)


def test_under_squared_error_it_is_the_distance_from_the_mean_outputs():
    student, teachers = torch.tensor([[1.0, 2.0]]), [torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 5.0]])]
    distillation = Distillation([Constant(t) for t in teachers], share=0.5, temperature=2.0)
    task = examples(objective=SQUARED_ERROR).task
    targets = distillation.targets(torch.zeros(1, 1), task)
    assert targets.tolist() == [[1.0, 3.0]]
    assert distillation.mixed(torch.tensor(4.0), student, targets, task).item() == 0.5 * 4 + 0.5 * (0 + 1) / 2


class Constant(nn.Module):
    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, images: Tensor) -> Tensor:
        return self._outputs


def test_a_share_of_nothing_changes_no_bit():
    plain, taught = cnn(), cnn()
    minimize(plain, examples(), STEADY, seed=0)
    minimize(taught, examples(), STEADY, seed=0, distillation=Distillation([cnn(seed=1)], share=0.0, temperature=2.0))
    assert same_bits(weights(plain), weights(taught))


def test_labels_do_not_matter_when_all_of_the_loss_is_the_ensembles():
    data, ends = examples(), []
    for labels in (data.targets(), (data.targets() + 1) % 3):
        model = cnn()
        teachers = Distillation([cnn(seed=1), cnn(seed=2)], share=1.0, temperature=2.0)
        minimize(model, with_labels(data, labels), STEADY, seed=0, distillation=teachers)
        ends.append(weights(model))
    assert same_bits(*ends)


def test_every_teacher_costs_a_forward_pass_and_stays_as_it_was():
    teachers = [cnn(seed=1), cnn(seed=2), cnn(seed=3)]
    before = [weights(teacher) for teacher in teachers]
    distillation = Distillation(teachers, share=0.5, temperature=2.0)
    cost = minimize(cnn(), examples(), STEADY, seed=0, distillation=distillation).cost
    assert (cost.num_forward, cost.num_backward) == (90 * 4, 90)
    assert cost.passes(30) == pytest.approx(3 * (1 + 3 / 3))
    assert same_bits(before, [weights(teacher) for teacher in teachers])


def test_the_plan_counts_a_forward_pass_for_each_teacher_and_epoch():
    config = Config()
    full_set = load_full_set(config.data)
    plain = make_plan(config, full_set)
    taught = make_plan(config.with_overrides({"fine_tuning.distillation": 0.5}), full_set)
    assert taught.passes - plain.passes == pytest.approx(2.0 * 4 * plain.forward_share)
    assert taught.critical_path_passes - plain.critical_path_passes == pytest.approx(2.0 * 4 * plain.forward_share)


# All of them, interrupted and together

VARIATIONS: dict[str, dict[str, Any]] = {
    **{kind: {"extrapolation": ExtrapolationConfig(kind=kind)} for kind in KINDS},  # type: ignore[arg-type]
    "accelerated": {"extrapolation": ExtrapolationConfig(kind="past_local", accelerated=True)},
    **{
        f"{kind}-{feedback}": {"averaging": AveragingConfig(kind=kind, period=0.5, num_samples=3, feedback=feedback)}  # type: ignore[arg-type]
        for kind in ("pswa", "pwalks", "pswm")
        for feedback in ("restart", "evaluate")
    },
    "ema": {"averaging": AveragingConfig(kind="ema")},
    "swa": {"averaging": AveragingConfig(kind="swa", swa_start=0.2)},
    "wus": {"skipping": SkippingConfig(kind="wus", threshold=0.9, window=0.75, epochs=0.5)},
    "wus_lr-adam": {"optimizer": "adam", "skipping": SkippingConfig(kind="wus_lr", threshold=0.9, window=0.5)},
    "rs2": {"epoch_fraction": 0.75},
    "together": {
        "extrapolation": ExtrapolationConfig(kind="past_local", accelerated=True),
        "averaging": AveragingConfig(kind="pwalks", period=0.25, num_samples=3),
        "skipping": SkippingConfig(kind="wus_lr", threshold=0.9, window=0.5, epochs=0.5),
        "epoch_fraction": 0.5,
    },
}


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(variation):
    recipe = replace(STEADY, batch_size=6, epochs=2.4, **variation)

    def run(stops: set[int]) -> tuple[dict[str, Tensor], MinimizeResult, int]:
        model, state, num_forward = noisy_network(), None, 0
        while True:
            states: list[dict[str, Any]] = []

            def on_step(progress: Progress, states: list[dict[str, Any]] = states) -> bool:
                if progress.step in stops:
                    states.append(through_a_file(progress.capture()))
                return progress.step in stops

            result = minimize(model, examples(augmentation="crop_flip"), recipe, seed=3, state=state, on_step=on_step)
            num_forward += result.cost.num_forward
            if result.outcome != "stopped":
                return weights(model), result, num_forward
            model, state = noisy_network(seed=9), states[0]

    whole, result, num_forward = run(set())
    broken, resumed, num_forward_in_parts = run({1, 4, 5, 6, 8, 10, 11, 12})  # of 12, 5 an epoch; the last at the end
    assert same_bits(whole, broken)
    assert same_bits([r.to_dict() for r in result.history], [r.to_dict() for r in resumed.history])
    assert num_forward == num_forward_in_parts


def test_every_variation_differs_from_the_plain_run_and_learns():
    data, ends = examples(60), {}
    for name, variation in {"none": {}, **VARIATIONS}.items():
        model = cnn()
        result = minimize(model, data, replace(STEADY, epochs=8, **variation), seed=3)
        assert result.history[-1].loss < 0.9 * math.log(3), name
        ends[name] = weights(model)
    different = {name for name in VARIATIONS if not same_bits(ends[name], ends["none"])}
    assert different == VARIATIONS.keys()


REFUSED = [
    (
        {"minimize.extrapolation.kind": "past_local", "minimize.optimizer": "adam"},
        "sgd's update, not for minimize.optimizer=adam",
    ),
    ({"minimize.extrapolation.accelerated": True, "minimize.momentum": 0.0}, "set minimize.momentum above 0"),
    ({"minimize.averaging.kind": "ema", "minimize.averaging.feedback": "restart"}, "never restarts it"),
    (
        {"minimize.averaging.kind": "pswa", "minimize.averaging.period": 0.6},
        "at least 2 samples an epoch.* at most 0.5",
    ),
    (
        {"minimize.averaging.kind": "pswm", "minimize.averaging.period": 1.5},
        "at least 1 sample an epoch.* give at most 1",
    ),
    (
        {"minimize.averaging.kind": "pswa", "minimize.epoch_fraction": 0.1},
        r"period = 0.1 epochs: pswa .* at most 0.05",
    ),
    ({"minimize.averaging.kind": "swa"}, "swa would average 1 epoch in the stage trunk, of 1 epoch"),
    (
        {"minimize.averaging.kind": "ema", "fine_tuning.keep": "best"},
        "keep=best chooses among epochs, but ema averages",
    ),
    (
        {"minimize.skipping.kind": "wus", "minimize.optimizer": "lbfgs"},
        "minimize.skipping is for steps on batches, and lbfgs",
    ),
    ({"method": "conventional", "fine_tuning.distillation": 0.5}, "method=conventional does not have: set it to 0"),
    ({"minimize.optimizer": "lbfgs", "fine_tuning.distillation": 0.5}, "distillation needs sgd, adam or adamw"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_combinations_without_meaning_are_refused_with_the_reason(overrides, message):
    with pytest.raises(ValueError, match=message):
        Config().with_overrides(overrides)


def test_swa_is_allowed_in_the_stages_that_are_long_enough():
    config = Config().with_overrides({"minimize.averaging.kind": "swa", "minimize.averaging.stages": "subsets"})
    assert config.stage("subsets").averaging.kind == "swa"
    assert config.stage("fine_tuning").averaging.kind == "none"


@pytest.mark.parametrize("kind", ["none", "ema", "swa", "pwalks"])
def test_frozen_parameters_of_integers_stay_and_change_no_type_of_inputs(kind):
    plain, model = linear(64), linear(64)
    model.get_submodule("0").places = nn.Parameter(torch.arange(3), requires_grad=False)
    recipe = MinimizeConfig(epochs=1.0, batch_size=8, averaging=AveragingConfig(kind=kind))
    for each in (plain, model):
        minimize(each, examples(), recipe, seed=0)
    assert same_bits(weights(model), {**weights(plain), "0.places": torch.arange(3)})
    assert evaluate(model, examples(), recipe) == evaluate(plain, examples(), recipe)
