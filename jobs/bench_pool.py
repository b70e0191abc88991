"""What a piece costs the driver: CPU time and memory of this process while actors do pieces that are no work.

    python jobs/bench_pool.py [--pieces 64 1000 10000] [--actors 4]

Pieces are those of a run, with 60 positions each as a thousandth of MNIST has; a pool gives them to actors that
write the ledger entry a minimum has and return its record. CPU time is the driver's alone, Ray's threads in it included
and start-up left out; the actors' own is not counted.

Hardware: 2 cores of a shared virtual machine, alone; Ray 2.60, Python 3.11. Wall time: a minute for 1,000 and 10,000.
Result:   2.29 ms a piece at 1,000, 5.6 s of wall time and +5.3 MB; 1.99 ms at 10,000, 35.1 s and +6.8 MB (n = 1; goal
          3 ms). It was 8.3 ms at 1,000 when each attempt listed the ledger. At 64, with the start of actors and looks
          while they are slow, 5.3 ms at a load of 13 to 30, where it was 14.7. All but 0.05 ms is Ray's calls.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raysubset import Config
from raysubset.cluster import connected, own_address, put_once, ray
from raysubset.data import load_full_set
from raysubset.events import Event, MinimumDone, Progress, Start
from raysubset.pulse import Pulse, pulse
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Work
from raysubset.subset_actors import ActorPool, Pack, crew, minimum_done
from raysubset.training import Cost
from raysubset.user_code.source_files import Workplace
from raysubset.work import Piece, Run

EXAMPLES = 60  # of a piece


class IdleActor:
    """Answers as a SubsetActor does, and does nothing."""

    def __init__(self, full_set_ref: Sequence[Any], num_gpus: float, workplace: Workplace) -> None:
        self._node = own_address()

    def place(self) -> dict[str, Any]:
        return {"node": ray.get_runtime_context().get_node_id(), "ip": self._node, "pid": 0, "card_bytes": None}

    def report(self) -> tuple[Pulse, dict[int, Any], list[str]]:
        return pulse(), {}, []

    def request_stop(self, *, preempted: bool = False) -> None:
        pass

    def do(self, pieces: Sequence[Piece], start_ref: Any, *, attempts: Sequence[int], waited_s: float) -> Any:
        (piece,), now, cost = pieces, time.time(), Cost(num_forward=EXAMPLES, num_backward=EXAMPLES, num_steps=1)
        work = Work(*piece.ledger_key, attempts[0], self._node, "none", started_at=now, waited_s=waited_s)
        work = replace(work, ended_at=now, outcome="done", cost=cost)
        piece.directory.write_json(work.path, work.to_dict(), is_durable=False)
        record = {"subset_id": piece.subset_id, "num_examples": EXAMPLES, "start_id": "initial", "outcome": "epochs"}
        return [record | {"training": None, "validation": None, "cost": cost.to_dict(), "files": {}}], []


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def resident_mb() -> float:
    """Of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measured(config: Config, num_pieces: int, full_set: Any, full_set_ref: Any) -> dict[str, float]:
    """Do so many pieces and return what that took of the driver."""
    nums = {Start: 0, MinimumDone: 0, Progress: 0}

    def listen(event: Event) -> None:
        nums[type(event)] = nums.get(type(event), 0) + 1

    with tempfile.TemporaryDirectory() as folder:
        config = config.with_overrides({"storage_path": folder})
        run = Run(config, RunDirectory(config.storage_path, config.run_name()), full_set, full_set_ref, listen)
        indices = np.arange(EXAMPLES)
        packs = [
            Pack((Piece(config, run.directory, "subsets", subset_id=i, indices=indices),)) for i in range(num_pieces)
        ]
        with ActorPool(run, num_gpus=0.0) as pool:
            for _ in pool.run(packs[:8], keep=1e9):  # actors come up
                pass
            before_mb, before_s, began = resident_mb(), cpu_s(), time.perf_counter()
            for piece, record in pool.run(packs[8:], keep=1e9):
                assert isinstance(piece, Piece)
                listen(minimum_done(piece, record, full_set.quality, ""))
            used_s, wall_s, more_mb = cpu_s() - before_s, time.perf_counter() - began, resident_mb() - before_mb
        assert nums[Start] == num_pieces == nums[MinimumDone] + 8
    return {"ms": 1e3 * used_s / (num_pieces - 8), "wall_s": wall_s, "mb": more_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, nargs="+", default=[64, 1000, 10000])
    parser.add_argument("--actors", type=int, default=4)
    arguments = parser.parse_args()
    crew.SubsetActor = IdleActor  # type: ignore[misc]
    config = Config(name="bench").with_overrides({"cluster.num_cpus": arguments.actors})
    full_set = load_full_set(*config.learned)
    with connected(config.cluster):
        full_set_ref = put_once(full_set)
        for num_pieces in arguments.pieces:
            took = measured(config, num_pieces, full_set, full_set_ref)
            print(
                f"{num_pieces:6d} pieces, {arguments.actors} actors: {took['ms']:6.2f} ms of driver CPU a piece, "
                f"{took['wall_s']:6.1f} s, {took['mb']:+7.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
