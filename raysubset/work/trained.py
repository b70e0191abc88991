"""What stages of Ray Train have that other minimizations lack, whether workers do them or an actor alone."""

from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.data import Examples, FullSet
from raysubset.models import build_model, copied
from raysubset.run_directory import left_out_path
from raysubset.training import (
    Cost,
    Distillation,
    Metrics,
    Shard,
    Weights,
    evaluate,
    place,
    recompute_batch_norm,
    try_training,
)
from raysubset.work.cutting import calibration_examples
from raysubset.work.pieces import Piece
from raysubset.work.starting import unchanged_names


def distillation_of(piece: Piece, full_set: FullSet, device: torch.device) -> Distillation | None:
    """Return what the piece learns from beside the targets: its teachers, as networks on the device."""
    if not piece.teachers:
        return None
    config, teachers = piece.config, []
    for teacher in piece.teachers:
        model = build_model(config.model, full_set.spec)
        model.load_state_dict(teacher.weights())
        teachers.append(place(model, device, channels_last=config.minimize.channels_last))
    tuning = config.fine_tuning
    return Distillation(teachers, share=tuning.distillation, temperature=tuning.temperature)


def leaves_out(piece: Piece, model: nn.Module, recipe: MinimizeConfig, full_set: FullSet, shard: Shard) -> bool:
    """Return True if steps may leave out parameters, by a trial or an earlier attempt. All workers decide alike."""
    if ":" not in piece.config.model.name:
        return False
    did_before = piece.directory.exists(left_out_path(piece.stage))
    may_leave_out = did_before or bool(try_training(copied(model).cpu(), recipe, full_set.sample()).left_out)
    device = next(model.parameters()).device
    return bool(shard.sum(torch.tensor(float(may_leave_out), device=device)).item())


def evaluate_together(
    model: nn.Module, examples: Examples, recipe: MinimizeConfig, shard: Shard, *, counts: bool
) -> Metrics:
    """Return metrics on the examples of all workers. Each scores its own, with the first one's running statistics.

    Args:
        counts: False if another worker scores these too, because there are fewer examples than workers.
    """
    if shard.num == 1:
        return evaluate(model, examples, recipe)
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)
    part = evaluate(model, examples, recipe)
    device = examples.device if examples.device.type == "cuda" else "cpu"

    def total(value: Any) -> Tensor:
        return shard.sum(torch.tensor(value, dtype=torch.float64, device=device) * counts)

    sums = {
        name: (total(value).long() if name.startswith("num_") else total(value)).tolist()
        for name, value in part.sums.items()
    }
    return Metrics.of_sums(examples.task, float(total(part.loss_sum)), sums, int(total(part.num_examples)))


def leave_trained(
    model: nn.Module, full_set: FullSet, piece: Piece, device: torch.device, *, fixed: Weights, refresh: bool
) -> tuple[dict[str, Any], Cost]:
    """Measure the trained model on all validation examples, and write its weights.

    A piece that measures training data is measured on the calibration sample too.

    Args:
        fixed: fixed_weights() of its start.
        refresh: recompute batch-norm statistics first, which are of the first worker's shards alone.

    Returns:
        The record, which the caller writes after its ledger entry, and the cost of measuring.
    """
    recipe, path = piece.config.minimize, piece.output.weights_path
    calibration = calibration_examples(piece.config, full_set, device)
    validation = full_set.examples("validation", device=device)
    num_refreshed = recompute_batch_norm(model, calibration, recipe) if refresh else 0
    training, num_measured = None, 0
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if "training" in piece.measures:
        training, num_measured = evaluate(model, calibration, recipe).to_dict(), len(calibration)
    record = {
        "training": training,
        "validation": evaluate(model, validation, recipe).to_dict(),
        "recomputed_batch_norm": num_refreshed > 0,
        "files": piece.directory.write_apart(path, weights, unchanged_names(weights, fixed)),
    }
    return record, Cost(num_forward=num_measured + len(validation) + num_refreshed)
