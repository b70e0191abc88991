"""What a round costs beside its steps: rounds of next to nothing through Ray, and pieces of 11 million parameters.

    python jobs/bench_rounds.py [--num-rounds 40] [--num-pieces 12] [--only rounds|pieces]

A round of two subsets of one step each by one actor and its aggregate, from event to event: CPU of driver, actor and
Ray's daemons, and wall time. Then pieces of a ResNet-18 (11,173,962 parameters, one step of 16 digits, momenta handed
on) in this process, without Ray, beside the same by hand: weights loaded, a step, weights and momenta saved. CPU time
holds on a shared machine, wall time does not; the median is of all but the first rounds and pieces.

Hardware: 2 cores of a shared virtual machine, load 8 to 25; Ray 2.60, torch 2.14, Python 3.11. Wall time: 2 min.
Result:   CPU ms                          before    now
          an empty round through Ray         136     65   driver 38 and 17, actor 86 and 47, Ray 12 and 1; wall time 134
                                                          and 55 ms (61, 55 and 53; least 42), n = 53 each, load 2 and
                                                          1. 68 before the next round's work was queued (2026-11-29)
          its two pieces and aggregate        65     48   in one process, alternating with the commit before, n = 2 × 50
          with four files synced, not nine    70     63   33595de and the commit of this line in turns, medians of 53
                                                          rounds, load 1: 74, 69, 66 and 60, 69, 60; wall time 65, 59,
                                                          56 ms and 49, 58, 53. Just before: 49, 47, 46 and 47 ms
          a piece of 11 million             1551    640   of which the step is 290; 540 by hand
          its aggregate                      537    230
          Before is commit 3691c8a. A round takes the 50 ms that are its goal, give or take a few; that of half a piece
          is met. Minima and optimizer states of 128 MiB a round stay for the last round alone (rounds.keep_minima).
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

NUM_FIRST = 5  # rounds and pieces that warm up
ROUNDS = {
    "subsets.num": 2,
    "subsets.size": 32,
    "minimize.epochs": 1.0,
    "trunk.epochs": 0.0,
    "fine_tuning.epochs": 0.0,
    "actors.max_num": 1,
    "model.width": 4,
    "cluster.num_cpus": 1,
    "rounds.outer_momentum": 0.0,
}
PIECES = ROUNDS | {"model.name": "resnet18", "model.width": None, "subsets.num": 1, "subsets.size": 16}


def empty_rounds(num_rounds: int) -> None:
    """Through Ray, in one run."""
    from raysubset import Config, run
    from raysubset.events import AggregateDone, Event

    driver, moments = psutil.Process(), list[tuple[float, dict[str, float]]]()

    def listen(event: Event) -> None:
        if isinstance(event, AggregateDone):
            cpu_s = {"driver": 0.0, "actor": 0.0, "Ray": 0.0}
            for process in (driver, *driver.children(recursive=True)):
                try:
                    times, name = process.cpu_times(), process.name()
                except psutil.NoSuchProcess:
                    continue
                of = "driver" if process == driver else "actor" if name.startswith("ray::SubsetActor") else "Ray"
                cpu_s[of] += times.user + times.system
            moments.append((time.perf_counter(), cpu_s))

    overrides = ROUNDS | {"rounds.num": num_rounds, "rounds.evaluate_every": num_rounds}
    with tempfile.TemporaryDirectory() as folder:
        run(Config(storage_path=folder).with_overrides(overrides), on_event=listen)
    moments = moments[NUM_FIRST:-1]  # the last round is measured
    walls = [after[0] - before[0] for before, after in itertools.pairwise(moments)]
    first, last = moments[0], moments[-1]
    cpu_ms = {of: 1e3 * (last[1][of] - first[1][of]) / len(walls) for of in first[1]}
    parts = ", ".join(f"{of} {ms:.0f}" for of, ms in cpu_ms.items())
    print(
        f"an empty round: wall {1e3 * statistics.median(walls):.0f} ms (least {1e3 * min(walls):.0f}), CPU "
        f"{sum(cpu_ms.values()):.0f} ms ({parts}), n = {len(walls)}",
        flush=True,
    )


def pieces(num_pieces: int) -> None:
    """In this process, beside the same by hand."""
    import safetensors.torch
    import torch

    from raysubset import Config
    from raysubset.data import load_full_set
    from raysubset.models import build_model
    from raysubset.run_directory import RunDirectory, optimizer_path
    from raysubset.training import minimize, place, use_device
    from raysubset.work import AggregatePiece, Minimizer, Piece, cut_subsets, leave_aggregate

    def timed(taken: list[float], work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        before = time.process_time()
        result = work(*arguments, **options)
        taken.append(1e3 * (time.process_time() - before))
        return result

    config = Config().with_overrides(PIECES | {"rounds.num": 1000, "rounds.evaluate_every": 1000})
    full_set = load_full_set(*config.learned)
    device, recipe = use_device(num_gpus=0, num_threads=1), config.stage("subsets")
    model = place(build_model(config.model, full_set.spec), device, channels_last=True)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    doer = Minimizer(lambda: full_set, num_gpus=0, node="here")

    def steps(piece: Piece, state: Any) -> Any:
        examples = full_set.examples("train", piece.indices, device=device, augment=True)
        return minimize(model, examples, recipe, seed=0, optimizer_state=state).optimizer

    def by_hand(piece: Piece, state: Any, folder: str) -> Any:
        model.load_state_dict(start)
        state = steps(piece, state)
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        safetensors.torch.save_file(weights, f"{folder}/weights.safetensors")
        torch.save(state, f"{folder}/state.pt")
        return state

    taken: dict[str, list[float]] = {"steps alone": [], "by hand": [], "a piece": [], "an aggregate": []}
    with tempfile.TemporaryDirectory() as folder:
        directory, before, state = RunDirectory(folder, "run"), None, None
        for round in range(num_pieces):
            piece = Piece(
                config,
                directory,
                "subsets",
                subset_id=0,
                round=round,
                indices=cut_subsets(config, full_set, round)[0].indices,
                optimizer=before and (directory, optimizer_path(before.folder)),
                measures=(),
            )
            aggregate = AggregatePiece(config, directory, (piece,), round, measures=())
            state = timed(taken["by hand"], by_hand, piece, state, folder)
            timed(taken["steps alone"], steps, piece, state)
            timed(taken["a piece"], doer.minimize, [piece], start, attempts=[0], waited_s=0.0)
            timed(
                taken["an aggregate"],
                *(leave_aggregate, full_set, 0, aggregate, start),
                node="here",
                networks=doer.networks,
            )
            before = piece
        num_bytes = sum(path.stat().st_size for path in Path(folder, "run").rglob("*") if path.is_file())
    for name, each in taken.items():
        rest = each[min(NUM_FIRST, len(each) - 1) :]
        print(f"{name}: CPU {statistics.median(rest):.0f} ms (least {min(rest):.0f}), n = {len(rest)}", flush=True)
    print(f"left behind: {num_bytes / 2**20 / num_pieces:.0f} MiB a round", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rounds", type=int, default=40)
    parser.add_argument("--num-pieces", type=int, default=12)
    parser.add_argument("--only", choices=["rounds", "pieces"])
    arguments = parser.parse_args()
    if arguments.only != "pieces":
        empty_rounds(arguments.num_rounds)
    if arguments.only != "rounds":
        pieces(arguments.num_pieces)


if __name__ == "__main__":
    main()
