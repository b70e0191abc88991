"""leave_aggregate(): computes and measures the aggregate of a round's minima in this process."""

from collections.abc import Sequence
from typing import Any

import torch

from raysubset.aggregation import (
    Aggregation,
    Scorer,
    aggregate_round,
    from_differences,
    mean_optimizer_state,
    to_differences,
)
from raysubset.config import Config, derive_seed
from raysubset.data import FullSet
from raysubset.models import averaged_names, build_model, num_parameters
from raysubset.run_directory import mean_optimizer_path, momentum_path, optimizer_path
from raysubset.run_directory.ledger import Ledger
from raysubset.subsets import overdetermination_ratio
from raysubset.training import Weights, device_name, place, use_device
from raysubset.work.cutting import calibration_examples
from raysubset.work.networks import Networks
from raysubset.work.pieces import AggregatePiece, Piece, zeros_of
from raysubset.work.starting import fixed_weights, unchanged_names


def leave_aggregate(
    full_set: FullSet,
    num_gpus: float,
    piece: AggregatePiece,
    start: Weights | None = None,
    *,
    networks: Networks | None = None,
    **place: Any,
) -> tuple[Aggregation, dict[str, Any]]:
    """Aggregate a round's minima, on the device Ray gave this process, and write weights, ledger entry and record.

    The record, aggregate.json, is written last. A process that dies before it has done nothing that counts.

    Args:
        start: the weights that the members started from, if loaded already; None: the piece names them.
        networks: this process's cache of networks.
        place: node, and if it is known attempt and waited_s, of the ledger entry.

    Returns:
        The aggregation, and the record.
    """
    config, directory, round = piece.config, piece.directory, piece.round
    device = use_device(num_gpus=num_gpus, num_threads=config.actors.num_cpus)
    with Ledger(directory).recorded("aggregation", round, device=device_name(device), **place) as close:
        start = piece.start_weights(full_set) if start is None else start
        model = (networks or Networks()).placed(config, full_set, start, device)
        scorer = Scorer(
            model,
            calibration=calibration_examples(config, full_set, device),
            validation=full_set.examples("validation", device=device),
            minimize=config.minimize,
        )
        records, part_records = _records(piece.members), _records(piece.parts)
        members = zip(piece.members, records, piece.parts or (None,) * len(records), strict=True)
        averaged = averaged_names(model)
        options: dict[str, Any] = {"start": start, "averaged": averaged}
        names, sent = scorer.parameter_names, Weights()

        def send(weights: Weights) -> Weights:
            """Round the trainable parameters to what is sent of them."""
            parameters = {name: weights[name] for name in names}
            sent.update(to_differences(parameters, start, names, piece.send))
            return weights | from_differences(sent, {name: start[name] for name in names})

        aggregation, momentum = aggregate_round(
            [member.minimum(record, part, **options) for member, record, part in members],
            config,
            scorer,
            start=start,
            momentum=piece.last_momentum(names, start),
            seed=derive_seed(config.seed, "aggregation", round),
            measures=piece.measures,
            quality=full_set.quality,
            send=None if piece.send == "float32" else send,
        )
        path, weights = piece.output.weights_path, aggregation.aggregate.weights
        record: dict[str, Any] = {"round": round}
        if piece.send == "float32":
            files = directory.write_apart(path, weights, unchanged_names(weights, fixed_weights(start, averaged)))
        else:
            assert piece.start is not None
            rest = {name: weights[name] for name in weights.keys() - set(names)}
            files = {path: directory.write_weights(path, sent | to_differences(rest, start, (), piece.send))}
            momentum = momentum and to_differences(momentum, zeros_of(start, names), names, piece.send)
            record["base"] = piece.start.as_base(directory)
        if momentum:
            files[momentum_path(round)] = directory.write_weights(momentum_path(round), momentum)
        if piece.averages_optimizers:
            paths = [(member.directory, optimizer_path(member.folder)) for member in piece.members]
            mean = mean_optimizer_state(owner.read_checkpoint(path)["optimizer"] for owner, path in paths)
            path = mean_optimizer_path(round)
            files[path] = directory.write_checkpoint(path, {"optimizer": mean}, is_durable=False)
        listed: dict[str, Any] = {}
        if piece.lists_minima:
            num_outputs, num = full_set.spec.num_outputs, num_parameters(model)
            for minimum in records:
                ratio = overdetermination_ratio(minimum["num_examples"], num_outputs, num)
                minimum["overdetermination_ratio"] = ratio
            listed = {"minima": records} | ({"subsamples": part_records} if part_records else {})
        record |= {**listed, "aggregation": aggregation.to_dict(), "files": files}
        close(aggregation.cost)
        directory.write_json(piece.output.record_path, record)
    return aggregation, record


def _records(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    return [piece.directory.read_json(piece.output.record_path) for piece in pieces]


def placed_model(full_set: FullSet, num_gpus: float, config: Config) -> tuple[torch.nn.Module, torch.device]:
    """Return the config's network on the device that this process was given, and the device."""
    device = use_device(num_gpus=num_gpus, num_threads=config.actors.num_cpus)
    return place(build_model(config.model, full_set.spec), device, channels_last=config.minimize.channels_last), device
