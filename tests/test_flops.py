"""The forward pass's share of a pass, against counts by hand."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.utils.flop_counter
from torch import Tensor, nn

from raysubset.costs import FORWARD_SHARE
from raysubset.tasks import Spec
from raysubset.training import flops, forward_share
from tests.tiny import cnn, same_bits, weights

SPEC = Spec((1, 8, 8), (3,))


def test_a_linear_networks_forward_pass_is_a_half():
    assert forward_share(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), SPEC) == 0.5


def test_a_first_layer_needs_no_gradient_of_its_input():
    first, second = 64 * 20, 20 * 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3))
    assert forward_share(model, SPEC) == pytest.approx((first + second) / (2 * first + 3 * second))


def test_a_frozen_layer_has_no_backward_pass():
    first, second = 64 * 20, 20 * 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20).requires_grad_(False), nn.ReLU(), nn.Linear(20, 3))
    assert forward_share(model, SPEC) == pytest.approx((first + second) / (first + 2 * second))


def test_convolutions_count_by_the_places_they_are_used_at():
    first, second, head = 8 * 8 * 9 * 4, 4 * 4 * 36 * 8, 8 * 3
    counted = first + second + head
    assert forward_share(cnn(), SPEC) == pytest.approx(counted / (3 * counted - first))


def test_large_networks_are_counted_without_being_computed_and_alike():
    small = forward_share(cnn(), SPEC)
    with mock.patch.object(flops, "_SMALL", 0):
        assert forward_share(cnn(), SPEC) == small


def test_a_large_network_that_cannot_run_without_values_is_computed():
    class Net(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            outputs = super().forward(input)
            return outputs if outputs.sum().item() < 1e9 else 2 * outputs

    with mock.patch.object(flops, "_SMALL", 0):
        assert forward_share(Net(nn.Flatten(), nn.Linear(64, 3)), SPEC) == 0.5


def test_a_network_that_derives_itself_is_given_a_third():
    class Net(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            with torch.enable_grad():
                places = input.detach().requires_grad_()
                (slopes,) = torch.autograd.grad(super().forward(places).sum(), places, create_graph=True)
            return slopes.flatten(1)[:, :3]

    assert forward_share(Net(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 1)), SPEC) == FORWARD_SHARE


def test_a_network_without_products_is_given_a_third():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(64))

        def forward(self, images: Tensor) -> Tensor:
            return (images.flatten(1) * self.w)[:, :3]

    assert forward_share(Net(), SPEC) == pytest.approx(1 / 3)


def test_counting_leaves_the_model_and_the_random_numbers_as_they_were():
    model = nn.Sequential(cnn(), nn.Dropout(0.5)).eval()
    before, drawn = weights(model), torch.get_rng_state()
    forward_share(model, SPEC)
    assert same_bits(weights(model), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_another_torch_may_lack_the_counters_inner_class():
    lacking = SimpleNamespace(FlopCounterMode=torch.utils.flop_counter.FlopCounterMode)
    with mock.patch.object(torch.utils, "flop_counter", lacking):
        assert forward_share(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), SPEC) == 0.5
