"""Optimizers as users write them: one that works, and one for each mistake that is told."""

import torch


def two_rates(parameters, recipe):
    """Adam, with a tenth of the rate for what has one dimension."""
    small = [p for p in parameters if p.ndim < 2]
    large = [p for p in parameters if p.ndim > 1]
    return torch.optim.Adam([{"params": large, "lr": 0.02}, {"params": small, "lr": 0.002}])


def adam(parameters, recipe):
    return torch.optim.Adam(parameters, lr=0.02, weight_decay=recipe.weight_decay)


def nothing(parameters, recipe):
    return None


def drops(parameters, recipe):
    return torch.optim.SGD(parameters[1:], lr=0.1)


def adds(parameters, recipe):
    return torch.optim.SGD([*parameters, torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def rateless(parameters, recipe):
    return torch.optim.SGD(parameters, lr=0.0)


def needs_closure(parameters, recipe):
    return torch.optim.LBFGS(parameters)


def raises(parameters, recipe):
    return torch.optim.SGD(parameters, lr=recipe.peak_learning_rat)


class Forgetful(torch.optim.SGD):
    """Keeps its momenta where no state dict sees them."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.momenta = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p, momentum in zip(group["params"], self.momenta, strict=True):
                p.sub_(momentum.mul_(0.9).add_(p.grad), alpha=group["lr"])


def forgetful(parameters, recipe):
    return Forgetful(parameters)


class Strange(torch.optim.SGD):
    def state_dict(self):
        return {**super().state_dict(), "strange": object}


def strange(parameters, recipe):
    return Strange(parameters, lr=0.1)


class Impatient(torch.optim.SGD):
    """Raises in its tenth step, which no trial makes."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.steps_left = 9

    def step(self, closure=None):
        if not self.steps_left:
            raise KeyError("momentum")
        self.steps_left -= 1
        return super().step(closure)


def impatient(parameters, recipe):
    return Impatient(parameters)
