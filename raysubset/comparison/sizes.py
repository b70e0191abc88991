"""sizes_of() forecasts the bytes that each round of a config moves, by the files that two steps of a member leave."""

import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from raysubset.aggregation import from_differences, method_of, to_differences
from raysubset.comparison.network import Exchange
from raysubset.config import Config
from raysubset.data import FullSet
from raysubset.legs import FRESH
from raysubset.models import averaged_names, trainable_names
from raysubset.planning import Plan
from raysubset.run_directory import FROZEN_FOLDER, RunDirectory, optimizer_path, weights_path
from raysubset.run_directory.ledger import Ledger
from raysubset.training import Weights, ensemble_positions, num_steps_per_epoch
from raysubset.work import Minimizer, Piece, fixed_weights, seeded_model, zeros_of

_WITH_RATES = ("sgd", "adam", "adamw", "muon")
_FEW = 8  # examples of the one member's subset


@dataclass(frozen=True)
class Sizes:
    """Bytes of a config's files."""

    rounds: tuple[Exchange, ...]
    checkpoint: int  # of a member, or of data-parallel training


def sizes_of(config: Config, full_set: FullSet, plan: Plan) -> Sizes:
    """Return the bytes that the ledger will count, exact but for checkpoints.

    Checkpoints grow with their histories, and those by actors.checkpoint_s are not foreseen. Nothing is assumed to be
    lost, and each member to have its own actor, which writes or fetches frozen weights once.
    """
    rounds, num, model = config.rounds, len(plan.subsets), seeded_model(config, full_set)
    weights, names = model.state_dict(), trainable_names(model)
    shape = (len(ensemble_positions(full_set.examples("validation"))), *full_set.spec.outputs)
    recipe, subset = config.minimize, plan.subsets[0].indices
    if recipe.optimizer in _WITH_RATES:  # a tiny rate, so that two steps on few examples cannot diverge
        recipe = replace(recipe, learning_rate=1e-9)
    few_config = replace(
        config,
        minimize=recipe,
        aggregation=replace(config.aggregation, statistics_examples=_FEW),
        actors=replace(config.actors, on_step=None, profile=0, checkpoint_epochs=1e-9),
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(folder, "sizes")
        piece = plan.drawing(few_config, directory).members(0, FRESH, ())[0].piece
        assert isinstance(piece, Piece)
        epochs = 2 / num_steps_per_epoch(min(_FEW, len(subset)), config.stage("subsets"))
        piece = replace(piece, indices=subset[:_FEW], epochs=epochs, measures=())
        Minimizer(lambda: full_set, num_gpus=0, node="").minimize([piece], weights, attempts=[0], waited_s=0.0)
        (work,) = Ledger(directory).read()
        file_sizes = {path: _size(directory, path) for path in piece.output.files()}
        checkpoint = (work.num_network_bytes - sum(file_sizes.values())) // max(1, work.cost.num_steps - 1)
        file_sizes = {path: size for path, size in file_sizes.items() if not path.startswith(FROZEN_FOLDER)}
        minimum, state = file_sizes.pop(weights_path(piece.folder)), file_sizes.pop(optimizer_path(piece.folder), 0)
        fixed = fixed_weights(weights, averaged_names(model))
        whole, momentum, outputs = (
            _written_size(directory, tensors, fixed.keys())
            for tensors in (weights, {name: weights[name] for name in names}, {"outputs": torch.zeros(shape)})
        )
        frozen = sum(_size(directory, path) for path in directory.list(FROZEN_FOLDER))
        last, sent_momentum = whole, momentum
        if rounds.send != "float32":
            sent = to_differences(zeros := zeros_of(weights, names), zeros, names, rounds.send)
            sent_momentum = _written_size(directory, sent)
        if rounds.overlaps:
            end = from_differences(piece.output.weights(), weights)
            last = _written_size(directory, to_differences(end, weights, names, "difference"))
    has_parts = bool(method_of(config.aggregation).needs.parts)  # members on parts leave outputs that nobody fetches
    statistics = sum(file_sizes.values()) + whole * has_parts
    steps, is_averaged = num_steps_per_epoch(len(subset), config.stage("subsets")), rounds.optimizer_state == "average"
    drawing = plan.drawing(config, None)

    first = plan.num_bytes * (config.subsets.start == "shared")

    def start_size(number: int) -> int:
        if number <= rounds.overlaps:  # members that overlap begin twice at the first start, and have it then
            return 0 if number else first
        return whole if rounds.sends_whole(number - 1 - rounds.overlaps) else minimum

    def exchange(number: int) -> Exchange:
        is_whole, is_last = rounds.sends_whole(number), number + 1 == rounds.num
        epochs = drawing.members(number, FRESH, ())[0].epochs
        interval = max(1, round(config.actors.checkpoint_epochs * steps))
        num_checkpoints = max(0, round(epochs * steps) - 1) // interval
        predicted = outputs * rounds.evaluated(number)
        return Exchange(
            num_members=num,
            start=start_size(number),
            shared=(last if is_last else minimum) + statistics + predicted,
            own=(0 if is_last else state)
            + frozen * (number == 0)
            + num_checkpoints * checkpoint
            + predicted * has_parts,
            aggregate=(whole if is_whole else minimum)
            + (momentum if is_whole else sent_momentum) * rounds.has_outer_step(),
            states=state * (is_averaged + (has_parts and rounds.optimizer_state != "reset")) * (number > 0),
            averaged=(num + 1) * state * (is_averaged and not is_last),
            is_first=number == 0,
        )

    return Sizes(tuple(map(exchange, range(rounds.num))), checkpoint)


def _size(directory: RunDirectory, path: str) -> int:
    assert directory.local_path
    return (directory.local_path / path).stat().st_size


def _written_size(directory: RunDirectory, weights: Weights, frozen: Collection[str] = ()) -> int:
    """Return the size of a file of these weights, without those that are frozen."""
    directory.write_apart("written.safetensors", weights, frozen)
    return _size(directory, "written.safetensors")
