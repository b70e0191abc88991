"""Losses, predictions and batch-norm statistics, against hand computation and torch's own."""

import math
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysubset import pulse
from raysubset.config import MinimizeConfig
from raysubset.data import Examples
from raysubset.tasks import CrossEntropy, Spec, SquaredError
from raysubset.training import (
    Cost,
    Metrics,
    ensemble_positions,
    evaluate,
    evaluate_for_ensemble,
    evaluation,
    gram_matrices,
    metrics_of_outputs,
    predict,
    recompute_batch_norm,
)
from tests.tiny import SQUARED_ERROR, cnn, examples, image_examples, linear, noisy_network, same_bits, weights

RECIPE = MinimizeConfig()
CROSS_ENTROPY = CrossEntropy()


def two_pixels(objective: CrossEntropy | SquaredError = CROSS_ENTROPY) -> tuple[nn.Module, Examples]:
    """Pixels 0 and 255 become inputs 0 and 1; logits are (x, 0) and so for label 0 p = 1/2 and e/(e+1)."""
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    data = image_examples(images, torch.tensor([1, 0]), objective=objective)
    model = linear(1, 2)
    model[1].weight.data = torch.tensor([[1.0], [0.0]])  # type: ignore[index]
    model[1].bias.data.zero_()  # type: ignore[index]
    return model, data


class Slopes(nn.Module):
    """Its outputs are derivatives of a network by the inputs, as forces are of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            places = images.detach().requires_grad_()
            outputs = self.energy(places)
            (slopes,) = torch.autograd.grad(outputs.square().sum(), places, create_graph=True)
            return outputs + slopes.sum((1, 2, 3))[:, None]


def test_a_network_that_derives_by_its_inputs_is_measured():
    model, data = Slopes(), examples()
    outputs = predict(model, data, RECIPE)
    assert not outputs.requires_grad
    inputs, targets = data.batch(torch.arange(len(data)))
    torch.testing.assert_close(outputs, model(inputs).detach())
    expected = F.cross_entropy(model(inputs), targets)
    assert evaluate(model, data, RECIPE).loss == pytest.approx(expected.item(), rel=1e-5)
    assert evaluate_for_ensemble(model, data, RECIPE)[0].loss == pytest.approx(expected.item(), rel=1e-5)


FAULTS = """
import resource
import statistics

import torch
from raysubset.training import use_device

use_device(num_gpus=0, num_threads=1)
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(3 * 2**20) for _ in range(3)]  # 12 MiB each, of 3,072 pages
    del activations
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))  # the heap may grow once or twice, by where it lies
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_of_a_batch_is_kept_for_the_next_and_not_handed_back_to_be_zeroed_anew():
    command = [sys.executable, "-c", FAULTS]  # a process whose heap no other test has shaped
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(process.stdout) < 300


def test_cross_entropy_and_accuracy_by_hand():
    metrics = evaluate(*two_pixels(), RECIPE)
    assert metrics.loss_sum == pytest.approx(math.log(2) + math.log(1 + math.exp(-1)))
    assert (metrics.sums["num_correct"], metrics.num_examples) == (1, 2)  # a tie goes to the first class
    assert metrics.accuracy == 0.5
    assert metrics.loss == metrics.loss_sum / 2


def test_squared_error_by_hand():
    metrics = evaluate(*two_pixels(SQUARED_ERROR), RECIPE)
    assert metrics.loss_sum == pytest.approx((0 + 1) / 2 + 0)  # outputs (0, 0) for (0, 1), and (1, 0) for (1, 0)


def test_the_reported_loss_is_without_label_smoothing():
    model, smooth = two_pixels(CrossEntropy(label_smoothing=0.3))
    assert evaluate(model, smooth, RECIPE) == evaluate(*two_pixels(), RECIPE)
    inputs, labels = smooth.batch(torch.arange(2))
    assert smooth.task.loss(model(inputs), labels) > smooth.task.reported_loss(model(inputs), labels)


def test_metrics_of_chunks_are_those_of_the_whole_in_evaluation_mode():
    model, data = noisy_network(), examples(1203)
    recompute_batch_norm(model, data, RECIPE)
    metrics = evaluate(model, data, RECIPE)
    with torch.no_grad():
        outputs = model.eval()(data.batch(torch.arange(1203))[0])
    assert metrics.loss_sum == pytest.approx(F.cross_entropy(outputs, data.targets(), reduction="sum").item(), rel=1e-5)
    assert metrics.sums["num_correct"] == (outputs.argmax(1) == data.targets()).sum()


@pytest.mark.parametrize("objective", [CROSS_ENTROPY, SQUARED_ERROR])
def test_metrics_of_outputs_are_those_of_the_model(objective):
    model, data = cnn(), examples(600, objective=objective)
    outputs = predict(model, data, RECIPE)
    assert outputs.dtype == torch.float32
    from_outputs = metrics_of_outputs(outputs, data.targets(), data.task)
    from_model = evaluate(model, data, RECIPE)
    assert from_outputs.loss == pytest.approx(from_model.loss, rel=1e-5)
    assert from_outputs.sums == from_model.sums
    assert from_outputs.accuracy == from_model.accuracy


def test_a_confident_mistake_is_not_made_to_look_better_than_it_is():
    metrics = metrics_of_outputs(torch.tensor([[0.0, 1e6]]), torch.tensor([0]), two_pixels()[1].task)
    assert metrics.loss == pytest.approx(1e6)


def test_a_float64_model_is_measured_in_float64():
    data = examples(40)
    model = cnn().to(torch.float64)
    assert recompute_batch_norm(model, data, RECIPE) == 40
    with torch.no_grad():
        outputs = model.eval()(data.batch(torch.arange(40), dtype=torch.float64)[0])
    expected = F.cross_entropy(outputs, data.targets(), reduction="sum").item()
    assert evaluate(model, data, RECIPE).loss_sum == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("measure", [evaluate, predict, recompute_batch_norm])
def test_every_modules_mode_is_left_as_it_was(measure):
    model = noisy_network().train()
    model.dropout.eval()  # type: ignore[union-attr]
    measure(model, examples(), RECIPE)
    assert {name for name, module in model.named_modules() if not module.training} == {"dropout"}


def test_the_mode_is_left_as_it_was_when_a_network_fails():
    model = nn.Sequential(linear(64), nn.Linear(4, 4)).train()
    with pytest.raises(RuntimeError):
        evaluate(model, examples(), RECIPE)
    assert all(module.training for module in model.modules())


def test_batch_norm_statistics_are_those_of_torchs_update_bn_on_equal_batches():
    data = examples(1000)
    ours, torchs = cnn(), cnn()
    assert recompute_batch_norm(ours, data, RECIPE) == 1000
    batches = [data.batch(indices)[0] for indices in torch.arange(1000).split(500)]
    torch.optim.swa_utils.update_bn(batches, torchs)
    for name, value in weights(torchs).items():
        if "running" in name:
            torch.testing.assert_close(weights(ours)[name], value)
    assert not torch.equal(ours.block0.norm.running_mean, torch.zeros(4))  # type: ignore[union-attr]


def test_batch_norm_statistics_of_augmented_examples_are_those_of_augmented_batches():
    ours, torchs, plain = cnn(), cnn(), cnn()
    data = examples(600, augmentation="crop_flip")
    assert recompute_batch_norm(ours, data, RECIPE) == 600
    seed = evaluation.STATISTICS_SEED
    batches = data.epoch(order_seed=seed, augmentation_seed=seed, batch_sizes=[300, 300])
    torch.optim.swa_utils.update_bn(batches, torchs)
    recompute_batch_norm(plain, examples(600), RECIPE)
    for key, value in weights(torchs).items():
        if "running" in key:
            torch.testing.assert_close(weights(ours)[key], value, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(weights(plain)[key], value, rtol=1e-3)
    assert evaluate(ours, data, RECIPE) == evaluate(ours, replace(data, augment=False), RECIPE)


def test_large_examples_are_measured_fewer_at_a_time_and_small_ones_by_500():
    images = torch.zeros(5, 3000, 3000, 1, dtype=torch.uint8)
    data, sizes = image_examples(images, torch.arange(5) % 3), []
    model = nn.Sequential(nn.AvgPool2d(3000), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 3))
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    evaluate(model, data, MinimizeConfig())
    assert sizes == [2, 3, 2]  # 27 million numbers at most, after a look at two examples
    sizes.clear()
    recompute_batch_norm(model, data, MinimizeConfig())
    assert sizes == [3, 2]
    assert evaluation.evaluation_batch(Spec((3, 256, 256), (1000,))) == 170
    assert (
        evaluation.evaluation_batch(Spec((3, 32, 32), (10,)))
        == evaluation.evaluation_batch(Spec((128,), (128, 256), 256))
        == 500
    )


class Wide(nn.Module):
    """Returns 2**23 numbers of each example, beside another tensor, without the memory for them."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return inputs, {"wide": inputs.new_zeros(1).expand(len(inputs), 2**23)}


def test_networks_with_much_between_their_modules_are_measured_fewer_examples_at_a_time():
    data, sizes = image_examples(torch.zeros(11, 1, 1, 1, dtype=torch.uint8), torch.arange(11) % 3), list[int]()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.norm, self.head = Wide(), nn.BatchNorm1d(1), nn.Linear(1, 3)

        def forward(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return self.head(self.norm(self.wide(images.flatten(1))[0]))

    model = Network()
    evaluate(model, data, MinimizeConfig())
    assert sizes == [2, 4, 4, 3]  # 2**25 numbers at most
    sizes.clear()
    recompute_batch_norm(model, data, MinimizeConfig())
    gram_matrices(model, data, MinimizeConfig())
    assert sizes == [4, 4, 3] * 2


def test_a_measurement_says_how_far_it_is_once_it_lasts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pulse, "MEASURING_S", 0.0)
    told = list[tuple[int, int] | None]()
    model = cnn()
    model.register_forward_pre_hook(lambda _, inputs: told.append(pulse.pulse().measured))
    evaluate(model, examples(1200), RECIPE)
    assert told[-3:] == [(0, 1200), (500, 1200), (1000, 1200)]
    assert pulse.pulse().measured is None
    monkeypatch.setattr(pulse, "MEASURING_S", 10.0)
    evaluate(model, examples(600), RECIPE)
    assert told[-2:] == [None, None]


def test_a_single_left_over_example_is_no_batch_of_its_own():
    data, model = examples(501), cnn()
    recompute_batch_norm(model, data, RECIPE)
    with torch.no_grad():
        maps = model.block0.conv(data.batch(torch.arange(501))[0])  # type: ignore[union-attr, operator]
    expected = torch.stack([part.var((0, 2, 3)) for part in (maps[:251], maps[251:])]).mean(0)
    torch.testing.assert_close(model.block0.norm.running_var, expected)  # type: ignore[union-attr]


def test_recomputing_batch_norm_leaves_all_but_the_statistics_alone():
    model = noisy_network()
    model.norm.momentum = 0.3  # type: ignore[union-attr]
    model.norm.num_batches_tracked.fill_(17)  # type: ignore[union-attr, operator]
    before = weights(model)
    recompute_batch_norm(model, examples(), RECIPE)
    assert model.norm.momentum == 0.3  # type: ignore[union-attr]
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"norm.running_mean", "norm.running_var"}


def test_recomputing_batch_norm_does_not_turn_dropout_on():
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)]
    with_dropout = nn.Sequential(nn.Dropout(0.9), *layers).train()
    recompute_batch_norm(with_dropout, examples(), RECIPE)
    once = weights(with_dropout)
    recompute_batch_norm(nn.Sequential(nn.Identity(), *layers), examples(), RECIPE)
    assert same_bits(weights(with_dropout), once)


def test_a_network_without_running_statistics_costs_nothing_to_recompute():
    assert recompute_batch_norm(cnn("group"), examples(), RECIPE) == 0


def test_metrics_divide_sums_once_and_survive_json():
    whole = Metrics.of_sums(examples().task, 4.0, {"num_correct": 3}, 5)
    assert (whole.loss, whole.accuracy) == (0.8, 0.6)
    record = whole.to_dict()
    assert list(record) == ["loss_sum", "num_correct", "num_examples", "loss", "accuracy"]
    assert Metrics.from_dict(record) == whole
    assert math.isnan(Metrics.from_dict({"loss_sum": None, "num_correct": 0, "num_examples": 1}).loss)


def test_costs_add_up_and_weigh_forward_work_a_third():
    cost = Cost(num_forward=10, num_backward=4, num_steps=1, device_s=0.5) + Cost(num_forward=2, device_s=0.25)
    assert cost == Cost(12, 4, 1, 0.75)
    assert cost.passes(4) == pytest.approx((12 / 3 + 4 * 2 / 3) / 4)
    assert Cost(num_forward=50, num_backward=50).passes(50) == pytest.approx(1)
    assert Cost.from_dict(cost.to_dict()) == cost


def test_where_outputs_are_too_many_an_even_sample_is_kept_of_one_pass_over_all(monkeypatch):
    model, data, recipe = cnn(), examples(1203), MinimizeConfig()
    whole, outputs = evaluate_for_ensemble(model, data, recipe)
    assert len(outputs) == 1203
    monkeypatch.setattr("raysubset.training.evaluation.MOST_SAMPLED_BYTES", 4 * 3 * 100)
    metrics, kept = evaluate_for_ensemble(model, data, recipe)
    sample = data.select(ensemble_positions(data))
    assert len(sample) == len(kept) == 100
    torch.testing.assert_close(kept, predict(model, sample, recipe))
    assert metrics.sums == whole.sums
    assert metrics.loss == pytest.approx(whole.loss, rel=1e-6)


def test_what_compares_examples_has_the_same_batches_whatever_lies_between_modules():
    data, sizes = image_examples(torch.zeros(11, 1, 1, 1, dtype=torch.uint8), torch.arange(11) % 3), list[int]()

    class Compares(type(data.task)):  # type: ignore[misc]
        compares_examples = True

    task = Compares(**{field.name: getattr(data.task, field.name) for field in fields(data.task)})
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    evaluation._widest[model] = 2**23
    evaluate(model, replace(data, task=task), MinimizeConfig())
    assert sizes == [11]
