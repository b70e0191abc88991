"""Loops as users write them: some that work, and one for each mistake that is told."""

import copy

import torch

from raysubset.training import Cost, EpochRecord


def momentum(model, examples, recipe, progress, on_step):
    """Batches drawn by the step, an optimizer of torch's, resumed by its state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.peak_learning_rate(), momentum=0.9)
    if progress.state is not None:
        optimizer.load_state_dict(progress.state["optimizer"])
    progress.capture = lambda: {"optimizer": optimizer.state_dict()}
    while progress.step < progress.num_steps:
        draws = torch.Generator().manual_seed(progress.seed + progress.step)
        step(model, examples, optimizer, torch.randint(len(examples), (recipe.batch_size,), generator=draws), progress)
        if on_step(progress):
            return


def step(model, examples, optimizer, indices, progress):
    inputs, targets = examples.batch(indices)
    loss = examples.task.loss(model(inputs), targets) / len(inputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    progress.count(len(inputs), loss.item(), learning_rate=optimizer.param_groups[0]["lr"])


def without_capture(model, examples, recipe, progress, on_step):
    """By torch's generator, which is seeded before; it cannot go on in its middle."""
    assert progress.state is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(progress.num_steps):
        step(model, examples, optimizer, torch.randperm(len(examples))[: recipe.batch_size], progress)
        if on_step(progress):
            return


def without_capture_fails(model, examples, recipe, progress, on_step):
    without_capture(model, examples, recipe, progress, lambda progress: on_step(progress) or 0 / (progress.step < 2))


def ends_early(model, examples, recipe, progress, on_step):
    progress.num_steps, progress.num_steps_per_epoch = 5, 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    while progress.step < 3:
        step(model, examples, optimizer, torch.arange(4), progress)
        if on_step(progress):
            return


def counts_itself(model, examples, recipe, progress, on_step):
    """Says a cost that no step of ours has."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    progress.step, progress.cost = 1, Cost(num_forward=700, num_backward=300, num_steps=20, device_s=1e6)
    on_step(progress)


def silent(model, examples, recipe, progress, on_step):
    step(model, examples, torch.optim.SGD(model.parameters(), lr=0.1), torch.arange(4), progress)


def costless(model, examples, recipe, progress, on_step):
    progress.step = 1
    on_step(progress)


def of_a_copy(model, examples, recipe, progress, on_step):
    momentum(copy.deepcopy(model), examples, recipe, progress, on_step)


def of_some(model, examples, recipe, progress, on_step):
    optimizer = torch.optim.SGD(list(model.parameters())[:1], lr=0.1)
    step(model, examples, optimizer, torch.arange(8), progress)
    on_step(progress)


def reshaped(model, examples, recipe, progress, on_step):
    silent(model, examples, recipe, progress, on_step)
    on_step(progress)
    model.more = torch.nn.Linear(2, 2)


def infinite(model, examples, recipe, progress, on_step):
    silent(model, examples, recipe, progress, on_step)
    next(model.parameters()).data.fill_(float("inf"))
    on_step(progress)


def endless(model, examples, recipe, progress, on_step):
    progress.capture = lambda: {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(progress.num_steps):
        step(model, examples, optimizer, torch.arange(8), progress)
        on_step(progress)


def forgetful(model, examples, recipe, progress, on_step):
    """Resumes without the momentum."""
    if progress.state is not None:
        progress.state = None
    momentum(model, examples, recipe, progress, on_step)


def opaque(model, examples, recipe, progress, on_step):
    progress.capture = lambda: {"loop": torch.Generator()}
    silent(model, examples, recipe, progress, on_step)
    on_step(progress)


def backwards(model, examples, recipe, progress, on_step):
    silent(model, examples, recipe, progress, on_step)
    on_step(progress)
    on_step(progress)


def unrecorded(model, examples, recipe, progress, on_step):
    progress.step, progress.epoch_ended = 1, True
    on_step(progress)


def half_costs(model, examples, recipe, progress, on_step):
    progress.step, progress.cost = 1, Cost(num_forward=0.5)
    on_step(progress)


def odd_record(model, examples, recipe, progress, on_step):
    progress.step, progress.epoch_ended = 1, True
    progress.history.append(EpochRecord(1.0, torch.tensor(1.0), float("nan"), 1))
    on_step(progress)


def other_progress(model, examples, recipe, progress, on_step):
    on_step(0.5)


def raises(model, examples, recipe, progress, on_step):
    model(examples)


def swallows(model, examples, recipe, progress, on_step):
    """As frameworks do with what their callbacks raise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(progress.num_steps):
        step(model, examples, optimizer, torch.arange(8), progress)
        try:
            on_step(progress)
        except Exception:
            return
