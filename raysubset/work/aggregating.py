"""leave_aggregate(): the aggregate of a round's minima, made and measured in this process."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from raysubset.aggregation import Aggregation, Minimum, Scorer, Unmeasured, aggregate_round
from raysubset.config import Config, derive_seed
from raysubset.data import FullSet
from raysubset.ledger import Ledger
from raysubset.models import averaged_names, new_model
from raysubset.run_directory import RunDirectory, aggregate_path, aggregate_weights_path, momentum_path
from raysubset.training import MEASURES, Measure, Weights, device_name, place, use_device
from raysubset.work.calibration import calibration_examples


@dataclass(frozen=True)
class Round:
    """The minima that an aggregate is made of, and what it takes besides."""

    number: int
    minima: Sequence[Minimum]
    start: Weights  # the weights they started from
    momentum: Weights  # the outer step's, of the round before; empty in the first
    measures: Collection[Measure] = MEASURES
    members: Mapping[str, Any] = field(default_factory=dict)  # what its record says of them


def leave_aggregate(
    full_set: FullSet,
    num_gpus: float,
    config: Config,
    directory: RunDirectory,
    of: Round,
    *,
    node: str,
    waited_s: float = 0.0,
) -> tuple[Aggregation | Unmeasured, dict[str, Any]]:
    """Aggregate a round's minima, on the device Ray gave this process, and leave weights, ledger entry and record.

    The record, aggregate.json, is written last: a process that dies before has left nothing that counts.

    Returns:
        What was made, and the record.
    """
    model, device = placed_model(full_set, num_gpus, config)
    entry = {"device": device_name(device), "node": node, "waited_s": waited_s}
    with Ledger(directory).recorded("aggregation", of.number, **entry) as close:
        averaged = averaged_names(model)
        scorer = Scorer(
            model,
            calibration=calibration_examples(config, full_set, device),
            validation=full_set.examples("validation", device=device),
            minimize=config.minimize,
            measure_training="training" in of.measures,
        )
        made, momentum = aggregate_round(
            [replace(minimum, averaged=averaged) for minimum in of.minima],
            config,
            scorer,
            start=of.start,
            momentum=of.momentum,
            seed=derive_seed(config.seed, "aggregation", of.number),
            measured="validation" in of.measures,
        )
        path = aggregate_weights_path(of.number)
        files = {path: directory.write_weights(path, made.aggregate.weights)}
        if momentum:
            files[momentum_path(of.number)] = directory.write_weights(momentum_path(of.number), momentum)
        record = {"round": of.number, **of.members, "aggregation": made.to_dict(), "files": files}
        close(made.cost)
        directory.write_json(aggregate_path(of.number), record)
    return made, record


def placed_model(full_set: FullSet, num_gpus: float, config: Config) -> tuple[torch.nn.Module, torch.device]:
    """The config's network on the device this process was given, and the device."""
    device = use_device(num_gpus=num_gpus, num_threads=config.actors.num_cpus)
    return place(new_model(config.model, full_set), device, channels_last=config.minimize.channels_last), device
