"""Memory of a minimization against counts by hand, and the warning it leads to by fake numbers."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysubset.config import AveragingConfig, ExtrapolationConfig, MinimizeConfig, SkippingConfig
from raysubset.data import Examples
from raysubset.subset_actors.crew import PROCESS_BYTES, memory_warning
from raysubset.tasks import Spec
from raysubset.training import forward_share, minimize, minimize_packed, minimizing_bytes
from tests.tiny import SQUARED_ERROR, examples, linear, same_bits, weights

SGD_COPIES = 4  # weights, gradient, momentum, best


def test_an_mlp_saves_its_inputs_and_hidden_units():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.ReLU(inplace=True), nn.Linear(1000, 10))
    num_weights = 64 * 1000 + 1000 + 1000 * 10 + 10
    needed = minimizing_bytes(model, MinimizeConfig(batch_size=2000), Spec((1, 8, 8), (3,)), num_examples=300)
    # an image of 64 bytes and an int64 label; the input of each linear layer, which is the output of ReLU too
    assert needed == 300 * (64 + 8) + SGD_COPIES * 4 * num_weights + 2000 * 4 * (64 + 1000)


def test_a_cnn_saves_what_each_layer_needs_for_its_gradient():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 16, 10)
    )
    num_weights = 3 * 5 * 9 + 5 + 5 * 16 * 10 + 10
    config = MinimizeConfig(batch_size=2000, optimizer="adam")
    needed = minimizing_bytes(model, config, Spec((3, 8, 8), (3,)), num_examples=0)
    # images, ReLU's output, where each maximum was (int64), and the pooled maps that the linear layer reads
    saved = 4 * 3 * 64 + 4 * 5 * 64 + 8 * 5 * 16 + 4 * 5 * 16
    assert needed == 5 * 4 * num_weights + 2000 * saved


def test_functions_called_in_forward_count_like_modules():
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 1000)

        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.softplus(self.head(images.flatten(1)))

    config = MinimizeConfig(batch_size=3000)
    called = minimizing_bytes(Called(), config, Spec((1, 8, 8), (3,)), num_examples=0)
    assert called == SGD_COPIES * 4 * (65 * 1000) + 3000 * 4 * (64 + 1000)


def test_batches_of_evaluation_count_where_they_are_larger_than_those_of_training():
    model, spec = linear(64), Spec((1, 8, 8), (3,))
    small = minimizing_bytes(model, MinimizeConfig(batch_size=1), spec, num_examples=0)
    assert small == SGD_COPIES * 4 * (65 * 3) + 2 * 500 * 4 * 64  # a layer's input and as much output
    assert small == minimizing_bytes(model, MinimizeConfig(batch_size=999), spec, num_examples=0)
    assert small < minimizing_bytes(model, MinimizeConfig(batch_size=1001), spec, num_examples=0)


@pytest.mark.parametrize(
    ("spec", "num_bytes"),
    [
        (Spec((3, 8, 8), (10,)), 3 * 64 + 8),  # pixels of one byte
        (Spec((3, 8, 8), (2, 8, 8)), 3 * 64 + 8 * 64),
        (Spec((30,), (1,)), 4 * 30 + 8),
        (Spec((16,), (16, 50), num_values=50), 8 * 16 + 8 * 16),
    ],
)
def test_examples_count_by_what_they_are(spec, num_bytes):
    if spec.num_values is None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(spec.inputs), spec.num_outputs))
    else:
        model = nn.Embedding(spec.num_values, spec.outputs[-1])
    none, some = (minimizing_bytes(model, MinimizeConfig(), spec, num_examples=num) for num in (0, 7))
    assert some - none == 7 * num_bytes
    assert 0 < forward_share(model, spec) < 1


def test_mixed_precision_halves_what_is_saved_and_its_cast_weights_are_no_examples():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 10))
    sizes = [
        minimizing_bytes(
            model,
            MinimizeConfig(batch_size=batch_size, precision=precision),
            Spec((1, 8, 8), (3,)),
            num_examples=0,
        )
        for precision in ("float32", "bfloat16")
        for batch_size in (3000, 5000)
    ]
    assert sizes[1] - sizes[0] == 2000 * 4 * (64 + 1000)
    assert sizes[3] - sizes[2] == 2000 * 2 * (64 + 1000)


def test_the_estimate_leaves_the_model_and_the_generator_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(2 * 36, 3))
    model.eval()
    before, state = weights(model), torch.get_rng_state()
    minimizing_bytes(model, MinimizeConfig(), Spec((1, 8, 8), (3,)), num_examples=0)
    assert same_bits(weights(model), before)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_actors_that_fit_on_their_card_are_not_warned_of():
    needed = 2_000_000_000 - PROCESS_BYTES
    assert memory_warning(needed, 8_000_000_000, num_gpus=0.25, most_actors=9) is None
    assert memory_warning(needed, 7_999_999_999, num_gpus=0.25, most_actors=9) is not None
    assert memory_warning(needed, 7_999_999_999, num_gpus=0.25, most_actors=3) is None  # only so many come
    assert memory_warning(needed, 7_999_999_999, num_gpus=0.3, most_actors=9) is None  # three to a card
    assert memory_warning(needed, 2_000_000_000, num_gpus=0.51, most_actors=9) is None
    assert memory_warning(needed, 2_000_000_000, num_gpus=2.0, most_actors=9) is None


def test_the_warning_has_the_figures_and_the_way_out():
    warning = memory_warning(5_500_000_000, 16_000_000_000, num_gpus=0.25, most_actors=8)
    assert warning is not None
    assert "4 actors of 0.25 GPU need an estimated 24.00 GB of a card's 16.00 GB" in warning
    assert (
        "a smaller minimize.batch_size, smaller subsets, or if several share a card a larger actors.num_gpus" in warning
    )
    alone = memory_warning(5_500_000_000, 2_000_000_000, num_gpus=1.0, most_actors=8)
    assert alone is not None
    assert alone.startswith("1 actor of 1 GPU needs an estimated 6.00 GB of a card's 2.00 GB")


FREED: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "averaged": {"averaging": AveragingConfig(kind="ema")},
    "extrapolated": {"extrapolation": ExtrapolationConfig(kind="past_local")},
    "skipping": {"skipping": SkippingConfig(kind="wus")},
    "lbfgs": {"optimizer": "lbfgs"},
    "levenberg_marquardt": {"optimizer": "levenberg_marquardt", "patience": 0},
    "own_loop": {"loop": "tests.own_loops:momentum"},
    "own_objective": {"objective": "tests.own_objectives:mixup"},
}


def alive_after(name: str, data: Examples) -> list[nn.Module | None]:
    """Minimize two networks that nobody else holds, and return those that are still there without a collection."""
    recipe = MinimizeConfig(epochs=2, batch_size=8, **FREED.get(name, {}))
    models, states = [linear(64, seed=n) for n in range(2)], list[Any]()
    refs = [weakref.ref(model) for model in models]
    gc.collect()
    gc.disable()
    try:
        if name == "packed":
            minimize_packed(models, [data] * 2, recipe, seeds=[1, 2], on_step=lambda p: states.append(p[1].capture()))
        else:
            minimize(models[0], data, recipe, seed=1, on_step=lambda progress: states.append(progress.capture()))
        states.clear()
        del models
        return [ref() for ref in refs]
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [*FREED, "packed"])
def test_a_network_is_freed_at_the_end_of_its_minimization_without_the_garbage_collector(name: str):
    data = examples(objective=SQUARED_ERROR) if name == "levenberg_marquardt" else examples()
    alive_after(name, data)  # torch imports modules at the first call, and keeps what called
    assert alive_after(name, data) == [None, None]
