"""Crew: the actors of a pool, asked for while there is work and room for them, and handed back when there is not."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from raysubset.cluster import (
    OUTSIDE_GROUPS,
    SYSTEM_ERRORS,
    WAIT_NOTICE_S,
    autoscaler_activity,
    describe,
    free_resources,
    num_slots,
    preferably_on,
    refuse_unplaceable,
    workplace,
)
from raysubset.events import Note, Waiting
from raysubset.pulse import Watch
from raysubset.subset_actors.actor import SubsetActor
from raysubset.subset_actors.cards import memory_warning
from raysubset.subset_actors.packs import Pack
from raysubset.work import Report, Run

FEW = 4  # actors asked for beyond what the cluster can hold: nodes that join get one at once, autoscalers see demand
MOST_UNPLACED = 128  # actors asked for at a time, until more than that are up: each costs the driver 3 ms of CPU time
MOST_START_S = 900.0  # an actor that has not come up is asked for anew: it may be stuck, or still wait for a place
FIRST_BACKOFF_S, MOST_BACKOFF_S = 1.0, 30.0  # before what failed is tried again: doubled with each attempt


class SubsetFailed(RuntimeError):
    """A piece of work has failed for good; the message names it, its node and the cause."""


@dataclass(eq=False)
class Slot:
    """One actor, and the work it has in hand."""

    actor: Any
    where_ref: ray.ObjectRef
    asked_for_at: float
    place: int | None  # which of the preferred nodes it was asked for on
    where: Mapping[str, Any] = field(default_factory=dict)  # SubsetActor.where(), once it is up
    speed: float | None = None  # of its node, where it is known and matters
    pack: Pack | None = None
    attempts: Sequence[int] = ()  # of its pieces
    submitted_at: float = 0.0
    report_ref: ray.ObjectRef | None = None
    asked_at: float = 0.0  # for the last report
    reports: Mapping[int, Report] = field(default_factory=dict)  # the last, by place in the pack
    watch: Watch = field(default_factory=lambda: Watch(math.inf))  # of its work
    is_leaving: bool = False  # it was asked to write a checkpoint and stop

    @property
    def ip(self) -> str:
        return self.where.get("ip", "?")


def num_wanted(num_packs: int, *, num_up: int, num_places: int, most: int | None) -> int:
    """Return how many actors to have up or asked for: one a pack, a few more than have a place, and `most` at most.

    Args:
        num_up: actors that are up.
        num_places: what the cluster holds at once, with all that its autoscaler may start.
    """
    places = min(num_places + FEW, num_up + max(num_up, MOST_UNPLACED))
    return min(num_packs, places, num_packs if most is None else most)


class Crew:
    """The actors that are asked for, idle and at work. Ray places as many as fit now and the rest as room appears."""

    def __init__(
        self,
        run: Run,
        *,
        num_gpus: float,
        speed_of_node: Callable[[str], float | None] | None,
        preferred_nodes: Sequence[str],
        actor_bytes: int | None,
    ) -> None:
        """As ActorPool() has it, with what that raises."""
        self._run, self._config, self._num_gpus, self._tell = run, run.config, num_gpus, run.tell
        self._speed_of_node, self._preferred_nodes, self._actor_bytes = speed_of_node, preferred_nodes, actor_bytes
        self._nodes_told_of: set[str] = set()
        self.request = {"CPU": run.config.actors.num_cpus, "GPU": num_gpus}
        refuse_unplaceable(self.request, "subset actors")
        # retries are the pool's: Ray's own would be spent in the seconds before it notices that a node has died
        options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2}
        resources = {"num_cpus": run.config.actors.num_cpus, "num_gpus": num_gpus}
        self._actor_class: Any = ray.remote(**options, **resources)(SubsetActor)  # pyright: ignore[reportArgumentType]
        self._workplace = workplace()
        self.unplaced: dict[ray.ObjectRef, Slot] = {}  # by where_ref
        self.idle: list[Slot] = []
        self.busy: dict[ray.ObjectRef, Slot] = {}  # by the result that they work for
        self._num_places, self._counted_at = 0, -math.inf
        self._num_failed_starts = 0  # since an actor last came up; of actors asked for together one counts
        self._start_after = -math.inf
        self.begin()

    @property
    def num_up(self) -> int:
        return len(self.idle) + len(self.busy)

    @property
    def size(self) -> int:
        """Return how many actors there are, up or not."""
        return self.num_up + len(self.unplaced)

    def begin(self) -> None:
        """Count the time without any actor from now, and say again what is waited for."""
        self._idle_since = self._noticed_at = time.monotonic()
        self._waits_told: set[int] = set()  # numbers of actors up with which it was said that others wait

    def ask(self, num_queued: int, *, keep: float) -> None:
        """Have num_wanted() actors for the packs given out and queued; hand back others, unplaced ones first.

        Of those that are idle so many are kept.
        """
        num_packs = len(self.busy) + num_queued
        if num_packs > self.num_up:
            self._count_places()
        most = self._config.actors.max_num
        wanted = num_wanted(num_packs, num_up=self.num_up, num_places=self._num_places, most=most)
        if wanted > self.size and time.monotonic() >= self._start_after:
            taken = {slot.place for slot in (*self.unplaced.values(), *self.idle, *self.busy.values())}
            free = [place for place in range(len(self._preferred_nodes)) if place not in taken]
            for _ in range(wanted - self.size):
                self._start(free.pop(0) if free else None)
        elif wanted < self.size:
            spare = [*self.unplaced.values(), *self.idle[int(min(keep, len(self.idle))) :]]
            for slot in spare[: self.size - wanted]:
                self.release(slot)

    def _count_places(self) -> None:
        if (now := time.monotonic()) - self._counted_at >= WAIT_NOTICE_S:
            self._num_places, self._counted_at = num_slots(self.request, startable=True), now

    def _start(self, place: int | None) -> None:
        strategy = OUTSIDE_GROUPS if place is None else preferably_on(self._preferred_nodes[place])
        actor_class = self._actor_class.options(scheduling_strategy=strategy)
        actor = actor_class.remote(self._run.full_set_ref, self._num_gpus, self._workplace)
        slot = Slot(actor, actor.where.remote(), time.monotonic(), place)
        self.unplaced[slot.where_ref] = slot

    def welcome(self, slot: Slot) -> None:
        """Note where an actor came up. One that could not is given up, and the next ask() replaces it.

        Raises:
            SubsetFailed: if actors.max_attempts have failed in a row.
        """
        try:
            slot.where = ray.get(slot.where_ref)
        except SYSTEM_ERRORS as error:
            self.release(slot)
            if slot.asked_for_at >= self._start_after:
                self._start_after = time.monotonic() + backoff_s(self._num_failed_starts)
                self._num_failed_starts += 1
            if self._num_failed_starts >= self._config.actors.max_attempts:
                cause = str(error).strip().splitlines()[-1]  # Ray's own words come first
                raise SubsetFailed(f"actors do not come up: {cause}") from error
            return
        del self.unplaced[slot.where_ref]
        self.idle.append(slot)
        self._num_failed_starts = 0
        slot.speed = self._speed_of_node(slot.where["node"]) if self._speed_of_node else None
        self._warn_of_memory(slot.where)

    def _warn_of_memory(self, where: Mapping[str, Any]) -> None:
        """Say once a node if the actors that may share one of its cards are not likely to fit."""
        if self._actor_bytes is None or where["card_bytes"] is None or where["node"] in self._nodes_told_of:
            return
        warning = memory_warning(self._actor_bytes, where["card_bytes"], num_gpus=self._num_gpus, most_actors=self.size)
        if warning:
            self._nodes_told_of.add(where["node"])
            self._tell(Note(f"node {where['ip']}: {warning}", is_warning=True))

    def release_stuck(self) -> None:
        """Give up actors that have not come up for MOST_START_S."""
        now = time.monotonic()
        for slot in list(self.unplaced.values()):
            if now - slot.asked_for_at > MOST_START_S:
                self.release(slot)

    def set_busy(self, slot: Slot, result_ref: ray.ObjectRef) -> None:
        """Note what an idle actor works for."""
        self.idle.remove(slot)
        self.busy[result_ref] = slot

    def set_idle(self, slot: Slot, result_ref: ray.ObjectRef) -> None:
        """Note that an actor has done its work, and may do more."""
        del self.busy[result_ref]
        slot.pack = slot.report_ref = None
        self.idle.append(slot)

    def release(self, slot: Slot, result_ref: ray.ObjectRef | None = None) -> None:
        """Kill an actor; of a busy one, with the result that it works for."""
        ray.kill(slot.actor)
        self.unplaced.pop(slot.where_ref, None)
        if result_ref is not None:
            del self.busy[result_ref]
        elif slot in self.idle:
            self.idle.remove(slot)

    def release_all(self) -> None:
        """Kill all actors."""
        for slot in (*self.unplaced.values(), *self.idle):
            self.release(slot)
        for result_ref, slot in list(self.busy.items()):
            self.release(slot, result_ref)

    def tell_of_waiting(self, num_queued: int) -> None:
        """Say every few seconds what is waited for, while no actor that was asked for has a place.

        While some have one, work goes on: it is said once that others wait, and only if they may ever find one beside.

        Raises:
            TimeoutError: if none has had a place for cluster.wait_timeout_s.
        """
        now, num_up = time.monotonic(), self.num_up
        if num_up:
            self._idle_since = now
        if not num_queued or not self.unplaced:
            self._noticed_at = now
        if now - self._noticed_at < WAIT_NOTICE_S:
            return
        self._noticed_at = now
        num_down, each = len(self.unplaced), describe(self.request)
        waiting = f"{num_down} actors of {each} each wait" if num_down > 1 else f"an actor of {each} waits"
        waiting += " for a place"
        free = f"free are {free_resources(self.request)}{autoscaler_activity()}"
        if (waited_s := now - self._idle_since) > self._config.cluster.wait_timeout_s:
            raise TimeoutError(f"{waiting}, for {waited_s:.0f} s now (cluster.wait_timeout_s); {free}")
        if num_up:
            if num_up in self._waits_told or num_up >= self._num_places:
                return
            self._waits_told.add(num_up)
        self._tell(Waiting(f"{waiting}; work not begun: {num_queued}, actors up: {num_up}, {free}"))


def backoff_s(num_before: int) -> float:
    """Return how long to wait after a failure that had so many before it."""
    return min(FIRST_BACKOFF_S * 2 ** max(0, num_before), MOST_BACKOFF_S)
