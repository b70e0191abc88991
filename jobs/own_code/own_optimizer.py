"""An optimizer of your own: steps by the signs of the momentum (Lion, arXiv:2302.06675), which keep their state.

Command:    cd jobs/own_code && raysubset run --minimize.optimizer own_optimizer:lion
"""

import torch


def lion(parameters, recipe):
    return Lion(parameters, {"lr": 0.01, "weight_decay": recipe.weight_decay})


class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))  # checkpoints hold self.state
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(momentum.lerp(p.grad, 0.1).sign(), alpha=group["lr"])
                momentum.lerp_(p.grad, 0.01)
