"""Objectives as users write them: some that work, and one for each mistake that is told."""

import torch


def plain(model, inputs, targets, task, generator):
    outputs = model(inputs)
    return task.loss(outputs, targets), outputs


def loud(model, inputs, targets, task, generator):
    """A loss whose gradients overflow half precision, as it is scaled at first."""
    outputs = model(inputs)
    return 100 * task.loss(outputs, targets), outputs


def below_zero(model, inputs, targets, task, generator):
    """A loss with the gradients of plain()'s, as a likelihood's may be."""
    loss, outputs = plain(model, inputs, targets, task, generator)
    return loss - 5 * len(inputs), outputs


def by_parts(model, inputs, targets, task, generator):
    """As plain(), layer by layer: what wraps the network's forward() sees nothing."""
    features = inputs
    for layer in model.children():
        features = layer(features)
    return task.loss(features, targets), features


def mixup(model, inputs, targets, task, generator):
    share = torch.rand((), generator=generator)
    order = torch.randperm(len(inputs), generator=generator)
    outputs = model(inputs.lerp(inputs[order], share))
    return torch.lerp(task.loss(outputs, targets), task.loss(outputs, targets[order]), share), outputs


def two_views(model, inputs, targets, task, generator):
    noise = 0.1 * torch.randn(inputs.shape, generator=generator)
    outputs, others = model(inputs), model(inputs + noise)
    return task.loss(outputs, targets) + (outputs - others).square().sum(), outputs


def mean(model, inputs, targets, task, generator):
    loss, outputs = plain(model, inputs, targets, task, generator)
    return loss / len(inputs), outputs


def loss_alone(model, inputs, targets, task, generator):
    return plain(model, inputs, targets, task, generator)[0]


def each(model, inputs, targets, task, generator):
    outputs = model(inputs)
    return outputs.square().sum(1), outputs


def detached(model, inputs, targets, task, generator):
    loss, outputs = plain(model, inputs, targets, task, generator)
    return loss.detach(), outputs


def other_outputs(model, inputs, targets, task, generator):
    loss, outputs = plain(model, inputs, targets, task, generator)
    return loss, outputs.argmax(1)


def raises(model, inputs, targets, task, generator):
    return model(inputs, targets)


def look_up(targets):
    return {0: "a class that few examples are of"}[len(targets)]


def raises_in_training(model, inputs, targets, task, generator):
    """As plain() in a trial, whose batches are small."""
    if len(inputs) > 16:
        look_up(targets)
    return plain(model, inputs, targets, task, generator)


def nothing_in_training(model, inputs, targets, task, generator):
    return plain(model, inputs, targets, task, generator) if len(inputs) <= 16 else None


def contrastive(model, inputs, targets, task, generator):
    outputs = model(inputs)
    return torch.logsumexp(outputs @ outputs.T, 1).sum(), outputs


def draws_globally(model, inputs, targets, task, generator):
    outputs = model(inputs)
    return task.loss(outputs * torch.rand(len(outputs), 1), targets), outputs
