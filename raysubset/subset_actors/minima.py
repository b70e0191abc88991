"""find_minima(): the minima of many pieces of work, those that are there and those still to be made."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from raysubset.aggregation import Minimum
from raysubset.events import MinimumDone, Note
from raysubset.run_directory import (
    RunDirectory,
    Seal,
    minimum_path,
    outputs_path,
    statistics_path,
    subsample_folder,
    weights_path,
)
from raysubset.subset_actors.packs import Pack, in_packs
from raysubset.subset_actors.pool import ActorPool
from raysubset.training import Weights
from raysubset.work import Piece


def find_minima(
    pool: ActorPool,
    pieces: Sequence[Piece],
    start: Weights | None,
    *,
    release: bool = True,
    quorum: int | None = None,
    per_actor: int = 1,
) -> list[Minimum]:
    """The minima of all pieces, in order of subset id: those the run directory holds, and the others as they are done.

    Args, raises and what happens when processes die: as ActorPool.run(). With a quorum, fewer than asked may come back.
    Up to `per_actor` pieces are done at once by an actor.
    """
    directory, tell = pool.opened.directory, pool.opened.tell
    found: dict[str, Minimum] = {}
    for piece in pieces:
        if (record := directory.read_record(minimum_path(piece.folder))) is not None:
            found[piece.folder] = read_minimum(directory, piece, record)
    missing = [tuple(p for p in pack.pieces if p.folder not in found) for pack in in_packs(pieces, per_actor)]
    todo = [Pack(rest) for rest in missing if rest]
    if found and todo:
        tell(Note(f"{len(found)} of {len(pieces)} minima are already there"))
    min_done = None if quorum is None else max(0, quorum - len(found))
    for piece, record in pool.run(todo, start, release=release, min_done=min_done):
        minimum = found[piece.folder] = read_minimum(directory, piece, record)
        told = [f"loss {minimum.training.loss:.4f}"] if minimum.training else []
        if validation := minimum.validation:
            told.append(f"validation {validation.loss:.4f} and {validation.accuracy:.2%}")
        if minimum.outcome != "epochs":
            told.append(minimum.outcome)
        text = f"{piece.label}: {', '.join([*told, f'{minimum.cost.device_s:.1f} s'])}"
        tell(MinimumDone(f"{text} ({len(found)} of {len(pieces)})", piece.ledger_stage, record))
    return [found[piece.folder] for piece in pieces if piece.folder in found]


def read_minimum(run: RunDirectory, piece: Piece, record: dict[str, Any]) -> Minimum:
    """The minimum of a piece that is done, as its record says; weights and all else large are read when asked for."""
    files = record["files"]
    return Minimum.from_dict(
        record,
        load_weights=partial(run.read_weights, weights_path(piece.folder), files),
        load_outputs=lambda: run.read_weights(outputs_path(piece.folder), files)["outputs"],
        load_statistics=partial(_statistics, run, piece, files),
    )


def _statistics(run: RunDirectory, piece: Piece, files: Mapping[str, Seal], kind: str) -> Weights:
    if kind == "subsample" and piece.subset_id is not None:
        folder = subsample_folder(piece.round, piece.subset_id)
        if run.exists(minimum_path(folder)):
            return run.read_weights(weights_path(folder), run.read_json(minimum_path(folder))["files"])
    elif (path := statistics_path(piece.folder, kind)) in files:
        return run.read_weights(path, files)
    raise ValueError(f"the minimum of {piece.label} has no {kind} statistics: it was made for another method")
