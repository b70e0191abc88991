"""What is found of a user's network and of batch sizes before a run: by hand what it should be."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysubset.config import Config, MinimizeConfig
from raysubset.data import even_sizes, load_full_set
from raysubset.models import build_model, copied
from raysubset.planning import Plan, make_plan
from raysubset.tasks import Spec
from raysubset.training import are_probabilities, try_training
from tests.tiny import examples, weights

NETWORKS = """
import threading
import torch
from torch import nn
from torch.nn import functional as F

def plain(num_classes, shape):
    num = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(num, 8), nn.ReLU(), nn.Linear(8, num_classes))

def viewing(num_classes, shape):
    return nn.Sequential(nn.Conv2d(shape[0], 2, 3, padding=1), Viewing(), nn.Linear(2 * shape[1] ** 2, num_classes))

class Viewing(nn.Module):
    def forward(self, images):
        return images.view(images.size(0), -1)

def softmax(num_classes, shape):
    return nn.Sequential(plain(num_classes, shape), nn.Softmax(1))

def log_softmax(num_classes, shape):
    return nn.Sequential(plain(num_classes, shape), nn.LogSoftmax(1))

def sigmoid(num_classes, shape):
    return nn.Sequential(plain(num_classes, shape), nn.Sigmoid())

def zero_head(num_classes, shape):
    model = plain(num_classes, shape)
    nn.init.zeros_(model[3].weight)
    nn.init.constant_(model[3].bias, 0.5)
    return model

def batch_norm(num_classes, shape):
    num = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(num, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))

class Layers(nn.Module):
    def __init__(self, num_classes, shape):
        super().__init__()
        self.first = nn.Linear(shape[0] * shape[1] * shape[2], 8)
        self.dropped = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)
        self.lock = threading.Lock()
    def forward(self, images):
        features = torch.relu(self.first(images.flatten(1)))
        if self.training and torch.rand(()) < 0.5:
            features = features + self.dropped(features)
        return self.head(features)

class Noisy(nn.Module):
    def __init__(self, num_classes, shape, always=True):
        super().__init__()
        self.head, self.always = plain(num_classes, shape), always
    def forward(self, images):
        noise = torch.randn_like(images) if self.training or self.always else 0
        return self.head(images + noise)

def noisy_in_training(num_classes, shape):
    return Noisy(num_classes, shape, False)

class Adapted(nn.Linear):
    def __init__(self, of):
        super().__init__(of.in_features, of.out_features)
        self.weight, self.bias = of.weight.requires_grad_(False), of.bias.requires_grad_(False)
        self.low, self.high = nn.Parameter(torch.ones(2, of.in_features)), nn.Parameter(torch.zeros(of.out_features, 2))
    def forward(self, inputs):
        return super().forward(inputs) + inputs @ self.low.T @ self.high.T

class Attending(nn.Module):
    def __init__(self, num_classes, adapted):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.layer.linear1 = adapted(self.layer.linear1)
        self.head = nn.Linear(8, num_classes)
    def forward(self, images):
        return self.head(self.layer(images[:, 0]).mean(1))

def attending(num_classes, shape):
    return Attending(num_classes, Adapted)

def attending_unchanged(num_classes, shape):
    return Attending(num_classes, lambda layer: layer)

class HalfOnly(nn.Module):
    def __init__(self, num_classes, shape):
        super().__init__()
        self.head = plain(num_classes, shape)
    def forward(self, images):
        outputs = self.head(images)
        if self.training and outputs.dtype == torch.bfloat16:
            raise RuntimeError("svd is not implemented for bfloat16")
        return outputs
"""


@pytest.fixture(autouse=True)
def _networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sound_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("sound_networks", None)


def plan(name: str, **overrides: Any) -> Plan:
    model = name if ":" in name or name in ("cnn", "mlp", "resnet18") else f"sound_networks:{name}"
    config = Config().with_overrides({"model.name": model} | {k.replace("__", "."): v for k, v in overrides.items()})
    return make_plan(config, load_full_set(*config.learned))


def lines(name: str, **overrides: Any) -> list[str]:
    return [str(note) for note in plan(name, **overrides).advice if "sound_networks" in note.text]


def test_nothing_is_said_of_a_plain_network():
    assert lines("plain") == []
    assert lines("zero_head") == []  # outputs in [0, 1], but by its weights
    assert lines("plain", minimize__optimizer="lbfgs") == []


def test_outputs_that_are_no_logits_are_warned_of_where_the_loss_wants_logits():
    for name in ("softmax", "sigmoid"):
        (line,) = lines(name)
        assert line.startswith(f"warning: sound_networks:{name} ends in a {name}, and cross-entropy takes a softmax")
        assert lines(name, task__loss="squared_error") == []
    assert lines("log_softmax") == []  # whose softmax is that of the logits
    (line,) = lines("log_softmax", task__loss="squared_error")
    assert line.startswith("warning: sound_networks:log_softmax ends in a log_softmax")


def test_the_layout_is_said_where_it_is_another_one_than_asked_for():
    (line,) = lines("viewing")
    assert "cannot be trained in the channels-last layout" in line
    assert lines("viewing", minimize__channels_last=False) == []


def test_a_network_that_draws_where_it_is_measured_is_warned_of():
    state = torch.get_rng_state()
    (line,) = lines("Noisy")
    assert line.startswith("warning: sound_networks:Noisy gives other outputs for the same input in evaluation mode")
    assert lines("noisy_in_training") == []
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_that_evaluation_would_pass_by_are_told():
    """As torch's fast path of attention does, which reads the weights of layers itself; they begin without effect."""
    (line,) = lines("attending")
    assert line.startswith("warning: sound_networks:attending is measured without a part of it: in evaluation torch's")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert not lines("attending")
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert not lines("attending_unchanged")


def test_parameters_that_steps_leave_out_are_named():
    (line,) = lines("Layers")
    assert line.endswith("which do not move them: dropped.weight, dropped.bias, never.weight and 1 more")


def test_a_step_that_fails_in_the_configured_precision_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError,
        match=r"HalfOnly cannot take a step .*for bfloat16; see sound_networks.py.*; set --minimize\.precision",
    ):
        plan("HalfOnly", minimize__precision="bfloat16")
    assert lines("HalfOnly") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"minimize__batch_size": 1},
            r"batch_norm cannot be trained on one example alone, .* subsets would: it has \d+ .* batches of at most 1",
        ),
        ({"subsets__size": 1}, "subsets would: it has 1 example"),
        (
            {"minimize__batch_size": 4, "fine_tuning__num_workers": 3},
            r"batches of 3 examples cannot be shared by the 3 workers of fine_tuning, as batch normalisation needs 2 "
            r"examples in each: set --fine-tuning\.num-workers to 1 at most, or --minimize\.batch-size to 6",
        ),
        (
            {"method": "conventional", "conventional__num_workers": 40},
            r"the 40 workers of conventional, .* to 30 at most",
        ),
    ],
)
def test_batches_too_small_for_batch_normalisation_are_refused_with_the_way_out(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan("batch_norm", **overrides)


def test_batches_too_small_for_the_workers_are_refused_and_for_one_fit_whatever_has_no_batch_normalisation():
    assert plan("plain", minimize__batch_size=1).most_workers == 1
    assert plan("cnn", minimize__batch_size=1).most_workers == 1  # its maps have more than one value a channel
    with pytest.raises(ValueError, match="batches of 1 examples cannot be shared by the 2 workers of trunk: set"):
        plan("plain", minimize__batch_size=1, trunk__num_workers=2, trunk__epochs=1.0)
    smallest = even_sizes(num := len(load_full_set(Config().data).train), math.ceil(num / 64))[-1]
    assert (plan("plain").most_workers, plan("batch_norm").most_workers) == (smallest, smallest // 2)
    with pytest.raises(ValueError, match="lbfgs works in one process: set --fine-tuning"):
        plan("mlp", minimize__optimizer="lbfgs", fine_tuning__num_workers=2)
    assert plan("mlp", minimize__optimizer="lbfgs").most_workers == 1


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [
        ({"minimize.batch_size": 322}, False),
        ({"minimize.batch_size": 323}, True),  # four subsets of digits have 323 examples each
        ({"subsets.size": 64, "rounds.num": 2}, True),  # batches have 64 by default
        ({"subsets.size": 64, "minimize.epochs": 50.0, "rounds.num": 2}, False),  # full-batch training on purpose
        ({"minimize.batch_size": 323, "minimize.optimizer": "lbfgs"}, False),  # has chunks, not batches
        ({"minimize.batch_size": 323, "method": "conventional"}, False),
    ],
    ids=str,
)
def test_a_batch_that_holds_a_whole_subset_is_warned_of(overrides: dict[str, Any], is_warned: bool):
    config = Config().with_overrides(overrides)
    warnings = [note.text for note in make_plan(config, load_full_set(*config.learned)).advice if note.is_warning]
    assert any("of a subset, so that each epoch on it is one step" in text for text in warnings) is is_warned


def test_parts_of_one_example_are_refused_where_batch_normalisation_would_see_them():
    assert plan("plain", minimize__accumulation=64).most_workers > 1
    with pytest.raises(ValueError, match=r"parts of one example in batches of 53 by 1 worker.*: give 26 at most"):
        plan("batch_norm", minimize__accumulation=32)
    assert plan("batch_norm", minimize__accumulation=8).most_workers == 3


def test_trying_leaves_model_and_generators_alone():
    model = build_model(Config().model, Spec((1, 8, 8), (3,)), seed=0)
    before, states = weights(model), (torch.random.get_rng_state(), np.array(np.random.get_state()[1]))  # noqa: NPY002  # pyright: ignore[reportArgumentType]
    try_training(model, MinimizeConfig(), examples())
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (np.array(np.random.get_state()[1]) == states[1]).all()  # noqa: NPY002  # pyright: ignore[reportArgumentType]
    assert all(p.grad is None for p in model.parameters())


def test_a_network_that_holds_what_cannot_be_copied_is_copied_without_it():
    import sound_networks  # pyright: ignore[reportMissingImports]

    model = sound_networks.Layers(3, (1, 8, 8))
    other = copied(model)
    assert other.lock is model.lock
    weight, other_weight = (network.get_parameter("head.weight") for network in (model, other))
    assert other_weight is not weight
    assert torch.equal(other_weight, weight)


def test_probabilities_are_told_from_logits():
    logits = torch.randn(4, 3)
    assert are_probabilities(logits.softmax(1))
    assert not are_probabilities(logits)
    assert not are_probabilities(logits.log_softmax(1))
    assert not are_probabilities(logits.sigmoid())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"aggregation.method": "regmean", "model.name": "lstm"}, "regmean goes by .* layers, and lstm has none: set"),
        (
            {"aggregation.method": "fisher", "model.name": "lstm"},
            "fisher cannot be used with lstm: torch cannot take recurrent",
        ),
        (
            {"aggregation.method": "aligned_soup"},
            r"cannot be aligned: its inputs are tokens.*use subsets\.start=shared",
        ),
        ({"minimize.optimizer": "gauss_newton", "model.name": "lstm"}, "differentiate this network: use lbfgs or cg"),
    ],
)
def test_methods_that_networks_over_tokens_do_not_have_are_refused_before_a_run(overrides, message):
    config = Config().with_overrides({
        "data.name": "python_docs", "data.window": 16, "task.name": "next_token", "model.width": 4, "subsets.size": 64,
        "fine_tuning.epochs": 0.0, **overrides,
    })  # fmt: skip
    with pytest.raises(ValueError, match=message):
        make_plan(config, load_full_set(*config.learned))


def test_attention_has_a_fisher_and_curvature():
    config = Config().with_overrides({
        "data.name": "python_docs", "data.window": 16, "task.name": "next_token", "model.width": 4, "subsets.size": 64,
        "minimize.optimizer": "gauss_newton", "aggregation.method": "fisher", "fine_tuning.epochs": 0.0,
    })  # fmt: skip
    assert make_plan(config, load_full_set(*config.learned)).statistics == ("fisher",)
