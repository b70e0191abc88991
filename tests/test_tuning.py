"""An arm's grid of learning rates grows while its best rate is at an edge; training is played by closed forms."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import pytest

from raysubset.comparison.arms import Arm, Settings, parse_arm
from raysubset.comparison.checks import takes
from raysubset.comparison.tuning import Losses, best_of, beyond, in_words, is_at_edge, search
from raysubset.config import Config

GRID = [Settings(rate, 64) for rate in (0.03, 0.1, 0.3)]
B, G = parse_arm("B"), parse_arm("G")


def played(optima: Mapping[Arm, float], asked: list[dict[Arm, Sequence[Settings]]]):
    """Training whose loss is the distance of the rate's logarithm from an arm's optimum; above 30 it diverges."""

    def losses_of(grids: Mapping[Arm, Sequence[Settings]]) -> Losses:
        asked.append(dict(grids))
        return {
            arm: {
                s: math.inf
                if s.learning_rate > 30
                else abs(math.log(s.learning_rate / optima[arm])) + 64 / s.batch_size
                for s in grid
            }
            for arm, grid in grids.items()
        }

    return losses_of


def at_the_edge(losses: Mapping[Settings, float]) -> bool:
    return is_at_edge(best_of(losses), losses, lambda setting: True)


@pytest.mark.parametrize(
    ("optimum", "best", "is_at_edge"),
    [(0.1, 0.1, False), (1.0, 0.9, False), (0.01, 0.009, False), (20.0, 8.1, True), (1e-6, 0.00081, True)],
)
def test_the_grid_grows_until_its_best_rate_is_within_or_three_rates_are_tried(optimum, best, is_at_edge):
    asked: list[dict[Arm, Sequence[Settings]]] = []
    losses = search({B: GRID, G: GRID}, played({B: optimum, G: 0.1}, asked), most_beyond=3)
    assert best_of(losses[B]).learning_rate == pytest.approx(best)
    assert at_the_edge(losses[B]) == is_at_edge
    assert set(losses[G]) == set(GRID)  # an arm whose best rate is within tries no more
    assert all(sum(map(len, grids.values())) == 1 for grids in asked[1:])


def test_a_given_grid_does_not_grow():
    losses = search({B: GRID}, played({B: 1.0}, []), most_beyond=0)
    assert set(losses[B]) == set(GRID)
    assert at_the_edge(losses[B])
    assert in_words(B, losses[B], at_edge=True) == "B: learning rate 0.3, at the edge of the grid, batch 64"


def test_rates_beyond_are_of_the_best_batch_size():
    grid = [Settings(rate, size) for size in (32, 64) for rate in (0.1, 0.3)]
    losses = search({B: grid}, played({B: 0.5}, []), most_beyond=3)
    assert {setting for setting in losses[B] if setting not in grid} == {Settings(0.9, 64)}
    assert beyond(Settings(0.1, 32), [Settings(0.1, 32), Settings(0.1, 64), Settings(0.3, 64)]) is None  # of one rate


def test_an_arm_that_diverges_everywhere_tries_lower_rates():
    grid = [Settings(rate, 64) for rate in (100.0, 300.0)]
    losses = search({B: grid}, played({B: 0.1}, []), most_beyond=3)
    assert best_of(losses[B]).learning_rate == pytest.approx(3.7037)
    assert (
        in_words(B, {setting: math.inf for setting in grid}, at_edge=True)
        == "B diverged or failed at every learning rate of the grid"
    )


@pytest.mark.parametrize(("rate", "at_edge"), [(1.0, False), (0.5, True), (0.1, True)])
def test_a_rate_is_at_an_edge_only_if_the_arms_own_optimizer_takes_rates_beyond_it(rate: float, at_edge: bool):
    arm = parse_arm("B:minimize.optimizer=gauss_newton")  # at most 1: its full step
    losses = {Settings(other, 64): abs(other - rate) for other in {0.1, 0.3, rate}}
    assert is_at_edge(best_of(losses), losses, partial(takes, arm, Config())) == at_edge
    assert is_at_edge(best_of(losses), losses, partial(takes, B, Config()))


def test_an_arm_does_not_try_what_its_own_optimizer_refuses():
    grid, arm = [Settings(rate, 64) for rate in (0.3, 0.6)], parse_arm("B:minimize.optimizer=gauss_newton")
    can_try = lambda arm, setting: takes(arm, Config(), setting)  # noqa: E731
    losses = search({B: grid, arm: grid}, played({B: 5.0, arm: 5.0}, []), most_beyond=3, can_try=can_try)
    assert (max(losses[B]).learning_rate, max(losses[arm]).learning_rate) == (4.8, 0.6)
