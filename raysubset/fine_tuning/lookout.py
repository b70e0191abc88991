"""TrainLookout watches a Ray Train job from the driver, once a second."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import ray

from raysubset.cluster import (
    ASK_FOR_LESS,
    STOP_GRACE_S,
    WAIT_NOTICE_S,
    Process,
    describe,
    draining_nodes,
    forget,
    free_resources,
    groups_of,
    kill_processes,
    node_types,
    offers,
    processes_at,
    remove_groups,
    request_stop,
)
from raysubset.events import Attempt, Note, OnEvent, Retry, Waiting
from raysubset.fine_tuning.job import Job, pulse_key
from raysubset.pulse import Pulse, Watch

MOST_START_S = 900.0  # for workers with a place to begin: their processes start and read the full set
_ELASTIC_S = 60.0  # an elastic controller that asks for no workers for so long finds no places


class NodeLeaves(Exception):
    """Workers have left a node that will go soon, with a checkpoint."""


class TrainLookout:
    """Reports progress, waiting for places and missing steps; kills workers that stall, frees places that none uses.

    Ray Train then tries again from the last checkpoint, and counts a failure. If a worker's node is about to go, the
    first worker writes a checkpoint, and the job starts anew elsewhere, which is no failure.
    """

    def __init__(self, job: Job, *, is_elastic: bool, tell: OnEvent) -> None:
        self._is_elastic = is_elastic
        self._piece, self._tell = job.piece, tell
        self._request = {"CPU": job.piece.config.actors.num_cpus, "GPU": job.num_gpus}
        self.key = uuid.uuid4().hex  # of the workers' pulses
        self.stalled = ""  # why workers were last killed
        self.begin()

    def begin(self) -> None:
        """Forget the observations of an earlier controller and its workers."""
        self._starting_at = self._pulse_at = self._placed_at = self._notice_at = time.monotonic()
        self._watch = Watch(self._piece.config.actors.stall_s)

    def look(self, controller: Any) -> None:
        """Check the job once: report its progress or what it waits for, and kill workers that stall.

        Raises:
            TimeoutError: if the workers have had no place for cluster.wait_timeout_s.
            NodeLeaves: when a checkpoint was written because a worker's node is draining.
            Exception: whatever `tell` raises, for example because another driver has taken the run over.
        """
        groups = groups_of(controller)
        remove_groups(list(groups)[:-1])  # Ray Train forgets a group if a worker is lost as its callbacks start
        processes = {
            rank: process for rank, process in processes_at(self.key).items() if groups.get(process.group) == "CREATED"
        }
        workers = list(processes.values())
        now = time.monotonic()
        is_without_request = self._is_elastic and now - self._pulse_at > _ELASTIC_S
        if "CREATED" not in groups.values() and (groups or is_without_request):
            self._starting_at = now
            self._wait_for_places(now)
            return
        self._placed_at = now
        if workers:
            self._starting_at = self._pulse_at = now
            self._watch_steps(workers)
            for rank, process in processes.items():
                self._tell_progress(int(rank.strip("/")), process)
            if (leaving := {worker.node_id for worker in workers} & draining_nodes()) and "/00000" in processes:
                self.stop(preempted=True)
                nodes = ", ".join(sorted({worker.node for worker in workers if worker.node_id in leaving}))
                raise NodeLeaves(f"node {nodes} will go")
        elif now - self._starting_at > MOST_START_S:
            ray.kill(controller)  # fit() reports it

    def stop(self, *, preempted: bool = False) -> None:
        """Let the first worker, whose weights are all workers', write a checkpoint and return."""
        request_stop(pulse_key(self.key, 0), timeout_s=STOP_GRACE_S, preempted=preempted)

    def _watch_steps(self, workers: Sequence[Process]) -> None:
        """Warn if no worker has made a step for too long, and kill them after as long again."""
        usual = max((worker.pulse.usual_s for worker in workers if worker.pulse.usual_s is not None), default=None)
        num_beats, watch = sum(worker.pulse.num_beats for worker in workers), self._watch
        watch.hear(Pulse(num_beats, usual), frozenset(worker.pid for worker in workers))
        stage, nodes = self._piece.stage, ", ".join(sorted({worker.node for worker in workers}))
        match watch.look():
            case "stalled":
                limit_text = f"killed in {watch.limit_s:.0f} s unless it makes one (--actors.stall-s)"
                text = f"{stage} stands still on {nodes}: {watch.in_words()}; {limit_text}"
                self._tell(Note(text, is_warning=True))
            case "lost":
                self.stalled = f"{watch.in_words()} by workers on {nodes}: killed (actors.stall_s)"
                self._tell(Retry(f"{stage}: {self.stalled}; it starts from its last checkpoint"))
                kill_processes((worker.node_id, worker.pid) for worker in workers)
                forget(self.key)
                self.begin()

    def _tell_progress(self, rank: int, process: Process) -> None:
        """Report a worker's position within the epoch, once it has made a step."""
        names = self._piece.directory.name, self._piece.label
        attempt = Attempt(self._piece.stage, 0, None, 0, process.node_id, process.node, process.pid, *names)
        for report in process.reports.values():
            self._tell(report.event(attempt, worker=rank, measured=process.pulse.measured))

    def _wait_for_places(self, now: float) -> None:
        if now - self._notice_at < WAIT_NOTICE_S or now - self._placed_at < WAIT_NOTICE_S:
            return
        self._notice_at, waited_s = now, now - self._placed_at
        waiting = f"{self._piece.stage}: {self._piece.num_workers} × {describe(self._request)} wait for a place"
        if waited_s > self._piece.config.cluster.wait_timeout_s:
            raise TimeoutError(
                f"{waiting}, for {waited_s:.0f} s now (cluster.wait_timeout_s); the cluster has "
                f"{offers(node_types())}. {ASK_FOR_LESS}, or run the same command when it has more"
            )
        self._tell(Waiting(f"{waiting}; {free_resources(self._request)}"))
