"""minimize.precision=float16: the loss is scaled as torch.amp.GradScaler does, and a resumed run keeps the scale."""

import math

import pytest
import torch
import torch.nn.functional as F

from raysubset.config import ExtrapolationConfig, MinimizeConfig, derive_seed
from raysubset.training import Progress, minimize, why_not_packed
from tests.tiny import cnn, examples, resume_at_the_bits, same_bits, through_a_file, weights

RECIPE = MinimizeConfig(
    precision="float16", objective="tests.own_objectives:loud", epochs=2, batch_size=10, clip_norm=1.0, momentum=0.0
)


def by_hand() -> tuple[dict[str, torch.Tensor], list[float]]:
    """What RECIPE says, written with torch alone; the scale after each step."""
    model, own, scales = cnn("none"), examples(), []
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": RECIPE.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer, scaler, step = torch.optim.SGD(groups, lr=0.1, fused=True), torch.amp.GradScaler("cpu"), 0
    for epoch in range(2):
        order = own.order(derive_seed(1, "order", epoch))
        for indices in order.split(10):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 + math.cos(math.pi * step / 6)) / 2
            inputs, targets = own.batch(indices)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = model(inputs)
            scaler.scale(100 * F.cross_entropy(outputs.float(), targets)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            step += 1
    return weights(model), scales


def test_steps_are_those_of_autocast_and_a_grad_scaler_also_where_gradients_overflow():
    model, seen = cnn("none"), []

    def keep(progress: Progress) -> None:
        seen.append(progress.capture()["scaler"]["scale"])

    result = minimize(model, examples(), RECIPE, seed=1, on_step=keep)
    expected, scales = by_hand()
    assert seen == scales
    assert (scales[0] < 65536, scales[-1] == scales[-2]) == (True, True)  # some steps are left out, and others not
    assert result.outcome == "epochs"
    for name, value in weights(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_run_that_resumes_has_the_same_scale_and_bits(optimizer, step):
    recipe = MinimizeConfig(
        precision="float16", objective="tests.own_objectives:loud", epochs=2, batch_size=10, optimizer=optimizer
    )
    _, state = resume_at_the_bits(cnn, recipe, step)
    assert state["scaler"]["scale"] < 65536


def test_a_checkpoint_of_before_has_no_scale_and_float32_needs_none():
    recipe, states = MinimizeConfig(epochs=2, batch_size=10), []
    unbroken = cnn()
    minimize(unbroken, examples(), recipe, seed=5, on_step=lambda own: states.append(through_a_file(own.capture())))
    assert states[1].pop("scaler") == {}
    resumed = cnn(seed=9)
    minimize(resumed, examples(), recipe, seed=5, state=states[1])
    assert same_bits(weights(resumed), weights(unbroken))


def test_what_cannot_have_it_says_so():
    assert "scales the loss of one network" in str(why_not_packed(cnn(), MinimizeConfig(precision="float16")))
    with pytest.raises(ValueError, match="lbfgs needs a more precise loss than float16"):
        MinimizeConfig(precision="float16", optimizer="lbfgs")
    with pytest.raises(ValueError, match="uses gradients of other steps, which float16 scales differently"):
        MinimizeConfig(precision="float16", extrapolation=ExtrapolationConfig(kind="past_local"))
    with pytest.raises(ValueError, match=r"minimize.precision=float16 needs float32 parameters; these are float64"):
        minimize(cnn().double(), examples(), MinimizeConfig(precision="float16"), seed=0)
