"""What stages of Ray Train have that other minimizations lack, for its workers and for an actor alone."""

from typing import Any

import torch
from torch import nn

from raysubset.data import FullSet
from raysubset.models import new_model
from raysubset.training import (
    Cost,
    Distillation,
    ValidationWatch,
    evaluate,
    peak_bytes,
    place,
)
from raysubset.work.calibration import calibration_examples
from raysubset.work.pieces import Piece


def distillation_of(piece: Piece, full_set: FullSet, device: torch.device) -> Distillation | None:
    """Return what the piece learns from beside the targets: its teachers, as networks on the device."""
    if not piece.teachers:
        return None
    config, teachers = piece.config, []
    for teacher in piece.teachers:
        model = new_model(config.model, full_set)
        model.load_state_dict(teacher.weights())
        teachers.append(place(model, device, channels_last=config.minimize.channels_last))
    tuning = config.fine_tuning
    return Distillation(teachers, share=tuning.distillation, temperature=tuning.temperature)


def leave_trained(
    model: nn.Module,
    full_set: FullSet,
    piece: Piece,
    watch: ValidationWatch,
    *,
    outcome: str,
    device: torch.device,
    num_workers: int = 1,
    recomputed_batch_norm: bool = False,
) -> tuple[dict[str, Any], Cost]:
    """Measure the trained model on the calibration sample and all validation examples, and write its weights.

    Returns:
        The record, which the caller writes after its ledger entry, and the cost of measuring.
    """
    recipe, path = piece.config.minimize, piece.output.weights_path
    calibration = calibration_examples(piece.config, full_set, device)
    validation = full_set.examples("validation", device=device)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    record = {
        "training": evaluate(model, calibration, recipe).to_dict(),
        "validation": evaluate(model, validation, recipe).to_dict(),
        "history": watch.looks,
        "outcome": outcome,
        "num_workers": num_workers,
        "recomputed_batch_norm": recomputed_batch_norm,
        "peak_bytes": peak_bytes(device),
        "files": {path: piece.directory.write_weights(path, weights)},
    }
    return record, Cost(num_forward=len(calibration) + len(validation))
