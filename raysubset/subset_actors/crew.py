"""Crew: the actors of a pool, requested while there is work and room for them, and handed back otherwise."""

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
    describe,
    free_resources,
    num_slots,
    preferably_on,
    refuse_unplaceable,
    workplace,
)
from raysubset.errors import counted
from raysubset.events import Note, Waiting
from raysubset.pulse import Watch
from raysubset.subset_actors.actor import SubsetActor
from raysubset.subset_actors.packs import Pack
from raysubset.work import Report, Run

FEW = 4  # actors requested beyond the cluster's capacity: new nodes get one at once, and autoscalers see demand
MOST_UNPLACED = 128  # actors requested at a time, until more than that are up: each costs the driver 3 ms of CPU time
START_S = 5.0  # that an actor takes to come up, beside the time it waits for a place
MOST_START_S = 900.0  # an actor that has not come up is replaced: it may be stuck, or still wait for a place
FIRST_BACKOFF_S, MOST_BACKOFF_S = 1.0, 30.0  # the pause before a new attempt, doubled with each failure
PROCESS_BYTES = 500_000_000  # about the size of a CUDA context and torch's libraries on a card, for each process


class SubsetFailed(RuntimeError):
    """A piece of work has failed for good; the message names it, its node and the cause."""


@dataclass(eq=False)
class Slot:
    """One actor, and its current work."""

    actor: Any
    place_ref: ray.ObjectRef
    requested_at: float
    preferred: int | None  # the index of the preferred node that it was requested on
    place: Mapping[str, Any] = field(default_factory=dict)  # SubsetActor.place(), once it is up
    speed: float | None = None  # of its node, if it is known and matters
    result_ref: Any = None  # of the work that it does now
    pack: Pack = field(default_factory=lambda: Pack(()))  # the current or last one
    attempts: Sequence[int] = ()  # of its pieces
    submitted_at: float = 0.0
    report_ref: ray.ObjectRef | None = None
    report_requested_at: float = 0.0
    reports: Mapping[int, Report] = field(default_factory=dict)  # the last reports, by place in the pack
    watch: Watch = field(default_factory=lambda: Watch(math.inf))  # of its work
    is_leaving: bool = False  # it was told to write a checkpoint and stop

    @property
    def ip(self) -> str:
        return self.place.get("ip", "?")


def num_wanted(num_packs: int, *, num_up: int, num_places: int, most: int | None) -> int:
    """Return how many actors to have up or requested: one per pack, a few more than have a place, and `most` at most.

    Args:
        num_up: actors that are up.
        num_places: the cluster's capacity, including what its autoscaler may start.
    """
    places = min(num_places + FEW, num_up + max(num_up, MOST_UNPLACED))
    return min(num_packs, places, num_packs if most is None else most)


def pays(num_left: int, *, pack_s: float, num_up: int) -> bool:
    """Return whether another actor comes up before those that are up have done the packs left, as far as is known.

    Args:
        num_left: packs that are queued, wait for others, or come in later rounds.
        pack_s: what a pack has taken at least: the last one done, or one in hand. As it grows with those in hand, work
            that turns out to be long waits for START_S at most.
    """
    return num_up == 0 or num_left * pack_s >= START_S * num_up


def memory_warning(actor_bytes: int, card_bytes: int, *, num_gpus: float, most_actors: int) -> str | None:
    """Return a warning, with figures and the way out, if a card's actors seem to need more memory than it has.

    Args:
        actor_bytes: of an actor's tensors (minimizing_bytes()).
        card_bytes: of one card.
        num_gpus: of an actor; several share a card if it is half or less.
        most_actors: at a time, on the whole cluster.
    """
    num = min(int(1 / min(num_gpus, 1.0) + 1e-9), most_actors)
    sizes = num * (actor_bytes + PROCESS_BYTES), card_bytes, actor_bytes, PROCESS_BYTES
    if sizes[0] <= card_bytes:
        return None
    needed, there, tensors, own = (f"{num_bytes / 1e9:.2f} GB" for num_bytes in sizes)
    actors = f"{counted(num, 'actor')} of {num_gpus:g} GPU {'need' if num > 1 else 'needs'}"
    return (
        f"{actors} an estimated {needed} of a card's {there} ({tensors} of examples, "
        f"weights and activations each, and {own} of CUDA's own): give a smaller minimize.batch_size, smaller subsets, "
        "or if several share a card a larger actors.num_gpus"
    )


class Crew:
    """The actors that are requested, idle and at work. Ray places as many as fit now and the others as room appears."""

    def __init__(
        self,
        run: Run,
        *,
        num_gpus: float,
        speed_of_node: Callable[[str], float | None] | None = None,
        preferred_nodes: Sequence[str] = (),
        actor_bytes: int | None = None,
    ) -> None:
        """Hold no actors yet.

        Args:
            speed_of_node: by node id; None: pieces are given out in order.
            preferred_nodes: ids of nodes, each as often as it should have an actor while there is room.
            actor_bytes: estimated size of an actor's tensors on its card; None: not checked.

        Raises:
            ValueError: if no node has, or could be started with, room for one actor.
        """
        self._run, self._config, self._num_gpus, self._tell = run, run.config, num_gpus, run.tell
        self._speed_of_node, self._preferred_nodes, self._actor_bytes = speed_of_node, preferred_nodes, actor_bytes
        self.request = {"CPU": run.config.actors.num_cpus, "GPU": num_gpus}
        refuse_unplaceable(self.request, "subset actors")
        # The pool retries. Ray's own retries would be spent in the seconds before it notices that a node has died
        options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2}
        resources = {"num_cpus": run.config.actors.num_cpus, "num_gpus": num_gpus}
        self._actor_class: Any = ray.remote(**options, **resources)(SubsetActor)  # pyright: ignore[reportArgumentType]
        self._workplace = workplace()
        self.unplaced: dict[ray.ObjectRef, Slot] = {}  # by place_ref
        self.idle: list[Slot] = []
        self.busy: dict[ray.ObjectRef, Slot] = {}  # by the reference of their result
        self._num_places, self._counted_at = 0, -math.inf
        self._num_failed_starts = 0  # since an actor last came up; failures of actors requested together count as one
        self._start_after = -math.inf
        self.begin()

    @property
    def num_up(self) -> int:
        return len(self.idle) + len(self.busy)

    @property
    def slots(self) -> list[Slot]:
        """All actors, up or not."""
        return [*self.unplaced.values(), *self.idle, *self.busy.values()]

    def begin(self) -> None:
        """Start measuring the time without any actor, and allow notices of waiting again."""
        self._idle_since = self._noticed_at = time.monotonic()
        self._pack_s = 0.0  # that the last pack took
        self._noticed_nums_up: set[int] = set()  # numbers of actors up at which waiting was reported

    def ask(self, num_queued: int, *, keep: float, num_later: int = 0) -> None:
        """Request num_wanted() actors for the packs given out and queued; hand back others, unplaced ones first.

        Args:
            keep: so many idle actors stay.
            num_later: packs that will be queued later, as far as is known: actors that are starting stay for them.
        """
        num_packs = len(self.busy) + num_queued
        if num_packs > self.num_up and (now := time.monotonic()) - self._counted_at >= WAIT_NOTICE_S:
            self._num_places, self._counted_at = num_slots(self.request, startable=True), now
        most, slots = self._config.actors.max_num, self.slots
        wanted = num_wanted(num_packs, num_up=self.num_up, num_places=self._num_places, most=most)
        pack_s = max((self._pack_s, *(time.time() - slot.submitted_at for slot in self.busy.values())))
        if not pays(num_queued + num_later, pack_s=pack_s, num_up=self.num_up):
            wanted = min(wanted, len(slots))
        if wanted > len(slots) and time.monotonic() >= self._start_after:
            used = {slot.preferred for slot in slots}
            free = [index for index in range(len(self._preferred_nodes)) if index not in used]
            for _ in range(wanted - len(slots)):
                self._start(free.pop(0) if free else None)
        elif wanted < len(slots):
            last_first = list(self.unplaced.values())[::-1]  # one that starts would leave its place to the next
            spare = [*([] if num_later else last_first), *self.idle[int(min(keep, len(self.idle))) :]]
            for slot in spare[: len(slots) - wanted]:
                self.release(slot)

    def _start(self, preferred: int | None) -> None:
        strategy = OUTSIDE_GROUPS if preferred is None else preferably_on(self._preferred_nodes[preferred])
        actor_class = self._actor_class.options(scheduling_strategy=strategy)
        actor = actor_class.remote(self._run.full_set_ref, self._num_gpus, self._workplace)
        slot = Slot(actor, actor.place.remote(), time.monotonic(), preferred)
        self.unplaced[slot.place_ref] = slot

    def welcome(self, slot: Slot) -> None:
        """Add an actor that came up to the idle ones. One that could not is released, and the next ask() replaces it.

        Raises:
            SubsetFailed: if actors.max_attempts have failed in a row.
        """
        try:
            slot.place = ray.get(slot.place_ref)
        except SYSTEM_ERRORS as error:
            self.release(slot)
            if slot.requested_at >= self._start_after:
                self._start_after = time.monotonic() + backoff_s(self._num_failed_starts)
                self._num_failed_starts += 1
            if self._num_failed_starts >= self._config.actors.max_attempts:
                cause = str(error).strip().splitlines()[-1]  # the cause stands in the last line, after Ray's own words
                raise SubsetFailed(f"actors do not come up: {cause}") from error
            return
        del self.unplaced[slot.place_ref]
        self.idle.append(slot)
        self._num_failed_starts = 0
        slot.speed = self._speed_of_node(slot.place["node"]) if self._speed_of_node else None
        self._warn_of_memory(slot.place)

    def _warn_of_memory(self, place: Mapping[str, Any]) -> None:
        """Warn once if the actors that may share one of a node's cards are unlikely to fit."""
        if self._actor_bytes is None or place["card_bytes"] is None:
            return
        numbers = {"num_gpus": self._num_gpus, "most_actors": len(self.slots)}
        if warning := memory_warning(self._actor_bytes, place["card_bytes"], **numbers):
            self._actor_bytes = None
            self._tell(Note(f"node {place['ip']}: {warning}", is_warning=True))

    def release_stuck(self) -> None:
        """Release actors that have not come up for MOST_START_S."""
        now = time.monotonic()
        for slot in list(self.unplaced.values()):
            if now - slot.requested_at > MOST_START_S:
                self.release(slot)

    def set_busy(self, slot: Slot, result_ref: ray.ObjectRef) -> None:
        """Record the result that an idle actor works for."""
        self.idle.remove(slot)
        slot.result_ref, self.busy[result_ref] = result_ref, slot

    def set_idle(self, slot: Slot) -> None:
        """Record that an actor has done its work, and may do more."""
        del self.busy[slot.result_ref]
        self._pack_s = time.time() - slot.submitted_at
        slot.result_ref = slot.report_ref = None
        self.idle.append(slot)

    def release(self, slot: Slot) -> None:
        """Kill an actor."""
        ray.kill(slot.actor)
        self.unplaced.pop(slot.place_ref, None)
        self.busy.pop(slot.result_ref, None)
        if slot in self.idle:
            self.idle.remove(slot)

    def release_all(self) -> None:
        """Kill all actors."""
        for slot in self.slots:
            self.release(slot)

    def tell_of_waiting(self, num_queued: int) -> None:
        """Report every few seconds what the run waits for, while no requested actor has a place.

        While some have one, work proceeds. That others wait is then reported once, and only if the cluster may have
        room for them.

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
        num, request = len(self.unplaced), describe(self.request)
        waiting = f"{num} actors of {request} each wait" if num > 1 else f"an actor of {request} waits"
        waiting += " to start, or for a place"
        free = free_resources(self.request)
        if (waited_s := now - self._idle_since) > self._config.cluster.wait_timeout_s:
            raise TimeoutError(f"{waiting}, for {waited_s:.0f} s now (cluster.wait_timeout_s); {free}")
        if num_up:
            if num_up in self._noticed_nums_up or num_up >= self._num_places:
                return
            self._noticed_nums_up.add(num_up)
        self._tell(Waiting(f"{waiting}; work not begun: {num_queued}, actors up: {num_up}, {free}"))


def backoff_s(num_before: int) -> float:
    """Return the pause in seconds after a failure with so many failures before it."""
    return min(FIRST_BACKOFF_S * 2 ** max(0, num_before), MOST_BACKOFF_S)
