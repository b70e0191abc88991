"""What depends on the cluster or is measured: decided once, written down, and kept when the run goes on elsewhere."""

from collections.abc import Sequence
from typing import Any

from raysubset.cluster import num_gpus_of, num_slots, offered, refuse_unplaceable
from raysubset.config import Config
from raysubset.events import Note
from raysubset.node_speeds import Slot, decide_slots, shares
from raysubset.planning import Plan
from raysubset.run_directory import DECISIONS_PATH, RunDirectory, aggregate_path, minimum_path
from raysubset.streaming import most_workers, refuse_without_readers
from raysubset.subset_actors import ActorPool, packing_decision, packing_note
from raysubset.work import Piece, Run


def refuse_what_has_no_place(config: Config, directory: RunDirectory | None) -> None:
    """Stop before the first stage, and before a new cluster is started, if a stage that is left can never be placed.

    Args:
        directory: of the run, whose finished stages ask for nothing; None where nothing is done.

    Raises:
        ValueError: with the request, what there is, and the way out.
    """
    types = offered(config.cluster)
    record = directory.read_json_or_none(DECISIONS_PATH) if directory is not None else None
    num_gpus = record["num_gpus"] if record else num_gpus_of(config.actors, lambda event: None, types=types)
    request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
    for stage, num in workers_of_stages(config).items():
        done = aggregate_path(config.rounds.num - 1) if stage == "subsets" else minimum_path(stage)
        if directory is None or not directory.exists(done):
            what = "subset actors" if stage == "subsets" else f"{stage} workers"
            refuse_unplaceable(request, what, num=num, types=types)


def workers_of_stages(config: Config) -> dict[str, int]:
    """The actors or Ray Train workers that each stage must have at once; any number of actors minimizes on subsets."""
    if config.method == "conventional":
        return {"conventional": config.conventional.num_workers}
    tuning, workers = config.fine_tuning, {"subsets": 1}
    if config.trunk.epochs:
        workers["trunk"] = config.trunk.num_workers
    if tuning.epochs:
        workers["fine_tuning"] = tuning.min_workers or tuning.num_workers or 1
    return workers


class Decisions:
    """decisions.json of a run directory."""

    def __init__(self, run: Run, plan: Plan) -> None:
        """Read back what was decided, or decide on GPUs and workers by what the cluster has or can start.

        Raises:
            ValueError: if streamed examples could not be read beside so many Ray Train workers.
        """
        self._run = run
        decided = run.directory.read_json_or_none(DECISIONS_PATH)
        self._record: dict[str, Any] = self._first(plan) if decided is None else decided
        if decided is None:
            self._write()

    @property
    def num_gpus(self) -> float:
        """Of an actor, and of a Ray Train worker."""
        return self._record["num_gpus"]

    @property
    def num_workers(self) -> int:
        """Of fine-tuning."""
        return self._record["num_workers"]

    @property
    def shares(self) -> list[float] | None:
        """Sizes of the subsets against one another, by subset id; None where all are equal."""
        return self._record.get("shares")

    @property
    def slots(self) -> list[Slot]:
        """What the subsets are sized for; none where all are equal."""
        return [Slot.from_dict(record) for record in self._record.get("slots", [])]

    def to_dict(self) -> dict[str, Any]:
        """decisions.json."""
        return dict(self._record)

    def decide_sizes(self, plan: Plan) -> None:
        """Weigh or measure the nodes' speeds, unless that is done."""
        if "slots" in self._record:
            return
        run, num_subsets = self._run, len(plan.subsets)
        slots = decide_slots(
            run.config,
            run.full_set_ref,
            plan.subsets[0].indices,
            num_gpus=self.num_gpus,
            num_subsets=num_subsets,
            ledger=run.ledger,
            tell=run.tell,
        )
        self._record |= {"slots": [slot.to_dict() for slot in slots], "shares": shares(slots, num_subsets)}
        self._write()

    def per_actor(self, pool: ActorPool, pieces: Sequence[Piece]) -> int:
        """Subsets that an actor takes at once: as many as asked for if that is faster, which is measured once."""
        asked = self._run.config.subsets.per_actor
        if asked == 1:
            return 1
        if (decision := self._record.get("packing")) is None:
            decision = self._record["packing"] = packing_decision(self._run, pool, pieces)
            self._write()
        self._run.tell(Note(packing_note(decision)))
        return asked if decision["taken"] else 1

    def _first(self, plan: Plan) -> dict[str, Any]:
        config = self._run.config
        num_gpus = num_gpus_of(config.actors, self._run.tell)
        num_workers = config.fine_tuning.num_workers
        if num_workers is None:
            request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
            num_workers = min(num_slots(request, startable=True), len(plan.subsets), plan.most_workers)
            if config.data.streamed:
                num_workers = min(num_workers, most_workers(config.actors.num_cpus))
            num_workers = max(1, num_workers)
        if config.data.streamed and config.fine_tuning.epochs and config.method == "subset_pretraining":
            refuse_without_readers(config, "fine_tuning", num_workers=num_workers)  # now, not after the subsets
        return {"num_gpus": num_gpus, "num_workers": num_workers}

    def _write(self) -> None:
        self._run.directory.write_json(DECISIONS_PATH, self._record)
