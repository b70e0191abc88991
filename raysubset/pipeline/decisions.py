"""Decisions that depend on the cluster or on measurements. Made once, written down, and kept when the run resumes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from raysubset.cluster import num_gpus_of, num_slots, offered, refuse_unplaceable
from raysubset.config import Config
from raysubset.costs import taught_passes
from raysubset.events import Note, stage_event
from raysubset.fine_tuning.streaming import most_workers, refuse_without_readers
from raysubset.pipeline.node_speeds import Slot, decide_slots, shares
from raysubset.planning import Plan, workers_of_stages
from raysubset.run_directory import DECISIONS_PATH, RunDirectory, aggregate_path, minimum_path
from raysubset.subset_actors import ActorPool, packing_decision, packing_note
from raysubset.training import Cost
from raysubset.work import Piece, Run

TRAIN_START_S = 15.0  # seconds that the processes of a Ray Train job take to start, on idle cores


def refuse_what_has_no_place(config: Config, directory: RunDirectory | None) -> None:
    """Stop before the first stage, and before a new cluster starts, if an unfinished stage can never be placed.

    Args:
        directory: of the run, whose finished stages request nothing; None if nothing is finished.

    Raises:
        ValueError: with the request, what the cluster has, and the way out.
    """
    types = offered(config.cluster)
    record = directory.read_json_or_none(DECISIONS_PATH) if directory is not None else None
    num_gpus = record["num_gpus"] if record else num_gpus_of(config.actors, lambda event: None, types=types)
    request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
    least = config.fine_tuning.min_workers or config.fine_tuning.workers(auto=1)
    for stage, num in workers_of_stages(config, of_fine_tuning=least).items():
        result_path = aggregate_path(config.rounds.num - 1) if stage == "subsets" else minimum_path(stage)
        if directory is None or not directory.exists(result_path):
            what = f"{stage} workers" if num > 1 else "subset actors"  # one actor does the work of a single worker
            refuse_unplaceable(request, what, num=num, types=types)


def most_tuners(config: Config, plan: Plan, request: Mapping[str, float], *, startable: bool) -> int:
    """Return the most workers that may fine-tune: of a place each, a subset each, and their share of each batch."""
    most = min(num_slots(request, startable=startable), len(plan.subsets), plan.most_workers)
    return max(1, min(most, most_workers(config.actors.num_cpus)) if config.data.streamed else most)


class Decisions:
    """The decisions of one run, kept in decisions.json of its directory."""

    def __init__(self, run: Run, plan: Plan) -> None:
        """Read the decisions back, or decide on GPUs and workers by what the cluster has or can start.

        Raises:
            ValueError: if no CPU would be left beside the Ray Train workers to read the streamed examples.
        """
        self._run, self._plan = run, plan
        self.record: dict[str, Any] = run.directory.read_json_or_none(DECISIONS_PATH) or {}  # that of decisions.json
        self._decide("num_gpus", self._first)

    def _decide(self, name: str, decide: Callable[[], dict[str, Any]]) -> None:
        """Add what decide() returns to the record and write it, unless the record has the name."""
        if name not in self.record:
            self.record |= decide()
            self._run.directory.write_json(DECISIONS_PATH, self.record)

    @property
    def num_gpus(self) -> float:
        """GPUs of an actor, and of a Ray Train worker."""
        return self.record["num_gpus"]

    @property
    def may_go_alone(self) -> bool:
        """Return True if one actor alone may do the fine-tuning."""
        return bool(self._run.config.fine_tuning.epochs) and self.record.get("num_workers", 1) == 1

    def num_workers(self, *, num_teachers: int) -> int:
        """Return the number of workers of fine-tuning, as set or decided once by the time one would take. Report it.

        Args:
            num_teachers: number of minima that fine-tuning learns from.
        """
        self._decide("num_workers", lambda: self._workers(num_teachers))
        num = self.record["num_workers"]
        if (alone_s := self.record.get("alone_s")) is not None:
            most = self.record["most_workers"]
            text = f"fine_tuning.num_workers=auto: {num} of at most {most}; alone it is some {alone_s:.2g} s of work, "
            self._run.tell(Note(f"{text}Ray Train takes some {TRAIN_START_S:g} s to start several"))
        return num

    def _workers(self, num_teachers: int) -> dict[str, Any]:
        run, epochs, most = self._run, self._run.config.fine_tuning.epochs, self.record["most_workers"]
        num_train, share = len(run.full_set.train), self._plan.forward_share
        costs = [work.cost for work in run.ledger.read() if work.outcome == "done" and work.cost.num_backward]
        rates = [cost.passes(num_train, share) / cost.device_s for cost in costs if cost.device_s > 0]
        if not rates:
            return {"num_workers": most}
        measuring = Cost(num_forward=len(run.full_set.validation)).passes(num_train, share)
        passes = epochs * (1 + measuring) + taught_passes(epochs, num_teachers, share)
        alone_s = passes / max(rates)
        return {"num_workers": most if alone_s * (1 - 1 / most) > TRAIN_START_S else 1, "alone_s": alone_s}

    @property
    def shares(self) -> list[float] | None:
        """Relative sizes of the subsets, by subset id; None if all subsets have the same size."""
        return self.record.get("shares")

    @property
    def slots(self) -> list[Slot]:
        """The slots that the subsets are sized for; empty if all subsets have the same size."""
        return [Slot(**record) for record in self.record.get("slots", [])]

    def decide_sizes(self) -> None:
        """Weigh or measure the nodes' speeds, unless that is decided already."""
        self._decide("slots", self._sizes)

    def _sizes(self) -> dict[str, Any]:
        num = len(self._plan.subsets)
        text = f"sizes of {num} subsets by the speed of the nodes, {self._run.config.subsets.shares}"
        self._run.tell(stage_event("measuring", text))
        slots = decide_slots(self._run, self._plan.subsets[0].indices, num_gpus=self.num_gpus, num_subsets=num)
        return {"slots": [asdict(slot) for slot in slots], "shares": shares(slots, num)}

    def per_actor(self, pool: ActorPool, pieces: Sequence[Piece]) -> int:
        """Return how many subsets an actor takes at once: the number set, if measuring once shows it to be faster."""
        num_wanted = self._run.config.subsets.per_actor
        if num_wanted == 1:
            return 1
        self._decide("packing", lambda: {"packing": packing_decision(self._run, pool, pieces)})
        decision = self.record["packing"]
        self._run.tell(Note(packing_note(decision)))
        return num_wanted if decision["taken"] else 1

    def _first(self) -> dict[str, Any]:
        config = self._run.config
        num_gpus = num_gpus_of(config.actors, self._run.tell)
        request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
        num_workers = config.fine_tuning.workers(auto=most_tuners(config, self._plan, request, startable=True))
        if config.data.streamed and config.fine_tuning.epochs and config.method == "subset_pretraining":
            refuse_without_readers(config, "fine_tuning", num_workers=num_workers)  # now, rather than after the subsets
        name = "most_workers" if config.fine_tuning.num_workers == "auto" else "num_workers"
        return {"num_gpus": num_gpus, name: num_workers}
