"""Traced units: permuting them leaves every network's function as it is, and nothing else is permuted."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysubset.aggregation.alignment.tracing import UnitStructure, permuted, random_permutations, trace_units
from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.tasks import Spec

OWN = {
    "cnn": ModelConfig(name="cnn", width=8, depth=2),
    "cnn with group norm": ModelConfig(name="cnn", width=16, depth=2, norm="group"),
    "cnn without norm": ModelConfig(name="cnn", width=8, depth=2, norm="none"),
    "lenet5": ModelConfig(name="lenet5"),
    "mlp": ModelConfig(name="mlp", width=16, depth=2),
    "cifar_resnet": ModelConfig(name="cifar_resnet", width=8, depth=8),
    "cifar_resnet with group norm": ModelConfig(name="cifar_resnet", width=16, depth=8, norm="group"),
    "cifar_resnet without norm": ModelConfig(name="cifar_resnet", width=8, depth=8, norm="none"),
}
# The smallest side each takes, and how many groups of units it has. Of what is wide or deep, a few blocks: small().
TORCHVISION = {
    "resnet18": (8, 12),
    "mobilenet_v2": (8, 25),
    "densenet": (32, 1 + 8 * 2 + 3),
    "squeezenet1_0": (21, 25),
    "googlenet": (15, 57),
    "resnext": (8, 5 + 5 * 2 * 4),
    "efficientnet_b0": (8, 40),
    "regnet_y_400mf": (8, 1083),
    "shufflenet_v2_x0_5": (8, 80),
    "convnext": (32, 3 + 4),
}


def small(name: str) -> nn.Module:
    """A network by one of torchvision's classes, whose initialization by name takes a second or two."""
    from torchvision.models import ConvNeXt, DenseNet, ResNet, SwinTransformer, VisionTransformer
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.resnet import Bottleneck

    networks: dict[str, Callable[[], nn.Module]] = {
        "densenet": lambda: DenseNet(8, (2, 2, 2, 2), 16, num_classes=5),
        "resnext": lambda: ResNet(Bottleneck, [1, 2, 1, 1], groups=4, width_per_group=4, num_classes=5),
        "convnext": lambda: ConvNeXt([CNBlockConfig(*sizes) for sizes in ((12, 24, 1), (24, 48, 2), (48, None, 1))]),
        "vit": lambda: VisionTransformer(32, 16, 1, 2, 16, 16, num_classes=5),
        "swin": lambda: SwinTransformer([4, 4], 12, [2], [2], [4, 4], num_classes=5),
    }
    return networks[name]()


def scattered(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with parameters and statistics of which no two are alike."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    for value in model.state_dict().values():
        if value.is_floating_point() and value.ndim and value.numel() == len(value):
            value.uniform_(0.5, 1.5, generator=generator)
    return model


def permuted_outputs(model: nn.Module, structure: UnitStructure, images: Tensor) -> tuple[Tensor, Tensor]:
    orders = random_permutations(structure.groups, torch.Generator().manual_seed(2))
    weights = permuted(model.state_dict(), structure.groups, orders)
    assert any(not torch.equal(weights[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        return model(images), torch.func.functional_call(model, weights, (images,))


def assert_unchanged(model: nn.Module, shape: tuple[int, int, int]) -> UnitStructure:
    model = scattered(model)
    structure = trace_units(model, Spec(shape, (5,)))
    images = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before, after = permuted_outputs(model, structure, images)
    assert float((before - after).abs().max()) <= 1e-6 * float((before - before.mean(1, keepdim=True)).abs().max())
    return structure


@pytest.mark.parametrize("name", OWN)
def test_permuting_units_leaves_the_outputs_of_our_own_networks_unchanged(name):
    side = 28 if name == "lenet5" else 8
    model = build_model(OWN[name], Spec((1, side, side), (5,)), seed=0)
    structure = assert_unchanged(model, (1, side, side))
    assert structure.num_fixed_groups == 0


@pytest.mark.parametrize("name", TORCHVISION)
def test_permuting_units_leaves_the_outputs_of_torchvisions_networks_unchanged(name):
    from torchvision import models

    side, num_groups = TORCHVISION[name]
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    is_named = name in models.list_models()
    model = models.get_model(name, weights=None, num_classes=5, **options) if is_named else small(name)
    structure = assert_unchanged(model, (3, side, side))
    assert len(structure.groups) == num_groups


def test_vgg_is_traced_through_its_flatten():
    from torchvision.models import vgg

    layers = [4, "M", 8, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M"]  # vgg11's, narrow
    model = vgg.VGG(vgg.make_layers(layers, batch_norm=True), num_classes=5, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(16 * 7 * 7, 20), nn.ReLU(), nn.Linear(20, 5))  # 4096² take minutes
    structure = assert_unchanged(model, (3, 32, 32))
    (columns,) = [pair for pair in structure.groups[-2].axes if pair[0].names == ("classifier.0.weight",)]
    torch.testing.assert_close(columns[1], torch.arange(16 * 49).reshape(16, 49))
    assert (columns[0].dim, columns[0].rows) == (1, None)


class Network(nn.Module):
    """A convolution of 6 channels, what is given, then the mean over the map and a linear layer."""

    def __init__(self, body: Callable[..., Tensor], num_features: int = 6, **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(num_features, 5)
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self, self.conv(images)).mean((2, 3)))


def sizes(structure: UnitStructure) -> list[int]:
    return [group.size for group in structure.groups]


@pytest.mark.parametrize(
    ("body", "num_features", "modules", "expected"),
    [
        (lambda net, x: x, 6, {}, [6]),
        (lambda net, x: torch.cat([x, -x], 1), 12, {}, [6]),
        (lambda net, x: F.relu(net.a(x)) + x, 6, {"a": nn.Conv2d(6, 6, 1)}, [6]),
        (lambda net, x: torch.cat([net.a(x), x], dim=1), 10, {"a": nn.Conv2d(6, 4, 1)}, [6, 4]),
        (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 3)) + net.a(x), 10, {"a": nn.Conv2d(6, 10, 1)}, [6, 4]),
        (lambda net, x: net.a(x), 12, {"a": nn.Conv2d(6, 12, 3, groups=6)}, [6]),  # depthwise, two of each channel
        (lambda net, x: net.a(x), 8, {"a": nn.Conv2d(6, 8, 3, groups=2)}, [3, 3, 4, 4]),
        (lambda net, x: net.a(x), 6, {"a": nn.GroupNorm(2, 6)}, [3, 3]),
        (lambda net, x: net.a(x), 6, {"a": nn.PReLU(6)}, [6]),
        (lambda net, x: net.a(x), 4, {"a": nn.ConvTranspose2d(6, 4, 3)}, [6, 4]),
        (lambda net, x: net.b(net.a(x)), 4, {"a": nn.Conv2d(6, 1, 1), "b": nn.Conv2d(1, 4, 1)}, [6, 4]),
        (lambda net, x: x * torch.sigmoid(net.a(x.mean((2, 3), keepdim=True))), 6, {"a": nn.Conv2d(6, 6, 1)}, [6]),
        (lambda net, x: x * net.a(x), 6, {"a": nn.Conv2d(6, 1, 1)}, [6]),  # one map of attention for all channels
        (lambda net, x: net.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 6, {"a": nn.LayerNorm(6)}, [6]),
        (lambda net, x: net.a(x[:, ::2]), 4, {"a": nn.Conv2d(3, 4, 1)}, [3, 3, 4]),  # three reach nothing
        (lambda net, x: net.a(net.a(x)), 6, {"a": nn.Conv2d(6, 6, 1)}, [6]),  # one module twice
        (lambda net, x: net.a(x) - x.softmax(1), 6, {"a": nn.BatchNorm2d(6, affine=False)}, [6]),
    ],
)
def test_units_that_meet_are_one_group_and_others_are_not(body, num_features, modules, expected):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Network(body, num_features, **modules)
    assert sizes(assert_unchanged(model, (3, 8, 8))) == expected


@pytest.mark.parametrize(
    ("body", "num_features", "modules", "held_by"),
    [
        (lambda net, x: x.cumsum(1), 6, {}, "cumsum"),
        (lambda net, x: x.sort(1).values, 6, {}, "sort"),
        (lambda net, x: net.a(x), 6, {"a": nn.LocalResponseNorm(2)}, "a (LocalResponseNorm)"),
    ],
)
def test_units_that_an_unknown_operation_sees_stay_in_place(body, num_features, modules, held_by):
    model = Network(lambda net, x: net.last(body(net, x)), 4, last=nn.Conv2d(num_features, 4, 1), **modules)
    structure = assert_unchanged(model, (3, 8, 8))
    assert sizes(structure) == [4]
    assert structure.num_fixed_groups == 1
    with pytest.raises(ValueError, match=f"all are kept in place by {re.escape(held_by)}"):
        trace_units(Network(body, num_features, **modules), Spec((3, 8, 8), (5,)))


def test_units_of_which_each_has_a_constant_of_its_own_stay_in_place():
    scales = torch.linspace(0, 1, 6).view(1, 6, 1, 1)
    model = Network(lambda net, x: net.last(x + scales), 4, last=nn.Conv2d(6, 4, 1))
    assert sizes(assert_unchanged(model, (3, 8, 8))) == [4]
    alike = Network(lambda net, x: net.last(x + scales[:, :1]), 4, last=nn.Conv2d(6, 4, 1))
    assert sizes(assert_unchanged(alike, (3, 8, 8))) == [6, 4]


def test_a_constant_channel_beside_others_does_not_move():
    ramp = torch.linspace(0, 1, 36, dtype=torch.float64).view(1, 1, 6, 6).expand(2, 1, 6, 6)
    model = Network(lambda net, x: net.last(torch.cat([x, ramp], 1)), 4, last=nn.Conv2d(7, 4, 1))
    assert sizes(trace_units(model, Spec((3, 8, 8), (5,)))) == [6, 4]


def test_units_that_meet_each_other_crosswise_are_permuted_in_pairs():
    model = Network(lambda net, x: net.last(x + x.flip(1)), 4, last=nn.Conv2d(6, 4, 1))
    structure = assert_unchanged(model, (3, 8, 8))
    assert sizes(structure) == [3, 4]
    assert structure.groups[0].axes[0][1].tolist() == [[0, 5], [1, 4], [2, 3]]


def test_a_residual_stream_that_widens_by_zeros_is_permuted_by_parts():
    model = build_model(OWN["cifar_resnet"], Spec((3, 8, 8), (5,)), seed=0)
    groups = {group.name: group for group in trace_units(model, Spec((3, 8, 8), (5,))).groups}
    stream = {axis.names[0]: positions.flatten().tolist() for axis, positions in groups["conv"].axes if axis.dim == 1}
    assert stream["stage2.0.conv0.weight"] == list(range(8))
    assert groups["conv"].size == 8
    new = {name: group.size for name, group in groups.items() if name.endswith("conv1[8]") or name.endswith("[16]")}
    assert new == {"stage1.0.conv1[8]": 8, "stage2.0.conv1[16]": 16}
    assert stream["head.weight"] == list(range(8))


def test_shared_parameters_are_permuted_once_and_stay_shared():
    first, second = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
    second.weight, second.bias = first.weight, first.bias
    model = Network(lambda net, x: net.a(x) + net.b(x) + x, 6, a=first, b=second)
    assert_unchanged(model, (3, 8, 8))


def test_a_layer_of_which_nothing_is_known_is_refused_by_name():
    attention = nn.MultiheadAttention(6, 2)

    def attend(net: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)
        return net.attention(tokens, tokens, tokens)[0].permute(1, 2, 0).unsqueeze(-1)

    with pytest.raises(ValueError, match=r"nothing is known of attention \(MultiheadAttention\); use subsets.start"):
        trace_units(Network(attend, 6, attention=attention), Spec((3, 8, 8), (5,)))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_layers_whose_weight_is_computed_from_others_are_refused(norm):
    with pytest.raises(ValueError, match=r"units cannot be aligned: nothing is known of 0 \((Parametrized)?Linear\)"):
        trace_units(nn.Sequential(norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 5)), Spec((4,), (5,)))


@pytest.mark.parametrize(
    ("name", "refused"), [("vit", "expand in"), ("swin", r"features\.1\.0\.attn \(ShiftedWindowAttention\)")]
)
def test_torchvisions_transformers_are_refused(name, refused):
    with pytest.raises(ValueError, match=f"units cannot be aligned: nothing is known of .*{refused}"):
        trace_units(small(name), Spec((3, 32, 32), (5,)))


def test_a_forward_pass_that_depends_on_its_data_is_refused_with_the_module_named():
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.fx cannot trace branch \(Branching\): symbolically traced variables"):
        trace_units(Network(lambda net, x: net.branch(x), 6, branch=Branching()), Spec((3, 8, 8), (5,)))


def test_units_over_a_table_are_permuted_and_tokens_refused():
    model = build_model(OWN["mlp"], Spec((7,), (2,)), seed=0)
    assert [group.size for group in trace_units(model, Spec((7,), (2,))).groups] == [16, 16]
    with pytest.raises(ValueError, match=r"cannot be aligned: its inputs are tokens.*use subsets\.start=shared"):
        trace_units(nn.Embedding(9, 2), Spec((7,), (7, 2), num_values=9))


def test_a_network_without_hidden_units_is_refused():
    with pytest.raises(ValueError, match=r"units cannot be aligned: none are hidden; use subsets\.start=shared"):
        trace_units(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), Spec((3, 2, 2), (5,)))


def test_a_network_whose_units_are_all_held_is_refused_with_the_operation_named():
    with pytest.raises(ValueError, match="all are kept in place by cumsum in"):
        trace_units(Network(lambda net, x: x.cumsum(1)), Spec((3, 8, 8), (5,)))


def test_a_wrong_structure_does_not_pass_the_check(monkeypatch):
    """As if softmax over channels and a sum over every second one were the same thing."""
    from raysubset.aggregation.alignment import unit_tracer

    monkeypatch.setattr(unit_tracer, "_MIXING", frozenset({"cumsum"}))
    with pytest.raises(ValueError, match="permuted units change the outputs"):
        trace_units(Network(lambda net, x: torch.cumsum(x, 1)), Spec((3, 8, 8), (5,)))


def test_a_network_without_finite_outputs_for_random_inputs_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"change the outputs .* by nan .*; use .* another aggregation.method"):
        trace_units(Network(lambda net, x: x.log().relu()), Spec((3, 8, 8), (5,)))


def test_tracing_leaves_the_model_as_it_is():
    model = build_model(OWN["cnn"], Spec((1, 8, 8), (5,)), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace_units(model, Spec((1, 8, 8), (5,)))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32
