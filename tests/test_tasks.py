"""Losses against autograd, qualities against scikit-learn, batches against loops, and records that strangers wrote."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysubset.config import TaskConfig
from raysubset.data.targets import Targets
from raysubset.tasks import (
    EXACT_OUTPUTS,
    SAMPLED_TERMS,
    AbsoluteError,
    Classification,
    CrossEntropy,
    Huber,
    ImageInputs,
    Loss,
    NextToken,
    Regression,
    Segmentation,
    Spec,
    SquaredError,
    TensorInputs,
    Vocabulary,
    added,
    balanced_weights,
    fit_columns,
    fit_tensors,
    fit_vocabulary,
    sums_of,
    task_from_dict,
    task_to_dict,
    windows_of,
)

WEIGHTS = (0.5, 1.0, 2.5)
IMAGES = ImageInputs((6, 5, 3), (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
NUMBERS = TensorInputs((4,), (0.0,), (1.0,))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=generator(seed))


# Losses: outputs and targets of each kind, one of which counts nowhere where there are some that may

MASKS = integers(3, 4, 2, 3).masked_fill(integers(5, 4, 2, 3, seed=1) == 0, 255)
MASKS[0] = 255  # an example of which nothing counts
CASES: dict[str, tuple[Loss, Tensor, Tensor]] = {
    "classes": (CrossEntropy(), normal(4, 3), integers(3, 4)),
    "smoothed": (CrossEntropy(label_smoothing=0.2), normal(4, 3), integers(3, 4)),
    "weighted": (CrossEntropy(class_weights=WEIGHTS), normal(4, 3), integers(3, 4)),
    "smoothed and weighted": (CrossEntropy(0.2, class_weights=WEIGHTS), normal(4, 3), integers(3, 4)),
    "tokens": (CrossEntropy(class_dim=2), normal(4, 5, 3), integers(3, 4, 5)),
    "pixels": (CrossEntropy(), normal(4, 3, 2, 3), integers(3, 4, 2, 3)),
    "ignored": (CrossEntropy(ignored=255), normal(4, 3, 2, 3), MASKS),
    "ignored and weighted": (CrossEntropy(ignored=255, class_weights=WEIGHTS), normal(4, 3, 2, 3), MASKS),
    "ignored, smoothed and weighted": (CrossEntropy(0.2, 1, 255, WEIGHTS), normal(4, 3, 2, 3), MASKS),
    "one-hot": (SquaredError(is_one_hot=True), normal(4, 3), integers(3, 4)),
    "numbers": (SquaredError(), normal(4, 3), normal(4, 3, seed=1)),
    "grids": (SquaredError(), normal(4, 2, 3), normal(4, 2, 3, seed=1)),
    "huber": (Huber(), normal(4, 3), 2 * normal(4, 3, seed=1)),
}


def by_hand(loss: Loss, outputs: Tensor, target: Tensor) -> Tensor:
    """Of one example, from the definitions, a position and a number at a time."""
    if isinstance(loss, CrossEntropy):
        rows, classes = outputs.movedim(loss.class_dim - 1, -1).reshape(-1, 3), target.reshape(-1).tolist()
        values, num = torch.zeros((), dtype=outputs.dtype), 0
        for row, label in zip(rows, classes, strict=True):
            if label == loss.ignored:
                continue
            logs = row - row.exp().sum().log()
            weights = torch.tensor(loss.class_weights or (1.0,) * 3, dtype=outputs.dtype)
            smooth = loss.label_smoothing
            values = values - (1 - smooth) * weights[label] * logs[label] - smooth * (weights * logs).mean()
            num += 1
        return values / max(1, num)
    if isinstance(loss, SquaredError) and loss.is_one_hot:
        target = torch.eye(3, dtype=outputs.dtype)[target]
    differences = outputs - target
    if isinstance(loss, Huber):
        size = differences.abs()
        return torch.where(size <= 1, size**2 / 2, size - 0.5).mean()
    return differences.abs().mean() if isinstance(loss, AbsoluteError) else differences.square().mean()


@pytest.mark.parametrize("name", CASES)
def test_a_batchs_loss_is_the_sum_of_its_examples_means(name: str):
    loss, outputs, targets = CASES[name]
    expected = sum(by_hand(loss, o, t) for o, t in zip(outputs, targets, strict=True))
    torch.testing.assert_close(loss.summed(outputs, targets), expected)


def test_the_absolute_error_is_the_mean_of_the_magnitudes():
    outputs, targets = normal(4, 3), normal(4, 3, seed=1)
    torch.testing.assert_close(AbsoluteError().summed(outputs, targets), (outputs - targets).abs().mean(1).sum())


@pytest.mark.parametrize("name", ["smoothed", "weighted", "ignored and weighted"])
def test_the_reported_loss_is_without_smoothing_and_weights(name: str):
    loss, outputs, targets = CASES[name]
    assert isinstance(loss, CrossEntropy)
    plain = CrossEntropy(ignored=loss.ignored)
    torch.testing.assert_close(loss.reported(outputs, targets), plain.summed(outputs, targets))
    assert not torch.allclose(loss.summed(outputs, targets), plain.summed(outputs, targets))


def hessian(loss: Loss, outputs: Tensor, target: Tensor) -> Tensor:
    """Of one example's loss by its outputs, flattened: [M, M], by torch."""
    shape = outputs.shape

    def of_flat(flat: Tensor) -> Tensor:
        return loss.summed(flat.view(1, *shape), target[None])

    found = torch.func.hessian(of_flat)(outputs.reshape(-1))
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_curvature_is_the_hessian_by_the_outputs_times_their_change(name: str):
    loss, outputs, targets = CASES[name]
    change = normal(*outputs.shape, seed=7)
    found = loss.curvature(outputs, change, targets)
    for product, output, direction, target in zip(found, outputs, change, targets, strict=True):
        torch.testing.assert_close(product.reshape(-1), hessian(loss, output, target) @ direction.reshape(-1))


def outer_products(terms: Tensor) -> Tensor:
    """Σ_T terms termsᵀ of each example: [n, M, M] of terms [n, T, …]."""
    flat = terms.flatten(2)
    return torch.einsum("nti,ntj->nij", flat, flat)


@pytest.mark.parametrize("name", ["classes", "smoothed", "one-hot", "numbers", "grids", "huber"])
def test_up_to_a_hundred_outputs_fisher_terms_add_up_to_the_hessian(name: str):
    loss, outputs, targets = CASES[name]
    terms = loss.fisher_terms(outputs, targets, labels="model", generator=generator())
    assert terms.shape[1] == loss.num_fisher_terms(tuple(outputs.shape[1:]), labels="model")
    for product, output, target in zip(outer_products(terms), outputs, targets, strict=True):
        torch.testing.assert_close(product, hessian(loss, output, target))


@pytest.mark.parametrize("name", ["tokens", "pixels", "ignored"])
def test_of_positions_the_mean_of_many_draws_is_the_hessians_diagonal_within_three_standard_errors(name: str):
    """Some of the many numbers are beyond three errors by chance: at most one in twenty, and none beyond 4.5."""
    loss, outputs, targets = CASES[name]
    drawn, num = [], 1000
    for seed in range(num):
        terms = loss.fisher_terms(outputs, targets, labels="model", generator=generator(seed))
        assert terms.shape[1] == SAMPLED_TERMS == loss.num_fisher_terms(tuple(outputs.shape[1:]), labels="model")
        drawn.append(terms.flatten(2).square().sum(1))
    samples = torch.stack(drawn)
    exact = torch.stack([hessian(loss, o, t).diagonal() for o, t in zip(outputs, targets, strict=True)])
    error = samples.std(0) / math.sqrt(num)
    off = (samples.mean(0) - exact).abs()
    assert bool((off[error == 0] < 1e-12).all())  # what counts nowhere
    sizes = (off[error > 0] / error[error > 0]).sort().values
    assert (sizes < 3).double().mean() > 0.95
    assert sizes[-1] < 4.5


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError(), Huber()])
def test_of_more_than_a_hundred_outputs_the_mean_of_many_draws_is_the_hessians_diagonal(loss: Loss):
    num, size = 400, EXACT_OUTPUTS + 20
    outputs = normal(1, size)
    targets = integers(size, 1) if isinstance(loss, CrossEntropy) else 2 * normal(1, size, seed=1)
    exact = hessian(loss, outputs[0], targets[0]).diagonal()
    total = torch.zeros(size, dtype=torch.float64)
    for seed in range(num):
        terms = loss.fisher_terms(outputs, targets, labels="model", generator=generator(seed))
        assert terms.shape == (1, SAMPLED_TERMS, size)
        total += terms[0].square().sum(0)
    spread = (exact / (num * SAMPLED_TERMS)).sqrt() if isinstance(loss, CrossEntropy) else torch.full((size,), 1e-12)
    assert ((total / num - exact).abs() < 4.5 * spread).all()  # of squared signs the mean is exact


@pytest.mark.parametrize("name", ["classes", "tokens", "pixels", "ignored"])
def test_at_the_true_labels_the_fishers_one_term_is_the_gradient(name: str):
    """Scaled by the root of a position's share, so that squares of positions add up as their losses do."""
    loss, outputs, targets = CASES[name]
    assert isinstance(loss, CrossEntropy)
    (term,) = loss.fisher_terms(outputs, targets, labels="true", generator=generator()).unbind(1)
    assert loss.num_fisher_terms(tuple(outputs.shape[1:]), labels="true") == 1
    for found, output, target in zip(term, outputs, targets, strict=True):
        counts = torch.ones_like(target) if loss.ignored is None else target != loss.ignored
        num = max(1, int(counts.sum()))
        own = output.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss.summed(own[None], target[None]), own)
        torch.testing.assert_close(found, -gradient * math.sqrt(num))


def test_the_absolute_error_has_no_curvature_and_says_what_has():
    outputs = normal(2, 3)
    with pytest.raises(ValueError, match=r"no curvature: use --task\.loss huber or squared_error"):
        AbsoluteError().curvature(outputs, outputs, outputs)
    with pytest.raises(ValueError, match=r"no curvature: use --task\.loss huber or squared_error"):
        AbsoluteError().fisher_terms(outputs, outputs, labels="model", generator=generator())


ALL = CASES | {"absolute": (AbsoluteError(), normal(4, 3), normal(4, 3, seed=1))}


@pytest.mark.parametrize("name", ALL)
def test_the_distance_from_a_teacher_is_zero_at_the_teacher_and_positive_elsewhere(name: str):
    loss, outputs, _ = ALL[name]
    assert loss.distance(outputs, outputs, temperature=2.0).item() == pytest.approx(0, abs=1e-12)
    assert loss.distance(outputs, normal(*outputs.shape, seed=9), temperature=2.0) > 1e-3


def test_the_distance_of_tokens_is_the_mean_over_them_of_a_divergence_by_hand():
    student, teacher = normal(4, 5, 3), normal(4, 5, 3, seed=1)
    p, q = (teacher / 2).softmax(2), (student / 2).softmax(2)
    expected = 4 * (p * (p / q).log()).sum(2).mean(1).sum()
    torch.testing.assert_close(CrossEntropy(class_dim=2).distance(student, teacher, temperature=2.0), expected)


@pytest.mark.parametrize("name", ALL)
def test_equal_members_combine_to_that_member_and_others_to_the_mean_of_what_they_predict(name: str):
    loss, outputs, _ = ALL[name]
    other = normal(*outputs.shape, seed=9)

    def predicted(values: Tensor) -> Tensor:
        return values.softmax(loss.class_dim) if isinstance(loss, CrossEntropy) else values

    torch.testing.assert_close(predicted(loss.combine([outputs] * 3)), predicted(outputs))
    torch.testing.assert_close(predicted(loss.combine([outputs, other])), (predicted(outputs) + predicted(other)) / 2)


# Qualities


def regression(**changes: Any) -> Regression:
    return Regression(NUMBERS, ("a", "b"), (10.0, -3.0), (2.0, 0.5), **changes)


def test_qualities_of_regression_are_scikit_learns_in_the_targets_own_units():
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    task, targets = regression(), normal(40, 2)
    outputs = targets + 0.3 * normal(40, 2, seed=1)
    sums = sums_of(task, outputs[:15], targets[:15])
    sums = added(sums, sums_of(task, outputs[15:], targets[15:]))
    found = task.values(sums, 40)
    mean, std = np.array(task.mean), np.array(task.std)
    wanted, predicted = (values.numpy() * std + mean for values in (targets, outputs))
    for name, metric in {"r2": r2_score, "rmse": root_mean_squared_error, "mae": mean_absolute_error}.items():
        assert found[name] == pytest.approx(metric(wanted, predicted), rel=1e-9)
        each = [found[f"{name}_{number}"] for number in range(2)]  # whose units differ
        assert each == pytest.approx(metric(wanted, predicted, multioutput="raw_values"), rel=1e-9)
    table = task.tabulate(outputs, targets)
    for number in range(2):
        np.testing.assert_allclose(table[f"target_{number}"], wanted[:, number])
        np.testing.assert_allclose(table[f"prediction_{number}"], predicted[:, number])


def test_strata_of_regression_are_tenths_of_the_first_target():
    targets = normal(1000, 2).numpy().astype(np.float32)
    strata = regression().strata({"target": targets})
    assert np.bincount(strata).tolist() == [100] * 10
    for number in range(9):
        assert targets[strata == number, 0].max() < targets[strata == number + 1, 0].min()
    assert regression().strata({"target": np.zeros((5, 2), np.float32)}).max() <= 1  # no tenths of one value


def segmentation(ignored: int | None = None, augmentation: Any = "none") -> Segmentation:
    inputs = replace(IMAGES, augmentation=augmentation)
    return Segmentation(inputs, ("a", "b", "c"), ignored, CrossEntropy(ignored=ignored))


@pytest.mark.parametrize("ignored", [None, 255, 2])
def test_iou_is_scikit_learns_over_all_pixels_that_count(ignored: int | None):
    from sklearn.metrics import jaccard_score

    task, outputs, masks = segmentation(ignored), normal(8, 3, 6, 5), integers(3, 8, 6, 5)
    if ignored == 255:
        masks = masks.masked_fill(integers(4, 8, 6, 5, seed=1) == 0, 255)
    sums = added(sums_of(task, outputs[:3], masks[:3]), sums_of(task, outputs[3:], masks[3:]))
    found = task.values(sums, 8)
    counts = np.full(masks.shape, True) if ignored is None else masks.numpy() != ignored
    wanted, predicted = masks.numpy()[counts], outputs.argmax(1).numpy()[counts]
    assert found["iou"] == pytest.approx(jaccard_score(wanted, predicted, average="macro"), rel=1e-12)
    assert found["pixel_accuracy"] == pytest.approx((wanted == predicted).mean(), rel=1e-12)


def test_a_class_that_neither_occurs_nor_is_predicted_has_no_part_in_the_iou():
    task, masks = segmentation(), integers(2, 4, 6, 5)
    outputs = F.one_hot(masks, 3).movedim(3, 1).double()
    assert task.values(sums_of(task, outputs, masks), 4) == {"iou": 1.0, "pixel_accuracy": 1.0}
    outputs[0, :, 0, 0] = torch.tensor([0.0, 0.0, 1.0])  # one pixel of 120 is called c
    assert task.values(sums_of(task, outputs, masks), 4)["iou"] < 2 / 3


VOCABULARY = fit_vocabulary("characters", ["ab ba\n"])  # newline, space, a and b, and one for all others


def test_bits_and_the_perplexity_of_words_by_hand():
    """Two windows of four tokens, of which each is predicted with one half: one bit a token, two words that end.

    They end among six tokens whose neighbours before them are in the window, so a word has three tokens.
    """
    task = NextToken(VOCABULARY, 4)
    tokens = torch.from_numpy(np.stack([VOCABULARY.encode("ab ba"), VOCABULARY.encode("ba ab")]))
    inputs, targets = task.batch({"tokens": tokens}, None)
    assert torch.equal(inputs, tokens[:, :-1].long())
    assert torch.equal(targets, tokens[:, 1:].long())
    outputs = torch.full((2, 4, 5), math.log(0.5 / 4), dtype=torch.float64)
    outputs.scatter_(2, targets.unsqueeze(2), math.log(0.5))
    found = task.values(sums_of(task, outputs, targets), 2)
    assert found["bits"] == pytest.approx(1)
    assert found["accuracy"] == 1
    assert found["word_perplexity"] == pytest.approx(2**3)
    assert task.loss(outputs, targets).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("window", [2, 3, 8, 64])
def test_the_perplexity_of_words_does_not_depend_on_the_window(window):
    """A text of words of four letters and a space, each token of a bit: five bits a word, also in small windows."""
    task, text = NextToken(Vocabulary("bytes"), window), "abcd " * 4000
    tokens = torch.from_numpy(windows_of([text], task.vocabulary, window, where="it")[0])
    _, targets = task.batch({"tokens": tokens}, None)
    outputs = torch.full((*targets.shape, 256), math.log(0.5 / 255))
    outputs.scatter_(2, targets.unsqueeze(2), math.log(0.5))
    found = task.values(sums_of(task, outputs, targets), len(tokens))
    assert found["word_perplexity"] == pytest.approx(2**5, rel=0.01)
    unending = sums_of(task, outputs, torch.zeros_like(targets))
    assert math.isnan(task.values(unending, len(tokens))["word_perplexity"])


def test_accuracy_counts_and_balanced_weights_make_every_class_count_alike():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    weights = balanced_weights(labels, 4)
    assert weights == pytest.approx((7 / 12, 7 / 6, 7 / 3, 0))
    assert sum(weights[label] for label in labels) == pytest.approx(7)
    config = TaskConfig(class_weights="balanced")
    task = Targets("classes", {}, ("a", "b", "c", "d")).task(NUMBERS, labels, config)
    assert isinstance(task, Classification)
    assert task.objective == CrossEntropy(class_weights=weights)
    outputs = normal(7, 4)
    found = task.values(sums_of(task, outputs, torch.from_numpy(labels)), 7)
    assert found == {"accuracy": float((outputs.argmax(1).numpy() == labels).mean())}


# Batches


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
def test_images_are_scaled_shifted_and_mirrored_pixel_by_pixel(augmentation: Any):
    inputs = ImageInputs((16, 9, 2), (0.1, 0.2), (0.5, 0.25), augmentation)
    images = integers(256, 5, 16, 9, 2).to(torch.uint8)
    draws = Classification(inputs, ("a", "b")).draw(5, seed=3)
    assert (draws is None) == (augmentation == "none")
    found = inputs.batch({"image": images}, draws)
    assert found.shape == (5, *inputs.shape)
    shifts = [[2, 1, 0]] * 5 if draws is None else draws.tolist()  # the padding's own width: nothing moves
    for number, (dy, dx, flip) in enumerate(shifts):
        for y in range(16):
            for x in range(9):
                row, column = y + dy - 2, (8 - x if flip else x) + dx - 1
                is_inside = 0 <= row < 16 and 0 <= column < 9
                for channel in range(2):
                    pixel = int(images[number, row, column, channel]) if is_inside else 0
                    expected = (pixel / 255 - inputs.mean[channel]) / inputs.std[channel]
                    assert found[number, channel, y, x].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ignored", [None, 7])
def test_a_mask_is_shifted_and_mirrored_with_its_image(ignored: int | None):
    inputs = ImageInputs((16, 9, 1), (0.0,), (1.0,), "crop_flip")
    task = Segmentation(inputs, tuple("abcdefg"), ignored)
    masks = integers(7, 20, 16, 9).to(torch.uint8)
    images = (masks + 1).unsqueeze(3)  # black is outside alone
    draws = task.draw(20, seed=1)
    assert draws is not None
    found, targets = task.batch({"image": images, "mask": masks}, draws)
    levels = (found[:, 0] * 255).round().long()
    assert (levels == 0).any()
    assert torch.equal(targets, torch.where(levels == 0, ignored or 0, levels - 1))
    plain, unmoved = task.batch({"image": images, "mask": masks}, None)
    assert torch.equal((plain[:, 0] * 255).round().long() - 1, unmoved)
    assert torch.equal(unmoved, task.targets({"mask": masks}))


def test_tensors_are_standardised_by_training_rows_each_feature_or_as_a_whole_and_tokens_are_counted():
    rows = 3 * normal(50, 4).numpy() + 1
    train, everywhere = np.arange(40), np.arange(50)
    found = fit_tensors(rows, train).standardised(rows, where="it", rows=everywhere)
    np.testing.assert_allclose(found, (rows - rows[:40].mean(0)) / rows[:40].std(0), rtol=1e-5, atol=1e-6)
    still = np.full((50, 1), 0.1)  # whose deviation is 1e-17 by rounding, and not to be divided by
    still[40:] = 0.2
    found = fit_tensors(still, train).standardised(still, where="it", rows=everywhere)
    np.testing.assert_allclose(found, still - 0.1, atol=1e-6)
    grids = normal(50, 2, 3).numpy()
    found = fit_tensors(grids, train).standardised(grids, where="it", rows=everywhere)
    np.testing.assert_allclose(found, (grids - grids[:40].mean()) / grids[:40].std(), rtol=1e-5, atol=1e-6)
    tokens = fit_tensors(integers(9, 50, 4).numpy(), train)
    assert (tokens.num_values, tokens.batch({"inputs": torch.zeros(2, 4, dtype=torch.int32)}, None).dtype) == (
        9,
        torch.int64,
    )


def test_numbers_that_floats_cannot_hold_are_refused_where_they_would_turn_all_inputs_into_zeros_or_be_infinite():
    rows, everywhere = normal(50, 2).double().numpy(), np.arange(50)
    rows[45, 1] = 1e300  # held out
    with pytest.raises(ValueError, match="inputs in row 45 of the test split lie too far from the training rows' mean"):
        fit_tensors(rows, everywhere[:40]).standardised(rows, where="the test split", rows=everywhere)
    with pytest.raises(ValueError, match=r"inputs run from .* to 1e\+300, which 64-bit floats cannot standardise"):
        fit_tensors(rows, everywhere)
    task = Regression(TensorInputs((2,)), ("y",), (0.0,), (1.0,))
    assert task.standardised(rows[:45, :1], where="it", rows=everywhere).dtype == np.float32
    with pytest.raises(ValueError, match="targets in row 45 of it lie too far"):
        task.standardised(rows[:, 1:], where="it", rows=everywhere)


# Records


def tasks() -> dict[str, Any]:
    table = pa.table({"x": [1.0, 2.0, 4.0], "colour": ["red", "blue", "red"]})
    columns, _ = fit_columns(table, ["x", "colour"], missing="refuse")
    return {
        "images": Classification(replace(IMAGES, grey_range=(0, 4095)), ("cat", "dog")),
        "table": Classification(columns, ("cat", "dog")),
        "tensors": Regression(NUMBERS, ("a", "b"), (10.0, -3.0), (2.0, 0.5)),
        "masks": Segmentation(IMAGES, ("a", "b")),
        "tokens": NextToken(VOCABULARY, 16),
        "bytes": NextToken(fit_vocabulary("bytes", ["x"]), 3),
    }


@pytest.mark.parametrize("name", tasks())
def test_a_task_comes_back_from_json_as_it_was(name: str):
    task = tasks()[name]
    again = task_from_dict(json.loads(json.dumps(task_to_dict(task), allow_nan=False)))
    assert again == task
    assert again.spec() == task.spec()


def test_image_classification_is_recorded_as_before_there_were_tasks():
    record = task_to_dict(tasks()["images"])
    assert list(record) == ["num_classes", "class_names", "image_shape", "mean", "std", "grey_range"]


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("table", ["class_names"], []),
        ("table", ["class_names"], [1, 2]),
        ("table", ["class_names"], "cat"),
        ("table", ["inputs"], {}),
        ("table", ["inputs", "kind"], "voxels"),
        ("table", ["inputs", "columns"], 3),
        ("table", ["inputs", "missing"], "guess"),
        ("table", ["more"], 1),
        ("tensors", ["std"], [2.0, 0.0]),
        ("tensors", ["std"], [2.0]),
        ("tensors", ["mean"], [10.0, None]),
        ("tensors", ["target_names"], []),
        ("tensors", ["inputs", "shape"], []),
        ("tensors", ["inputs", "shape"], [10**10]),
        ("tensors", ["inputs", "shape"], [-4]),
        ("tensors", ["inputs", "std"], [0.0]),
        ("tensors", ["inputs", "mean"], [0.0, 1.0]),
        ("tensors", ["inputs", "num_values"], 10**12),
        ("masks", ["inputs"], {"kind": "tensors", "shape": [4]}),
        ("masks", ["inputs", "image_shape"], [10**9, 10**9, 3]),
        ("masks", ["inputs", "std"], [0.5, 0.25, 0.0]),
        ("tokens", ["window"], 0),
        ("tokens", ["window"], 10**9),
        ("tokens", ["window"], "16"),
        ("tokens", ["vocabulary", "kind"], "words"),
        ("tokens", ["vocabulary", "characters"], "ba"),
        ("tokens", ["vocabulary", "characters"], ""),
        ("bytes", ["vocabulary", "characters"], "ab"),
        ("tokens", ["name"], "translation"),
        ("tokens", ["name"], 3),
    ],
    ids=str,
)
def test_a_damaged_record_is_refused_in_one_line(name: str, path: list[str], value: Any):
    record = json.loads(json.dumps(task_to_dict(tasks()[name])))
    place = record["task"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=r"\w") as raised:
        task_from_dict(record)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["table", "tensors", "masks", "tokens"])
def test_a_record_that_lacks_a_value_is_refused_in_one_line(name: str):
    whole = task_to_dict(tasks()[name])
    for key in whole["task"]:
        damaged = {"task": {other: value for other, value in whole["task"].items() if other != key}}
        with pytest.raises(ValueError, match=r"\w") as raised:
            task_from_dict(damaged)
        assert "\n" not in str(raised.value), key
    for record in ({"task": None}, {"task": []}, {"task": "regression"}, {"task": {}}):
        with pytest.raises(ValueError, match="its task has no name"):
            task_from_dict(record)


def test_a_task_of_the_users_own_is_imported_only_where_the_user_says_so():
    record = {"task": {"name": "nowhere_to_be_found:Own", "state": {}}}
    with pytest.raises(ValueError, match="trust_code=True or --trust-code"):
        task_from_dict(record)
    with pytest.raises(ValueError, match="nowhere_to_be_found"):
        task_from_dict(record, trust_code=True)
    record["task"] |= {"spec": {"inputs": [2], "outputs": [3], "num_values": [None, 5]}, "class_names": ["a"]}
    task = task_from_dict(record)
    assert task.spec() == Spec((2,), (3,), (None, 5))
    assert (task.name, task.class_names) == ("nowhere_to_be_found:Own", ("a",))
    with pytest.raises(ValueError, match="nowhere_to_be_found"):
        task_from_dict(record, trust_code=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spec", None),
        ("spec", {"inputs": [2.0], "outputs": [3], "num_values": None}),
        ("spec", {"inputs": [2], "outputs": 3, "num_values": None}),
        ("spec", {"inputs": [2], "outputs": [3], "num_values": [1, 2, 3]}),
        ("spec", {"inputs": [], "outputs": [3], "num_values": [1]}),
        ("spec", {"inputs": [2], "outputs": [-3], "num_values": None}),
        ("spec", {"inputs": [2], "outputs": [3], "num_values": [True, 1]}),
        ("class_names", "ab"),
        ("class_names", [1]),
    ],
)
def test_a_damaged_outline_of_a_users_task_is_refused(key: str, value: Any):
    spec = {"inputs": [2], "outputs": [3], "num_values": None}
    task = {"name": "m:Own", "state": {}, "spec": spec, "class_names": []}
    assert task_from_dict({"task": task}).spec() == Spec((2,), (3,))
    with pytest.raises(ValueError, match=r"task\.spec|task\.class_names|Spec\.num_values"):
        task_from_dict({"task": task | {key: value}})


def test_sizes_of_a_spec_are_whole_numbers_whatever_held_them():
    """JSON could not hold NumPy's, which a task may take from the shapes of its training data."""
    spec = Spec([np.int64(3), 2], tuple(torch.tensor([4])))  # pyright: ignore[reportArgumentType]
    assert spec == Spec((3, 2), (4,))
    assert json.dumps([spec.inputs, spec.outputs]) == "[[3, 2], [4]]"
