"""How many actors a pool asks for."""

import math
from typing import Any

import pytest

from raysubset.config import Config
from raysubset.subset_actors.crew import FEW, MOST_UNPLACED, START_S, Crew, Slot, num_wanted, pays


@pytest.mark.parametrize(
    ("num_packs", "num_up", "num_places", "most", "wanted"),
    [
        (3, 0, 1000, None, 3),  # one a pack
        (10_000, 0, 4, None, 4 + FEW),  # a cluster of four places, empty
        (10_000, 4, 4, None, 4 + FEW),  # and full: no more wait for a place
        (10_000, 0, 100, None, 100 + FEW),  # what an autoscaler may start is asked for at once
        (10_000, 0, 1_000_000, None, MOST_UNPLACED),  # and by doubling where nobody knows what that is
        (10_000, 300, 1_000_000, None, 600),
        (10_000, 300, 400, None, 400 + FEW),
        (10_000, 0, 100, 8, 8),  # actors.max_num
        (0, 4, 4, None, 0),
    ],
)
def test_there_is_an_actor_for_each_pack_a_few_more_than_have_a_place_and_no_more_than_are_allowed(
    num_packs: int, num_up: int, num_places: int, most: int | None, wanted: int
) -> None:
    assert num_wanted(num_packs, num_up=num_up, num_places=num_places, most=most) == wanted


@pytest.mark.parametrize(
    ("num_left", "pack_s", "num_up", "is_worth_it"),
    [
        (1, 0.0, 0, True),  # nobody else would do it
        (3, 0.5, 1, False),  # done before another actor is up
        (3, 0.0, 1, False),  # not known yet; but soon:
        (3, START_S / 3, 1, True),
        (3, START_S / 3, 2, False),
        (1, START_S, 1, True),  # at the latest after the time that was saved
        (10_000, 0.01, 4, True),
    ],
)
def test_an_actor_is_asked_for_beside_others_once_their_work_lasts_longer_than_its_start(
    num_left: int, pack_s: float, num_up: int, is_worth_it: bool
) -> None:
    assert pays(num_left, pack_s=pack_s, num_up=num_up) == is_worth_it


class _Crew(Crew):
    """A crew whose actors are only counted: two have a place."""

    def __init__(self, *, num_up: int, pack_s: float) -> None:
        self._config, self._preferred_nodes = Config(), ()
        self._num_places, self._counted_at, self._start_after, self._pack_s = 2, math.inf, -math.inf, pack_s
        self.idle, self.busy = [Slot(None, Any, 0.0, None) for _ in range(num_up)], {}
        self.unplaced = {}

    def _start(self, preferred: int | None) -> None:
        self.unplaced[len(self.unplaced)] = Slot(None, Any, 0.0, preferred)

    def release(self, slot: Slot, result_ref: Any = None) -> None:
        self.idle = [other for other in self.idle if other is not slot]
        self.unplaced = {key: other for key, other in self.unplaced.items() if other is not slot}


def test_an_actor_that_later_rounds_need_is_asked_for_and_stays_while_it_starts() -> None:
    crew = _Crew(num_up=1, pack_s=1.0)  # the other was lost
    crew.ask(2, keep=math.inf)
    assert len(crew.slots) == 1  # two seconds of work, and nothing after them
    crew.ask(2, keep=math.inf, num_later=10)
    assert (len(crew.idle), len(crew.unplaced)) == (1, 1)
    crew.ask(0, keep=math.inf, num_later=10)  # the round ends first
    crew.ask(1, keep=math.inf, num_later=10)  # and is aggregated
    assert (len(crew.idle), len(crew.unplaced)) == (1, 1)
    crew.ask(1, keep=1.0)  # the last one
    assert (len(crew.idle), len(crew.unplaced)) == (1, 0)
