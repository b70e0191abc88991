"""Networks over tokens and masks, VGGs: parameters by formula, what an output may depend on, and a step of training."""

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysubset.aggregation.alignment import trace_units
from raysubset.config import ModelConfig
from raysubset.models import build_model, has_batch_norm, num_parameters
from raysubset.tasks import Spec
from raysubset.trained_model.network_graph import GraphNetwork, export, trace
from raysubset.training.grouped import forward_of_all

NEXT, WHOLE, TAGS = (Spec((7,), outputs, num_values=11) for outputs in ((7, 11), (3,), (7, 4)))
IMAGE, MASK = Spec((3, 13, 18), (5,)), Spec((3, 13, 18), (4, 13, 18))
CASES = [
    ("mlp", Spec((5,), (2,))),
    ("vgg", IMAGE),
    ("unet", MASK),
    *((name, spec) for name in ("lstm", "transformer") for spec in (NEXT, WHOLE, TAGS)),
]


def build(name: str, spec: Spec, *, width: int = 8, depth: int = 2, seed: int = 0, **knobs) -> nn.Module:
    return build_model(ModelConfig(name=name, width=width, depth=depth, **knobs), spec, seed=seed)


def inputs(spec: Spec, num: int = 4, seed: int = 1) -> Tensor:
    return spec.random(num, torch.Generator().manual_seed(seed))


def lstm(v: int, w: int, d: int) -> int:
    return v * w + d * (4 * w * 2 * w + 8 * w)  # four gates, from below and from before, torch's two biases each


def transformer(v: int, t: int, w: int, d: int) -> int:
    # attention 4w² and a bias of its projection, the perceptron 8w² and two, two norms; then positions and a norm
    return v * w + t * w + d * (12 * w**2 + 10 * w) + 2 * w


def convolutions(before: int, after: int) -> int:
    return 9 * (before * after + after**2) + 2 * 2 * after  # without bias, each with a norm


@pytest.mark.parametrize(
    ("name", "spec", "expected"),
    [
        ("lstm", NEXT, lstm(11, 8, 2) + 11),  # a tied head has a bias alone
        ("lstm", WHOLE, lstm(11, 8, 2) + 9 * 3),
        ("lstm", TAGS, lstm(11, 8, 2) + 9 * 4),
        ("transformer", NEXT, transformer(11, 7, 8, 2) + 11),
        ("transformer", WHOLE, transformer(11, 7, 8, 2) + 9 * 3),
        ("transformer", TAGS, transformer(11, 7, 8, 2) + 9 * 4),
        # 13×18 is pooled to 6×9 and 3×4
        ("vgg", IMAGE, convolutions(3, 8) + convolutions(8, 16) + (16 * 3 * 4 + 1) * 32 + 33 * 5),
        (
            "unet",
            MASK,
            convolutions(3, 8) + convolutions(8, 16) + convolutions(16, 32)
            + convolutions(48, 16) + convolutions(24, 8) + 9 * 4,
        ),
    ],
)  # fmt: skip
def test_parameters_are_as_many_as_the_formula_says(name, spec, expected):
    assert num_parameters(build(name, spec)) == expected


CIFAR = Spec((3, 32, 32), (10,))
# as others count them: VGGs with 2,752 and 4,224 biases of convolutions, which batch normalisation makes idle
CUT_DOWN = {"alexnet_32": 2_472_266, "vgg11_32": 9_231_114 - 2_752, "vgg16_32": 14_728_266 - 4_224,
            "resnet18_32": 11_173_962}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), CUT_DOWN.items())
def test_imagenets_networks_are_cut_down_to_cifar(name, expected):
    model = build_model(ModelConfig(name=name), CIFAR, seed=0)
    assert num_parameters(model) == expected
    outputs = model(inputs(CIFAR, num=2))
    assert outputs.shape == (2, 10)
    outputs.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    with pytest.raises(ValueError, match=rf"{name} takes images of 32×32, not 28×28: set data.image_size=32"):
        build_model(ModelConfig(name=name), Spec((1, 28, 28), (10,)), seed=0)


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_a_seed_decides_the_bits_every_parameter_has_a_gradient_and_a_step_lowers_the_loss(name, spec):
    model, same = build(name, spec, seed=3), build(name, spec, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    others = zip(model.parameters(), build(name, spec).parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in others if a.ndim > 1)
    batch, classes_dim = inputs(spec), len(spec.outputs) if spec.num_values is not None else 1
    classes = spec.outputs[classes_dim - 1]
    targets = torch.arange(4 * spec.num_outputs // classes) % classes

    def loss() -> Tensor:
        outputs = model(batch)
        assert outputs.shape == (4, *spec.outputs)
        return F.cross_entropy(outputs.movedim(classes_dim, -1).flatten(0, -2), targets)

    before = loss()
    assert abs(before.item() - math.log(classes)) < 1.5  # no output starts far from the others
    before.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert loss() < before


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_outputs_at_a_token_depend_on_it_and_those_before_and_on_none_after(name):
    model, tokens = build(name, NEXT).eval(), inputs(NEXT, num=1)
    expected = model(tokens)
    for changed in range(7):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 11
        outputs = model(other)
        assert torch.equal(outputs[:, :changed], expected[:, :changed])
        assert (outputs[:, changed:] != expected[:, changed:]).any(-1).all()


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_outputs_for_a_whole_text_are_the_last_tokens(name):
    model = build(name, WHOLE).eval()
    by_token = build(name, Spec((7,), (7, 3), num_values=11), seed=9).eval()
    by_token.load_state_dict(model.state_dict())
    tokens = inputs(WHOLE)
    torch.testing.assert_close(by_token(tokens)[:, -1], model(tokens))


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_a_tied_head_reads_the_embeddings_vectors(name):
    model, tokens = build(name, NEXT).eval(), inputs(NEXT)
    features = []
    model.get_submodule("head").register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
    outputs = model(tokens)
    expected = features[0] @ model.get_parameter("embedding.weight").T + model.get_parameter("head.bias")
    torch.testing.assert_close(outputs, expected)


def test_attention_is_torchs_own_with_a_causal_mask():
    block = build("transformer", NEXT, depth=1).get_submodule("blocks.0")
    features = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    ours = nn.MultiheadAttention(8, 4, batch_first=True)
    ours.load_state_dict({
        "in_proj_weight": block.get_parameter("attend.weight"),
        "in_proj_bias": torch.zeros(24),
        "out_proj.weight": block.get_parameter("project.weight"),
        "out_proj.bias": block.get_parameter("project.bias"),
    })  # fmt: skip
    normed, mask = F.layer_norm(features, (8,)), nn.Transformer.generate_square_subsequent_mask(7)
    attended = features + ours(normed, normed, normed, attn_mask=mask, is_causal=True, need_weights=False)[0]
    up, down = block.get_submodule("up"), block.get_submodule("down")
    expected = attended + down(F.gelu(up(F.layer_norm(attended, (8,)))))
    torch.testing.assert_close(block(features), expected)


def test_heads_are_the_most_up_to_four_that_halve_the_width():
    heads = {width: build("transformer", NEXT, width=width).blocks[0].num_heads for width in (1, 6, 9, 12)}
    assert heads == {1: 1, 6: 2, 9: 1, 12: 4}


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (16, 16), (7, 20)])
def test_a_vgg_and_a_unet_take_images_of_any_size(sides, norm):
    for name, outputs in (("vgg", (5,)), ("unet", (2, *sides))):
        spec = Spec((1, *sides), outputs)
        model = build(name, spec, width=4, depth=3, norm=norm)
        assert model(inputs(spec)).shape == (4, *outputs)
        assert has_batch_norm(model) == (norm == "batch")


def test_a_unets_mask_moves_with_its_image():
    spec = Spec((1, 96, 96), (2, 96, 96))
    model, image = build("unet", spec, norm="none").eval(), torch.zeros(1, 1, 96, 96)
    image[..., 40:46, 46:52] = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, moved = model(image), model(image.roll((4, -4), (2, 3)))  # by a pixel of the smallest map
    torch.testing.assert_close(moved[..., 36:60, 36:60], expected[..., 32:56, 40:64])
    assert not torch.allclose(moved[..., 36:60, 36:60], expected[..., 36:60, 36:60])


def test_channels_last_gives_the_same_outputs():
    for name, spec in (("vgg", IMAGE), ("unet", MASK)):
        model, images = build(name, spec).eval(), inputs(spec)
        expected = model(images)
        given = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))  # type: ignore
        torch.testing.assert_close(given, expected)


# torch.export takes seconds
@pytest.mark.parametrize(("name", "spec"), [("unet", MASK), ("transformer", NEXT), ("lstm", NEXT)])
def test_networks_are_exported_for_any_number_of_examples(name, spec):
    model = build(name, spec).eval()
    torch.testing.assert_close(export(model, inputs(spec, num=3)).module()(inputs(spec)), model(inputs(spec)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])  # likewise
def test_recurrent_layers_are_one_call_of_a_graph(kind):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(11, 3), kind(3, 4, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.embedding(tokens))[0]

    network, spec = Network(), Spec((3,), (3, 4), num_values=11)
    graph, constants = trace(network, spec)
    assert sum(kind.__name__.lower() in name for name, *_ in graph["calls"]) == 1
    assert len(graph["calls"]) < 8
    same = GraphNetwork(json.loads(json.dumps(graph)), network.state_dict() | constants, spec)
    torch.testing.assert_close(same(inputs(spec)), network(inputs(spec)))


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_networks_with_stacked_weights_give_what_each_gives_alone(name, spec):
    models = [build(name, spec, seed=seed) for seed in range(3)]
    stacked = {key: torch.stack([model.state_dict()[key] for model in models]) for key in models[0].state_dict()}
    batches = torch.stack([inputs(spec, seed=seed) for seed in range(3)], 1)
    forward = forward_of_all(models[0])
    if name == "lstm":
        with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::lstm"):
            forward(stacked, batches)
        return
    outputs = forward(stacked, batches)
    for k, model in enumerate(models):
        torch.testing.assert_close(outputs[:, k], model(batches[:, k]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "spec"), [case for case in CASES if case[0] != "lstm"])
def test_gradients_of_each_example_sum_to_the_batchs(name, spec):
    model = build(name, spec).eval()
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, values, (example.unsqueeze(0),)).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs(spec))
    model(inputs(spec)).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[key].sum(0), parameter.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_a_network_of_stand_ins_takes_a_states_tensors(name, spec):
    model = build(name, spec, seed=5).eval()
    with torch.device("meta"):
        other = build(name, spec).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(inputs(spec)), model(inputs(spec)))


@pytest.mark.parametrize(("name", "spec", "num"), [("vgg", IMAGE, 5), ("unet", MASK, 10)])
def test_the_units_of_a_vgg_and_a_unet_are_all_aligned(name, spec, num):
    structure = trace_units(build(name, spec), spec)
    assert (len(structure.groups), structure.num_fixed_groups) == (num, 0)


@pytest.mark.parametrize(
    ("name", "spec", "way_out"),
    [
        ("lstm", IMAGE, r"takes tokens \[T\] .*; inputs are floats \[3, 13, 18\] .*: set model.name=cnn"),
        (
            "transformer",
            Spec((7,), (9, 11), num_values=11),
            r"outputs \[9, 11\] an example: write a network",
        ),
        ("vgg", MASK, r"takes images \[C, H, W\] and gives \[M\].*: set model.name=unet"),
        ("unet", Spec((3, 4, 4), (2, 2, 2)), "set model.name=mlp"),
        ("resnet18", NEXT, "resnet18 takes images .* set model.name=transformer"),
    ],
)
def test_inputs_and_outputs_of_another_kind_are_refused_with_the_network_that_fits(name, spec, way_out):
    with pytest.raises(ValueError, match=way_out):
        build_model(ModelConfig(name=name), spec, seed=0)
