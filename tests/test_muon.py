"""Muon against singular value decompositions, torch's own, and torch's SGD."""

import math

import pytest
import torch
from torch import Tensor, nn

from raysubset.aggregation import mean_optimizer_state
from raysubset.config import Config, MinimizeConfig
from raysubset.training import minimize
from raysubset.training.muon import Muon, polar
from raysubset.training.optimizers import make_optimizer
from tests.tiny import cnn, examples, weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5), (3, 7, 4), (64, 27)])
def test_newton_schulz_comes_as_near_to_the_polar_factor_as_its_coefficients_let_it(shape):
    matrices = random(*shape).double()
    u, values, vt = torch.linalg.svd(matrices, full_matrices=False)
    assert values.min() > 0.01 * values.max()
    found = torch.linalg.svdvals(polar(matrices))
    assert found.min() > 0.65
    assert found.max() < 1.21  # of the iterations: none is at 1 exactly
    along = (u.mT @ polar(matrices) @ vt.mT).abs()  # in the matrix's own singular vectors: diagonal, so no rotation
    torch.testing.assert_close(along, torch.diag_embed(along.diagonal(dim1=-2, dim2=-1)), atol=1e-6, rtol=0)


def test_a_matrix_moves_as_by_torchs_muon():
    ours, theirs = (nn.Parameter(random(24, 10)) for _ in range(2))
    optimizer = Muon([{"params": [ours]}], lr=0.1, momentum=0.9)
    by_torch = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=True)
    for step in range(5):
        gradient = random(24, 10, seed=step + 1)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        before = theirs.detach().clone()
        optimizer.step()
        by_torch.step()
        assert torch.equal(ours.grad, gradient)
        length = 0.1 * math.sqrt(24 / 10) * math.sqrt(10)
        assert (ours.detach() - theirs.detach()).norm() < 0.03 * (step + 1) * length  # torch iterates in bfloat16
        assert (theirs.detach() - before).norm().item() == pytest.approx(length, rel=0.2)


def test_a_kernel_is_a_matrix_with_a_row_an_output_in_whichever_memory_layout():
    kernel = random(6, 3, 2, 2)
    moved = []
    for p in (kernel.clone(), kernel.flatten(1), kernel.to(memory_format=torch.channels_last)):
        parameter = nn.Parameter(p)
        parameter.grad = torch.empty_like(p).copy_(random(6, 3, 2, 2, seed=1).view(p.shape))
        Muon([{"params": [parameter]}], lr=0.1, momentum=0.9).step()
        moved.append(parameter.detach().reshape(6, 12))
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.norm = nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3)


def test_biases_and_norms_take_nesterov_steps_at_twice_the_rate_and_embeddings_are_matrices():
    torch.manual_seed(0)
    model, plain = Words(), Words()
    plain.load_state_dict(model.state_dict())
    recipe = MinimizeConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.1)
    optimizer = make_optimizer(model, recipe)
    by_torch = torch.optim.SGD(
        [plain.layer.bias, plain.norm.weight, plain.norm.bias], lr=0.2, momentum=0.9, nesterov=True
    )
    matrices = [plain.words.weight, plain.layer.weight]
    muon = Muon([{"params": matrices, "weight_decay": 0.1}], lr=0.1, momentum=0.9)
    for step in range(3):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.grad = random(*p.shape, seed=step)
            q.grad = p.grad.clone()
        optimizer.step()
        by_torch.step()
        muon.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)


def test_what_has_no_gradient_stays_and_its_momentum_with_it():
    parameter = nn.Parameter(random(3, 4))
    optimizer = Muon([{"params": [parameter]}], lr=0.1, momentum=0.9)
    before = parameter.detach().clone()
    optimizer.step()
    assert torch.equal(parameter, before)
    assert not optimizer.state


def test_members_states_have_a_mean_to_begin_a_round_with():
    recipe = MinimizeConfig(optimizer="muon", epochs=1, batch_size=8)
    states = [minimize(cnn(seed=1), examples(seed=i), recipe, seed=i).optimizer for i in range(2)]
    mean = mean_optimizer_state(states)
    for i, held in mean["state"].items():
        both = [state["state"][i]["momentum_buffer"] for state in states]
        torch.testing.assert_close(held["momentum_buffer"], (both[0] + both[1]) / 2)
    model = cnn(seed=1)
    before = weights(model)
    minimize(model, examples(), recipe, seed=3, optimizer_state=mean)
    assert not torch.equal(weights(model)["head.weight"], before["head.weight"])


def test_extrapolation_is_refused_beside_it():
    with pytest.raises(ValueError, match=r"not for minimize\.optimizer=muon: leave it out"):
        Config().with_overrides({"minimize.optimizer": "muon", "minimize.extrapolation.kind": "past_local"})
