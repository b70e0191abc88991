"""Optimizers by name, and learning rates against torch's own schedulers."""

import sys

import numpy as np
import pytest
import torch

from raysubset.config import MinimizeConfig
from raysubset.training.optimizers import learning_rate_at, load_optimizer_state, make_optimizer
from tests.tiny import cnn, same_bits, weights

NUM_STEPS = 50


def rates(**recipe) -> list[float]:
    config = MinimizeConfig(learning_rate=0.3, **recipe)
    return [learning_rate_at(config, step, num_steps=NUM_STEPS) for step in range(NUM_STEPS + 1)]


def torchs_rates(make_scheduler) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make_scheduler(optimizer)
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(NUM_STEPS):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_constant_is_constant():
    assert set(rates(schedule="constant")) == {0.3}


def test_cosine_is_torchs():
    by_torch = torchs_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, NUM_STEPS))
    assert rates(schedule="cosine") == pytest.approx(by_torch, abs=1e-12)


@pytest.mark.parametrize("warm", [0.1, 0.3])
def test_one_cycle_is_torchs(warm):
    def scheduler(optimizer):
        total = NUM_STEPS + 1  # torch's phases end at pct_start * total_steps - 1 and at total_steps - 1
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            0.3,
            total_steps=total,
            pct_start=(warm * NUM_STEPS + 1) / total,
            div_factor=25,
            final_div_factor=(1 / 25) / 1e-4,
            cycle_momentum=False,
        )

    assert rates(schedule="one_cycle", warmup_fraction=warm) == pytest.approx(torchs_rates(scheduler), abs=1e-12)


@pytest.mark.parametrize("warm", [5, 25])
def test_warmup_linear_rises_and_falls_in_straight_lines_and_wastes_no_step(warm):
    rise = 0.3 * np.arange(1, warm + 1) / warm  # to the peak at the last step of the warm-up, and again at the next
    expected = [*rise, *np.linspace(0.3, 0.0, NUM_STEPS - warm + 1)]
    found = rates(schedule="warmup_linear", warmup_fraction=warm / NUM_STEPS)
    assert found == pytest.approx(expected, abs=1e-12)
    assert min(found[:-1]) > 0  # that after the last step is 0


def test_a_warm_up_of_less_than_a_step_is_at_its_peak():
    config = MinimizeConfig(learning_rate=0.3, schedule="warmup_linear", warmup_fraction=0.1)
    assert [learning_rate_at(config, step, num_steps=2) for step in range(2)] == pytest.approx([0.3, 0.3 * 5 / 9])


@pytest.mark.parametrize(("name", "rate"), [("sgd", 0.1), ("muon", 0.1), ("adam", 2e-3), ("adamw", 2e-3)])
def test_every_optimizer_has_a_learning_rate_of_its_own(name, rate):
    optimizer = make_optimizer(cnn(), MinimizeConfig(optimizer=name))
    assert {group["lr"] for group in optimizer.param_groups} == {rate}
    assert type(optimizer).__name__.lower() == name


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_each_trainable_parameter_is_in_one_group_and_only_matrices_and_kernels_decay(name):
    model = cnn()
    frozen = next(model.parameters()).requires_grad_(False)
    groups = make_optimizer(model, MinimizeConfig(optimizer=name, weight_decay=0.1)).param_groups
    grouped = [p for group in groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} - {id(frozen)}
    assert len(grouped) == len({id(p) for p in grouped})
    assert all(group["weight_decay"] == (0.1 if p.ndim > 1 else 0) for group in groups for p in group["params"])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fused_steps_are_those_of_torchs_plain_loops(name):
    config = MinimizeConfig(optimizer=name, weight_decay=0.1)
    fused, plain = cnn(), cnn()
    ours = make_optimizer(fused, config)
    by_torch = make_optimizer(plain, config)
    for group in by_torch.param_groups:
        assert group["fused"]
        group["fused"] = group["foreach"] = False
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            q.grad = p.grad.clone()
        ours.step()
        by_torch.step()
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(fused)[key], value)


@pytest.mark.parametrize("recipe", [{}, {"momentum": 0.0}, {"optimizer": "adam"}, {"optimizer": "adamw"}])
def test_parameters_that_steps_leave_out_move_as_by_torchs_plain_loops_and_not_at_all_before(recipe):
    config = MinimizeConfig(weight_decay=0.1, **recipe)
    model, plain = cnn(), cnn()
    ours = make_optimizer(model, config)
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"]} for g in make_optimizer(plain, config).param_groups
    ]
    options = {"lr": config.peak_learning_rate(), "fused": False, "foreach": False}
    if config.optimizer == "sgd":
        by_torch: torch.optim.Optimizer = torch.optim.SGD(
            groups, momentum=config.momentum, nesterov=config.momentum > 0, **options
        )
    else:
        by_torch = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](groups, **options)
    generator, before = torch.Generator().manual_seed(0), weights(model)
    for step in range(5):
        for i, (p, q) in enumerate(zip(model.parameters(), plain.parameters(), strict=True)):
            p.grad = q.grad = None
            if i and (step + i) % 3:  # the first has none at all
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
                q.grad = p.grad.clone()
        ours.step()
        by_torch.step()
        if step == 2:  # a resume, of a state that lacks what had no gradient
            state = ours.state_dict()
            for group in state["param_groups"]:
                lacking = [i for i in group["params"] if i == 0]
            state["state"] = {i: held for i, held in state["state"].items() if i not in lacking}
            ours = make_optimizer(model, config)
            load_optimizer_state(ours, state)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(model)[key], value)
    first = next(iter(before))
    assert torch.equal(weights(model)[first], before[first])


def test_moments_saved_in_another_memory_layout_are_read_by_element():
    def steps(layout: torch.memory_format, *, relaid: bool) -> torch.Tensor:
        kernel = torch.nn.Parameter(torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=layout))
        optimizer = torch.optim.SGD([kernel], lr=0.1, momentum=0.9, fused=True)
        for _ in range(2):
            kernel.grad = torch.empty_like(kernel).copy_(kernel.detach().square())
            optimizer.step()
            state = optimizer.state_dict()
            if relaid:
                state["state"][0]["momentum_buffer"] = state["state"][0]["momentum_buffer"].contiguous()
            load_optimizer_state(optimizer, state)
        return kernel.detach()

    torch.testing.assert_close(
        steps(torch.channels_last, relaid=True), steps(torch.contiguous_format, relaid=False), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("name", "torchs"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_steps_import_no_compiler_and_go_where_torchs_own_do(
    name: str, torchs: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = MinimizeConfig(optimizer=name, weight_decay=0.0, learning_rate=0.1, momentum=0.0)
    ends = []
    for ours in (True, False):
        with monkeypatch.context() as patch:
            model, hooked = cnn(), []
            if ours:
                patch.delitem(sys.modules, "torch._dynamo", raising=False)
            optimizer = make_optimizer(model, recipe) if ours else torchs(model.parameters(), lr=0.1, fused=True)
            optimizer.register_step_pre_hook(lambda *_, hooked=hooked: hooked.append(1))
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 1, 8, 8)).square().sum().backward()
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
            assert "torch._dynamo" not in sys.modules or not ours
            ends.append((weights(model), hooked))
    assert same_bits(*ends)
