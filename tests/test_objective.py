"""Whole-subset losses and gradients: chunks against one batch, counts by hand, and what is remembered."""

import pytest
import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.tasks import CrossEntropy
from raysubset.training.whole_subset.conjugate_gradient import ConjugateGradient
from raysubset.training.whole_subset.objective import Objective, dot
from tests.tiny import SQUARED_ERROR, cnn, examples, weights

RECIPE = MinimizeConfig(optimizer="cg", batch_size=1)  # chunks of 16


@pytest.mark.parametrize("minimized", [CrossEntropy(), SQUARED_ERROR])
def test_chunks_add_up_to_the_loss_and_gradient_of_one_batch(minimized):
    data, model = examples(50, objective=minimized), cnn("batch").double().eval()
    images, labels = data.batch(torch.arange(50), dtype=torch.float64)
    if minimized == CrossEntropy():
        loss = nn.functional.cross_entropy(model(images), labels)
    else:
        loss = (model(images) - nn.functional.one_hot(labels, 3)).square().mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    objective = Objective(model, data, RECIPE)
    found = objective.evaluate()
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(found.gradient, gradient)
    assert objective.loss() == pytest.approx(loss.item(), rel=1e-12)


def test_no_more_than_a_chunk_is_passed_at_a_time():
    data, model, sizes = examples(50), cnn("none").eval(), []
    model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    objective = Objective(model, data, RECIPE)
    objective.evaluate()
    objective.loss()
    objective.gauss_newton_product(objective.weights())
    assert sizes == 3 * [16, 16, 16, 2]


def test_a_loss_is_a_third_of_a_pass_a_gradient_one_a_product_four_thirds():
    data = examples(50)
    objective = Objective(cnn("none").eval(), data, RECIPE)
    objective.loss()
    assert (objective.num_forward, objective.num_backward, objective.num_gradients, objective.thirds) == (50, 0, 0, 1)
    objective.evaluate()
    assert (objective.num_forward, objective.num_backward, objective.num_gradients, objective.thirds) == (100, 50, 1, 4)
    objective.gauss_newton_product(objective.weights())
    assert (objective.num_forward, objective.num_backward, objective.num_gradients, objective.thirds) == (
        200,
        100,
        1,
        8,
    )


def test_the_same_weights_cost_nothing_again_and_others_do():
    model = cnn("none").eval()
    objective = Objective(model, examples(), RECIPE)
    origin, first = objective.weights(), objective.evaluate()
    assert objective.evaluate() is first
    objective.move_to(2 * origin)
    assert objective.evaluate() is not first
    objective.move_to(origin)
    assert torch.equal(objective.evaluate().gradient, first.gradient)
    assert objective.num_gradients == 3
    objective.recall(7.0, torch.arange(len(origin)).float())
    assert objective.evaluate().loss == 7
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), torch.arange(len(origin)))
    assert objective.num_gradients == 3


def test_what_an_earlier_process_found_is_taken_up_on_this_device():
    model = cnn("none").eval()
    found = Objective(model, examples(), RECIPE).evaluate()
    objective = Objective(model.to("meta"), examples().to("meta"), RECIPE)
    assert objective.recall(found.loss, found.gradient).gradient.device.type == "meta"
    stepper = ConjugateGradient(objective)
    stepper.load_state_dict({"previous": {"loss": 1.0, "gradient": found.gradient, "direction": -found.gradient}})
    previous = stepper.state_dict()["previous"]
    assert [previous[name].device.type for name in ("gradient", "direction")] == ["meta", "meta"]
    assert previous["loss"] == 1


def test_only_trainable_parameters_are_moved():
    model = cnn("batch").eval()
    frozen = next(model.parameters()).requires_grad_(False)
    before = weights(model)
    objective = Objective(model, examples(), RECIPE)
    objective.move_to(torch.zeros_like(objective.weights()))
    assert torch.equal(frozen, before["block0.conv.weight"])
    assert torch.equal(model.state_dict()["block0.norm.running_var"], before["block0.norm.running_var"])
    assert all(not p.any() for p in model.parameters() if p.requires_grad)


class Unused(nn.Module):
    """A network with a parameter that its outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.used.expand(len(images), 3)


def test_a_parameter_that_is_not_used_has_no_gradient_and_no_curvature():
    objective = Objective(Unused(), examples(), RECIPE)
    assert torch.equal(objective.evaluate().gradient[3:], torch.zeros(2))
    product = objective.gauss_newton_product(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    torch.testing.assert_close(product, torch.tensor([-1 / 3, 0, 1 / 3, 0, 0]))  # softmax 1/3: (u − 2) / 3


def test_scalar_products_are_summed_in_float64():
    big = torch.tensor([1e8, 1.0, -1e8])
    assert dot(big, torch.ones(3)) == 1
