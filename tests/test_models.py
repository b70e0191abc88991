"""Networks: sizes counted by hand, seeds, torchvision's demands on images, and the user's own functions."""

import dataclasses
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from raysubset.config import MinimizeConfig, ModelConfig
from raysubset.models import (
    architecture,
    build_model,
    has_batch_norm,
    has_dropout,
    lost_in_copies,
    needs_default_layout,
    num_parameters,
)
from raysubset.tasks import Spec
from raysubset.trained_model.network_graph import GraphNetwork, trace
from raysubset.training import evaluate, minimize, place
from tests.tiny import examples, weights

DIGITS, MNIST, CIFAR = (8, 8, 1), (28, 28, 1), (32, 32, 3)


def build(name: str = "cnn", *, num_classes: int = 10, image_shape=CIFAR, seed: int = 0, **knobs) -> nn.Module:
    config = ModelConfig(name=name, **knobs)
    height, width, channels = image_shape
    return build_model(config, Spec((channels, height, width), (num_classes,)), seed=seed)


def logits(model: nn.Module, image_shape=CIFAR, num: int = 3) -> torch.Tensor:
    height, width, channels = image_shape
    return model(torch.rand(num, channels, height, width))


@pytest.mark.parametrize(
    ("name", "image_shape", "knobs", "expected"),
    [
        # convolutions without bias, 2 per channel of batch-norm, then the head
        ("cnn", CIFAR, {"width": 16, "depth": 3}, 9 * (3 * 16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + 65 * 10),
        ("cnn", CIFAR, {"width": 16, "depth": 3, "norm": "batch"}, 24_346),
        ("cnn", CIFAR, {"width": 16, "depth": 3, "norm": "group"}, 24_346),
        ("cnn", CIFAR, {"width": 16, "depth": 3, "norm": "none"}, 24_346 - (16 + 32 + 64)),  # a bias, not two of a norm
        ("cnn", DIGITS, {}, 9 * (8 + 8 * 16) + 2 * (8 + 16) + 17 * 10),
        ("lenet5", MNIST, {}, 61_706),  # the textbook's count
        ("lenet5", (32, 32, 1), {}, 61_706),
        ("mlp", DIGITS, {}, 65 * 64 + 65 * 10),
        ("mlp", DIGITS, {"width": 5, "depth": 3}, 65 * 5 + 6 * 5 + 6 * 5 + 6 * 10),
        ("cifar_resnet", CIFAR, {}, 269_722),  # He et al.: 0.27M
        ("cifar_resnet", CIFAR, {"depth": 32}, 464_154),  # 0.46M
        ("cifar_resnet", CIFAR, {"depth": 110}, 1_727_962),  # 1.7M
        ("resnet18", CIFAR, {}, 11_689_512 - 513 * 1000 + 513 * 10),  # torchvision's count, its head replaced
    ],
)
def test_parameters_are_as_many_as_counted_by_hand(name, image_shape, knobs, expected):
    assert num_parameters(build(name, image_shape=image_shape, **knobs)) == expected


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("image_shape", [(1, 1, 1), DIGITS, MNIST, (20, 31, 3), CIFAR])
@pytest.mark.parametrize("name", ["cnn", "cifar_resnet"])
def test_our_convolutional_networks_take_any_image(name, image_shape, norm):
    model = build(name, image_shape=image_shape, norm=norm, width=6, depth={"cnn": 4, "cifar_resnet": 8}[name])
    assert model.training
    assert logits(model, image_shape).shape == (3, 10)
    assert has_batch_norm(model) == (norm == "batch")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_cnn_halves_its_map_while_the_side_is_at_least_four():
    model = build(image_shape=DIGITS, depth=3)
    assert model.get_submodule("block2")(torch.rand(1, 16, 2, 2)).shape == (1, 32, 2, 2)
    assert [name for name, _ in model.named_modules() if name.endswith("pool")] == [
        "block0.pool",
        "block1.pool",
        "pool",
    ]


def test_group_norm_takes_as_many_groups_as_divide_the_channels_up_to_eight():
    model = build(width=12, depth=2, norm="group")
    assert [module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)] == [4, 8]


def test_a_cifar_resnet_with_zero_residuals_passes_its_subsampled_input_on():
    model = build("cifar_resnet", width=4, depth=8).eval()
    block = model.get_submodule("stage1.0")
    nn.init.zeros_(block.get_parameter("norm1.weight"))
    features = torch.rand(2, 4, 6, 6)
    given = block(features)
    assert torch.equal(given[:, :4], features[:, :, ::2, ::2])
    assert not given[:, 4:].any()


@pytest.mark.parametrize("name", ["cnn", "lenet5", "mlp", "cifar_resnet", "resnet18"])
def test_a_seed_alone_decides_the_weights(name):
    first = build(name, seed=1).state_dict()
    torch.rand(5)
    again, other = build(name, seed=1).state_dict(), build(name, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "googlenet"])
def test_building_leaves_the_global_generator_alone(name):
    before = torch.random.get_rng_state()
    build(name)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_the_check_of_the_outputs_leaves_batch_norm_untouched(name):
    for key, buffer in build(name).named_buffers():
        assert torch.equal(buffer, torch.ones_like(buffer) if key.endswith("running_var") else torch.zeros_like(buffer))


def test_channels_last_gives_the_same_logits():
    for name in ("cnn", "cifar_resnet"):
        model = build(name).eval()
        images = torch.rand(4, 3, 32, 32)
        expected = model(images)
        given = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [("squeezenet1_1", CIFAR), ("regnet_y_400mf", CIFAR), ("vit_b_32", (64, 64, 1)), ("inception_v3", (75, 75, 3))],
)
def test_a_torchvision_network_gives_only_its_logits_in_train_mode(name, image_shape):
    model = build(name, num_classes=7, image_shape=image_shape)
    assert model.training
    assert logits(model, image_shape, num=2).shape == (2, 7)


def test_grey_images_go_into_torchvision_as_three_equal_channels():
    grey, colour = build("resnet18", image_shape=MNIST).eval(), build("resnet18", image_shape=(28, 28, 3)).eval()
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(grey(images), colour(images.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [("alexnet", CIFAR), ("vgg11", (28, 20, 1)), ("vit_b_16", MNIST), ("vit_b_16", (32, 48, 3))],
)
def test_images_a_torchvision_network_cannot_take_are_refused_with_a_size_that_it_can(name, image_shape):
    message = rf"{name} cannot take images of .*set data\.image_size=224, which all"
    with torch.device("meta"), pytest.raises(ValueError, match=message):  # nothing is drawn for it in vain
        build(name, image_shape=image_shape)


def test_a_real_pass_agrees_with_the_smallest_size_found_without_arithmetic():
    from torchvision.models import alexnet

    network = alexnet(num_classes=10).eval()
    assert network(torch.zeros(1, 3, 63, 63)).shape == (1, 10)
    with pytest.raises(RuntimeError, match="too small"):
        network(torch.zeros(1, 3, 62, 62))


def test_bad_names_and_images_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="there is no model resnet81; did you mean resnet18"):
        build("resnet81")
    with pytest.raises(ValueError, match="did you mean lenet5"):
        build("lenet")
    with pytest.raises(ValueError, match="resnet18 takes images of 1 or 3 channels, not 4"):
        build("resnet18", image_shape=(32, 32, 4))
    with pytest.raises(ValueError, match=r"lenet5 takes images of 28×28 or 32×32, not 8×8"):
        build("lenet5", image_shape=DIGITS)


USERS_MODULE = """
import torch
from torch import nn

def linear(num_classes, image_shape):
    channels, height, width = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes)).double()

def lazy(num_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(num_classes))

def one_class_short(num_classes, image_shape):
    return linear(num_classes - 1, image_shape)

def other_images(num_classes, image_shape):
    return linear(num_classes, (3, 5, 5))

def frozen(num_classes, image_shape):
    return linear(num_classes, image_shape).requires_grad_(False)

class Pair(nn.Module):
    def forward(self, images):
        return images, images

def pair(num_classes, image_shape):
    return Pair()

class Factors(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.users, self.items = nn.Embedding(3, 4), nn.Embedding(50, 4)
    def forward(self, inputs):
        user, item = inputs[:, 0].long(), inputs[:, 1].long()
        return (self.users(user) * self.items(item)).sum(1, keepdim=True) + inputs[:, 2:].sum(1, keepdim=True)

def predicted_class(num_classes, image_shape):
    return nn.Sequential(linear(num_classes, image_shape), nn.Softmax(1), ArgMax())

class ArgMax(nn.Module):
    def forward(self, logits):
        return logits.argmax(1)

def text(num_classes, image_shape):
    return "a network"

def of_spec(spec, width=8):
    if spec.num_values is not None:
        first = nn.Sequential(nn.Embedding(spec.num_values, width), nn.Flatten(), nn.LazyLinear(width))
    else:
        first = nn.Sequential(nn.Flatten(), nn.LazyLinear(width))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(width, spec.num_outputs), nn.Unflatten(1, spec.outputs))

class InPlace(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.head = nn.Linear(*spec.inputs, *spec.outputs)

    def forward(self, rows):
        rows -= 1
        return self.head(rows)

def classes_before_tokens(spec):
    return nn.Sequential(of_spec(spec), nn.Flatten(), nn.Unflatten(1, spec.outputs[::-1]))

class NoBatch(InPlace):
    def forward(self, rows):
        return self.head(rows).mean(0)
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_networks.py").write_text(USERS_MODULE)
    (tmp_path / "users_broken.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "users_networks"
    sys.modules.pop("users_networks", None)


def test_a_users_function_gets_channels_first_and_is_seeded(users_module):
    model = build(f"{users_module}:linear", num_classes=4, image_shape=(2, 3, 5), seed=7)
    assert num_parameters(model) == 31 * 4
    assert logits(model, (2, 3, 5)).shape == (3, 4)
    assert next(model.parameters()).dtype == torch.float32
    again = build(f"{users_module}:linear", num_classes=4, image_shape=(2, 3, 5), seed=7)
    assert torch.equal(model.get_parameter("1.weight"), again.get_parameter("1.weight"))


def test_lazy_modules_are_materialised_under_the_seed(users_module):
    first, again = (build(f"{users_module}:lazy", image_shape=DIGITS) for _ in range(2))
    assert num_parameters(first) == 2 * 64 + 65 * 10
    assert torch.equal(first.get_parameter("2.weight"), again.get_parameter("2.weight"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("one_class_short", r"gave float32 \[2, 9\] for two images; it should give float outputs \[2, 10\]"),
        ("predicted_class", r"gave int64 \[2\] for two images"),
        ("other_images", r"cannot take images of shape \[2, 3, 32, 32\] \[N, C, H, W\]: .*mat1 and mat2"),
        ("frozen", "has no trainable parameters"),
        ("pair", r"gave a tuple; it should give outputs \[N, 10\]: join several by torch.cat, which the loss\(\)"),
        ("text", "returned a str; it should return an nn.Module"),
        ("liner", "has no function liner; did you mean linear"),
    ],
)
def test_a_users_function_of_no_use_is_refused_with_what_it_gave(users_module, function, message):
    with pytest.raises(ValueError, match=message):
        build(f"{users_module}:{function}")


TABLE, TEXT = Spec((5,), (2,)), Spec((6,), (6, 9), num_values=9)
MASK = Spec((3, 4, 5), (2, 4, 5))


@pytest.mark.parametrize("spec", [TABLE, TEXT, MASK, Spec((3, 4, 5), (7,))])
def test_a_users_function_of_one_argument_gets_the_spec(users_module, spec):
    model = build_model(ModelConfig(name=f"{users_module}:of_spec"), spec, seed=0)
    assert model(spec.zeros(3)).shape == (3, *spec.outputs)
    graph, constants = trace(model, spec)
    same = GraphNetwork(json.loads(json.dumps(graph)), model.state_dict() | constants, spec)
    inputs = spec.random(4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(same(inputs), model.eval()(inputs))
    with pytest.raises(ValueError, match=r"it holds no network with outputs \[1\]"):
        GraphNetwork(graph, model.state_dict() | constants, dataclasses.replace(spec, outputs=(1,)))


@pytest.mark.parametrize("spec", [TABLE, TEXT, MASK])
def test_a_users_function_of_two_arguments_is_for_images_and_classes(users_module, spec):
    with pytest.raises(ValueError, match=r"linear takes \(num_classes, .*, but .* of one argument, a raysubset"):
        build_model(ModelConfig(name=f"{users_module}:linear"), spec, seed=0)


def test_networks_over_tables_are_tried_as_those_over_images(users_module):
    model = build_model(ModelConfig(name=f"{users_module}:InPlace"), TABLE, seed=0)
    rows = torch.zeros(3, 5)
    model(rows)
    assert not rows.any()
    assert not needs_default_layout(model)
    with pytest.raises(ValueError, match=r"gave float32 \[2\] for two inputs; it should give float outputs \[2, 2\]"):
        build_model(ModelConfig(name=f"{users_module}:NoBatch"), TABLE, seed=0)
    with pytest.raises(ValueError, match=r"outputs \[2, 6, 9\]: those dimensions are in another order"):
        build_model(ModelConfig(name=f"{users_module}:classes_before_tokens"), TEXT, seed=0)
    with pytest.raises(
        ValueError, match=r"InPlace cannot take inputs of shape \[2, 6\]: .*; these are zeros, which it must"
    ):
        build_model(ModelConfig(name=f"{users_module}:InPlace"), dataclasses.replace(TEXT, outputs=(2,)), seed=0)


def test_ids_of_several_kinds_are_tried_within_their_numbers(users_module):
    """As users and items are, with a number beside them or not, which one bound on all ids would not tell."""
    for num_values, is_integer in (((3, 50), True), ((3, 50, None), False)):
        spec = Spec((len(num_values),), (1,), num_values)
        assert spec.are_integers is is_integer
        drawn = spec.random(500, torch.Generator().manual_seed(0))
        assert drawn.shape == (500, len(num_values))
        assert (spec.zeros(2).dtype, drawn.dtype) == ((torch.int64,) * 2 if is_integer else (torch.float32,) * 2)
        assert [sorted(set(drawn[:, entry].tolist())) for entry in (0, 1)] == [[*range(3)], [*range(50)]]
        model = build_model(ModelConfig(name=f"{users_module}:Factors"), spec, seed=0)
        assert model(drawn).shape == (500, 1)
        graph, constants = trace(model, spec)
        same = GraphNetwork(json.loads(json.dumps(graph)), model.state_dict() | constants, spec)
        torch.testing.assert_close(same(drawn), model.eval()(drawn))
    inner = Spec((4, 2), (1,), (3, None)).random(100, torch.Generator().manual_seed(0))
    assert set(inner[:, :, 0].unique().tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"num_values has 2 entries, and inputs are \[3\]: give one for each"):
        Spec((3,), (1,), (3, 50))
    with pytest.raises(ValueError, match="has 16777217 ids beside numbers, and float32 holds 16777216 exactly"):
        Spec((2,), (1,), (2**24 + 1, None))
    one_bound = r"IndexError: .*; these are integers below 50: Spec\(…, num_values=\(60, 150, None\)\) says which"
    for num_values, message in ((50, one_bound), (None, "IndexError: .*; these are standard normal numbers: Spec")):
        with pytest.raises(ValueError, match=message):
            build_model(ModelConfig(name=f"{users_module}:Factors"), Spec((2,), (1,), num_values), seed=1)
    with pytest.raises(ValueError, match=r"mlp takes floats; inputs are tokens \[2\] .*write a network of your own"):
        build_model(ModelConfig(name="mlp"), Spec((2,), (1,), (3, 50)), seed=0)


def test_auto_is_the_network_that_fits_inputs_and_outputs():
    specs = {"cnn": Spec((3, 32, 32), (10,)), "unet": MASK, "mlp": TABLE, "transformer": TEXT}
    for name, spec in specs.items():
        assert architecture(ModelConfig(width=7), spec) == ModelConfig(name=name, width=7)
    assert architecture(ModelConfig(name="resnet18"), TABLE).name == "resnet18"
    with pytest.raises(ValueError, match="norm does not apply to mlp"):
        architecture(ModelConfig(norm="group"), TABLE)
    with pytest.raises(ValueError, match=r"cnn takes .*; inputs are floats \[5\] and outputs \[2\] .*model.name=mlp"):
        build_model(ModelConfig(name="cnn"), TABLE, seed=0)
    with pytest.raises(ValueError, match=r"mlp takes floats; inputs are tokens \[6\] .*model.name=transformer"):
        build_model(ModelConfig(name="mlp"), TEXT, seed=0)


def test_an_mlp_takes_any_floats_and_gives_any_shape():
    for spec in (TABLE, MASK, Spec((4, 2), (1,))):
        model = build_model(ModelConfig(name="mlp", width=4), spec, seed=0)
        assert model(spec.zeros(3)).shape == (3, *spec.outputs)
        assert num_parameters(model) == (math.prod(spec.inputs) + 1) * 4 + 5 * spec.num_outputs


def test_a_missing_module_is_told_apart_from_one_that_it_imports(users_module):
    with pytest.raises(ValueError, match=r"model\.name = 'nowhere\.networks:linear': no module nowhere in"):
        build("nowhere.networks:linear")
    with pytest.raises(ValueError, match=r"should be package\.module:function"):
        build("./networks:linear")
    with pytest.raises(ValueError, match=r"No module named 'no_such_dependency'; see users_broken\.py, line 1"):
        build("users_broken:linear")


NETWORKS = """
import random, threading
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, num_classes, shape):
        super().__init__()
        self.conv = nn.Conv2d(shape[0], 4, 3, padding=1)
        self.head = nn.Linear(4 * shape[1] * shape[2], num_classes)
        self.other = nn.Linear(4 * shape[1] * shape[2], 2 * num_classes)

    def features(self, images):
        return torch.relu(self.conv(images)).flatten(1)

    def forward(self, images):
        return self.head(self.features(images))

class Viewing(Net):
    def features(self, images):
        images = torch.relu(self.conv(images))
        return images.view(images.size(0), -1)

class Squeezing(Net):
    def forward(self, images):
        return super().forward(images).squeeze()

class InPlace(Net):
    def forward(self, images):
        images -= 0.5
        return super().forward(images)

class Pair(Net):
    def forward(self, images):
        features = self.features(images)
        return (self.head(features), self.head(features)) if self.training else self.head(features)

class Dictionary(Net):
    def forward(self, images):
        outputs = super().forward(images)
        return {"out": outputs} if self.training else outputs

class Wide(Net):
    def forward(self, images):
        features = self.features(images)
        return self.other(features) if self.training else self.head(features)

class WithoutGradient(Net):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)

class Complex(Net):
    def forward(self, images):
        outputs = super().forward(images)
        return outputs.to(torch.complex64) if self.training else outputs

class Misspelt(Net):
    def forward(self, images):
        return self.haed(self.features(images))

class FailsInTraining(Net):
    def forward(self, images):
        if self.training:
            raise KeyError("labels")
        return super().forward(images)

class Random(Net):
    def forward(self, images):
        return super().forward(images) * (1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(()))

class Locked(Viewing):
    def __init__(self, num_classes, shape):
        super().__init__(num_classes, shape)
        self.lock = threading.Lock()

def spread(num_classes, shape):
    return nn.DataParallel(Net(num_classes, shape))

def compiled(num_classes, shape):
    return torch.compile(Net(num_classes, shape))
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "tried_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "tried_networks"
    sys.modules.pop("tried_networks", None)


@pytest.mark.parametrize("name", ["Viewing", "Locked"])
def test_a_network_that_flattens_by_view_is_trained_in_the_default_layout_with_the_weights_of_flatten(networks, name):
    ends = []
    for network, channels_last in ((name, True), (name, False), ("Net", False)):
        model = build(f"{networks}:{network}", num_classes=3, image_shape=DIGITS)
        assert needs_default_layout(model) == (network == name)
        recipe = MinimizeConfig(epochs=2, batch_size=8, channels_last=channels_last)
        minimize(place(model, torch.device("cpu"), channels_last=channels_last), examples(), recipe, seed=1)
        assert evaluate(model, examples(), recipe).num_examples == 30
        ends.append(weights(model))
    for end in ends[1:]:
        assert all(torch.equal(ends[0][key], end[key]) for key in end)


def test_a_network_that_changes_its_images_in_place_is_given_copies(networks):
    model = build(f"{networks}:InPlace", image_shape=DIGITS)
    images = torch.rand(3, 1, 8, 8)
    before = images.clone()
    model(images)
    assert torch.equal(images, before)
    assert not needs_default_layout(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Squeezing", r"gave float32 \[10\] for one image; .* flatten\(1\) does not"),
        ("Pair", "gave a tuple in train mode; it should give outputs .*: leave its auxiliary heads out"),
        ("Dictionary", "gave a dict in train mode"),
        ("Wide", r"gave float32 \[2, 20\] for two images in train mode; it should give float outputs \[2, 10\]"),
        ("Complex", r"gave complex64 \[2, 10\] for two images in train mode"),
        ("WithoutGradient", r"outputs in train mode that have no gradient: leave no_grad\(\)"),
        ("Misspelt", r"cannot take images of shape .*AttributeError: 'Misspelt' object has no attribute 'haed'"),
        ("FailsInTraining", "cannot take a step of training on two images: KeyError: 'labels'"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_where_it_is_built(networks, name, message):
    with pytest.raises(ValueError, match=message):
        build(f"{networks}:{name}", image_shape=DIGITS)


def test_trying_a_network_leaves_its_weights_and_all_generators_alone(networks):
    states = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy(), torch.random.get_rng_state()  # noqa: NPY002
    model = build(f"{networks}:Random", image_shape=DIGITS, seed=5)
    assert random.getstate() == states[0]
    assert (np.random.get_state(legacy=False)["state"]["key"] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[2])
    untried = build(f"{networks}:Net", image_shape=DIGITS, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untried.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["spread", "compiled"])
def test_torchs_wrappers_around_a_network_are_taken_off(networks, name):
    assert type(build(f"{networks}:{name}", image_shape=DIGITS)).__name__ == "Net"


def test_dropout_is_seen_where_it_is_active():
    assert not has_dropout(build())
    assert not has_dropout(nn.Sequential(nn.Dropout(0.0)))
    assert not has_dropout(nn.TransformerEncoderLayer(8, 2, dropout=0.0))
    assert has_dropout(nn.Sequential(nn.Sequential(nn.Dropout2d(0.1))))
    assert has_dropout(nn.MultiheadAttention(8, 2, dropout=0.1))
    assert has_dropout(build("squeezenet1_1"))
    from torchvision.ops import StochasticDepth

    assert has_dropout(nn.Sequential(StochasticDepth(0.1, "row")))
    assert not has_dropout(nn.Sequential(StochasticDepth(0.0, "row")))


def test_batch_norm_without_running_statistics_needs_no_recomputing():
    assert has_batch_norm(nn.Sequential(nn.BatchNorm1d(3)))
    assert not has_batch_norm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.GroupNorm(1, 3)))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_a_closure_as_a_hook_would_not_work_in_a_copy(register: str):
    network, seen = nn.Sequential(nn.Linear(2, 2)), list[nn.Module]()
    getattr(network[0], register)(print)
    assert lost_in_copies(network) is None
    getattr(network[0], register)(lambda module, *_: seen.append(module))
    assert lost_in_copies(network) == "a hook of 0 that is a closure"
