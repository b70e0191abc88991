"""An objective of your own: mixup (arXiv:1710.09412), which trains on mixed examples and on both of their targets.

Command:    cd jobs/own_code && raysubset run --minimize.objective own_objective:mixup
"""

import torch


def mixup(model, inputs, targets, task, generator):
    """(loss summed over the examples, outputs); what the generator draws, a resumed run draws again."""
    share = torch.rand((), generator=generator, device=inputs.device)
    order = torch.randperm(len(inputs), generator=generator, device=inputs.device)
    outputs = model(inputs.lerp(inputs[order], share))
    return torch.lerp(task.loss(outputs, targets), task.loss(outputs, targets[order]), share), outputs
