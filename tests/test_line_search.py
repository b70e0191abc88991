"""Line searches: the strong Wolfe conditions on functions made to be hard, and scipy's search beside ours."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import line_search

from raysubset.training.whole_subset.conjugate_gradient import SUFFICIENT_DECREASE, Trial, strong_wolfe


class Line:
    """A function and its derivative, with the steps it was asked for."""

    def __init__(self, loss: Callable[[float], float], slope: Callable[[float], float]) -> None:
        self.loss, self.slope = loss, slope
        self.steps: list[float] = []

    def __call__(self, step: float) -> Trial:
        self.steps.append(step)
        return self.at(step)

    def at(self, step: float) -> Trial:
        return Trial(step, self.loss(step), self.slope(step), torch.zeros(1))

    def search(self, *, first_step: float, curvature: float = 0.1, **options) -> Trial:
        return strong_wolfe(self, self.at(0.0), first_step=first_step, curvature=curvature, **options)


LINES = {
    "parabola": Line(lambda t: (t - 3) ** 2, lambda t: 2 * (t - 3)),
    "flat at the minimum": Line(lambda t: (t - 2) ** 4, lambda t: 4 * (t - 2) ** 3),
    # Moré & Thuente 1994 (5.1) and (5.2), with their β
    "concave at first": Line(lambda t: -t / (t * t + 2), lambda t: (t * t - 2) / (t * t + 2) ** 2),
    "narrow": Line(lambda t: (t + 0.1) ** 5 - 2 * (t + 0.1) ** 4, lambda t: 5 * (t + 0.1) ** 4 - 8 * (t + 0.1) ** 3),
    "wavy": Line(lambda t: 0.1 * t * t - 2 * t + 0.5 * math.sin(3 * t), lambda t: 0.2 * t - 2 + 1.5 * math.cos(3 * t)),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("first_step", [1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("curvature", [0.1, 0.9])
def test_the_step_found_satisfies_both_conditions(name, first_step, curvature):
    line = LINES[name]
    line.steps.clear()
    start, found = line.at(0.0), line.search(first_step=first_step, curvature=curvature)
    assert found.loss <= start.loss + SUFFICIENT_DECREASE * found.step * start.slope
    assert abs(found.slope) <= curvature * abs(start.slope)
    assert len(line.steps) <= 20


def test_an_exact_search_finds_a_parabolas_minimum_in_two_trials():
    line = Line(lambda t: (t - 3) ** 2, lambda t: 2 * (t - 3))
    assert line.search(first_step=1.0, curvature=1e-9).step == pytest.approx(3, rel=1e-12)
    assert len(line.steps) == 2  # a cubic through a parabola is the parabola
    line.steps.clear()
    assert line.search(first_step=8.0, curvature=1e-9).step == pytest.approx(3, rel=1e-12)
    assert len(line.steps) == 2


def test_scipys_search_ends_as_low():
    line = LINES["concave at first"]
    theirs = line_search(
        lambda x: line.loss(x[0]), lambda x: [line.slope(x[0])], torch.zeros(1).numpy(), torch.ones(1).numpy(), c2=0.01
    )
    ours = line.search(first_step=1.0, curvature=0.01)
    assert ours.step == pytest.approx(math.sqrt(2), rel=0.1)
    assert ours.loss == pytest.approx(theirs[3], rel=1e-3)


def test_what_is_not_finite_bounds_the_step():
    line = Line(lambda t: (t - 3) ** 2 if t < 4 else math.nan, lambda t: 2 * (t - 3) if t < 4 else math.nan)
    assert line.search(first_step=1e6, curvature=0.01).step == pytest.approx(3, abs=0.03)


def test_a_line_without_a_number_tells_so_and_one_without_descent_gives_the_start():
    void = Line(lambda t: 0.0 if t == 0 else math.nan, lambda t: -1.0)
    assert math.isnan(void.search(first_step=1.0).loss)
    assert len(void.steps) == 25
    rough = Line(lambda t: 0.0 if t == 0 else 1.0, lambda t: -1.0)  # the slope promises what the loss denies
    assert rough.search(first_step=1.0).step == 0
    assert len(rough.steps) == 25


def test_a_bracket_that_promises_only_rounding_is_not_searched():
    rough = Line(lambda t: 1.0 if t == 0 else 1.0 + 1e-8, lambda t: -1e-9)
    assert rough.search(first_step=1.0, resolution=1e-7).step == 0
    assert len(rough.steps) == 1


def test_when_the_trials_are_spent_the_best_is_taken():
    line = LINES["parabola"]
    line.steps.clear()
    assert line.search(first_step=1e-3, max_trials=1).step == 1e-3
    assert line.steps == [1e-3]
