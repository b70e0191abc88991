"""What aggregation methods need, said where they are; and the user's own."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from raysubset import Config
from raysubset.aggregation import (
    Context,
    Minimum,
    method_of,
    methods,
    methods_tried,
    refuse_contradictions,
    statistics_of,
)
from raysubset.aggregation.methods import combine_in
from raysubset.config import AGGREGATIONS, AggregationConfig
from raysubset.run_directory import RunDirectory
from raysubset.training import Weights
from tests.tiny import metrics

INDEPENDENT = {"subsets.start": "independent", "trunk.epochs": 0.0}


def with_method(name: str, **overrides: object) -> Config:
    return Config().with_overrides({"aggregation.method": name, **overrides})


def test_every_name_that_a_config_takes_is_a_method() -> None:
    assert set(methods(AggregationConfig())) == set(AGGREGATIONS)
    with pytest.raises(ValueError, match=r"'fishr' is not one of .*; did you mean fisher\?"):
        with_method("fishr")


def test_what_averages_refuses_independent_starts_unless_the_user_insists() -> None:
    for name in AGGREGATIONS:
        config = with_method(name, **INDEPENDENT)
        if name in ("select_best", "aligned_soup", "auto"):
            refuse_contradictions(config)
            continue
        with pytest.raises(ValueError, match=rf"{name} averages .* use subsets.start=shared"):
            refuse_contradictions(config)
        refuse_contradictions(config.with_overrides({"aggregation.allow_independent": True}))


def test_what_goes_by_validation_has_every_round_measured() -> None:
    rounds = {"rounds.num": 4, "rounds.evaluate_every": 2}
    for name in ("greedy_soup", "select_best", "auto"):
        with pytest.raises(ValueError, match=rf"method={name} chooses by validation in every round"):
            refuse_contradictions(with_method(name, **rounds))
    refuse_contradictions(with_method("fisher", **rounds))
    refuse_contradictions(with_method("weighted_soup", **rounds))
    by_loss = {"aggregation.weight_by": "validation_loss"}
    assert method_of(with_method("weighted_soup", **by_loss).aggregation).needs.validation


def test_actors_take_the_statistics_of_the_method_or_of_all_that_auto_tries() -> None:
    assert statistics_of(with_method("uniform_soup")) == ()
    assert statistics_of(with_method("regmean")) == ("gram",)
    assert statistics_of(with_method("auto")) == ("fisher", "gram")
    assert statistics_of(with_method("auto", **INDEPENDENT)) == ()
    assert list(methods_tried(with_method("auto", **INDEPENDENT))) == ["select_best", "aligned_soup"]


def minima(*values: float, start_id: str = "trunk") -> list[Minimum]:
    def one(subset_id: int, value: float) -> Minimum:
        measured = metrics(value, 0, 1)
        weights = {"w": torch.tensor([value]), "n": torch.tensor(3)}
        of_subset, measures = (subset_id, 1, start_id.format(subset_id)), {"training": measured, "validation": measured}
        return Minimum(*of_subset, load_weights=lambda: weights, load_outputs=never, **measures)

    return [one(subset_id, value) for subset_id, value in enumerate(values)]


def never(*_: object) -> None:
    raise AssertionError


def context(start: Weights | None = None) -> Context:
    return Context(start, frozenset({"w"}), lambda weights: metrics(0.0, 0, 1), never, seed=0)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module, averages.py, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "averages.py").write_text(
        dedent(
            """
            import torch
            from raysubset.aggregation import Needs

            def median(minima, context):
                members = [minimum.load_weights() for minimum in minima]
                return {key: torch.stack([one[key] for one in members]).double().quantile(0.5, 0) for key in members[0]}

            def first(minima, context):
                return minima[0].load_weights()

            def nothing(minima, context):
                return None

            def half(minima, context):
                return {"w": minima[0].load_weights()["w"]}

            def broken(minima, context):
                return context.strat

            def in_place(minima, context):
                mean = minima[0].load_weights()
                for minimum in minima[1:]:
                    for key, value in minimum.load_weights().items():
                        mean[key] += value
                return {key: value.div_(len(minima)) + context.start[key].mul_(0) for key, value in mean.items()}

            def odd(minima, context): ...

            first.needs = Needs(shared_start=False, validation=True, statistics=("fisher",), parts=True)
            odd.needs = "fisher"
            """
        )
    )
    monkeypatch.delitem(__import__("sys").modules, "averages", raising=False)
    return tmp_path


@pytest.mark.usefixtures("own")
def test_a_method_of_the_users_makes_weights_of_the_members_form() -> None:
    config = AggregationConfig(method="averages:median")
    made = method_of(config).combine(minima(1.0, 2.0, 9.0), context())
    assert made.weights == {"w": torch.tensor([2.0]), "n": torch.tensor(3)}
    assert made.weights["n"].dtype == torch.int64
    assert (made.method, made.subset_ids, made.shared_start) == ("averages:median", (0, 1, 2), True)
    with pytest.raises(ValueError, match="averages:median averages minima that share no start"):
        combine_in(context(), minima(1.0, 2.0, start_id="{}"), config)
    assert "averages:median" in Config(aggregation=config).functions().values()


@pytest.mark.usefixtures("own")
def test_a_method_of_the_users_may_write_into_weights_of_which_members_share_the_frozen_ones(tmp_path: Path) -> None:
    directory, frozen = RunDirectory(str(tmp_path), "run"), torch.ones(3)
    members, start = list[Minimum](), {"w": torch.tensor([7.0]), "frozen": frozen}
    for member, value in zip(minima(1.0, 2.0, 3.0, 6.0), (1.0, 2.0, 3.0, 6.0), strict=True):
        path = f"{value}.safetensors"
        files = directory.write_apart(path, {"w": torch.tensor([value]), "frozen": frozen}, {"frozen"})
        members.append(replace(member, load_weights=partial(directory.read_weights, path, files)))
    made = method_of(AggregationConfig(method="averages:in_place")).combine(members, context(start))
    assert made.weights["w"].item() == 3.0
    for weights in (made.weights, start, members[0].load_weights()):
        assert weights["frozen"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.usefixtures("own")
def test_a_method_of_the_users_says_what_it_needs() -> None:
    config = with_method("averages:first", **INDEPENDENT)
    refuse_contradictions(config)
    assert statistics_of(config) == ("fisher",)
    assert method_of(config.aggregation).needs.parts
    made = method_of(config.aggregation).combine(minima(1.0, 2.0, start_id="{}"), context())
    assert made.weights["w"].item() == 1.0
    assert not made.shared_start
    with pytest.raises(ValueError, match="chooses by validation in every round"):
        refuse_contradictions(with_method("averages:first", **{"rounds.num": 4, "rounds.evaluate_every": 2}))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"averages:nothing' should return weights, tensors by name, not NoneType"),
        ("half", "n is in one and not in the other"),
        ("broken", r"averages:broken' raised AttributeError: .*; see averages.py, line \d+, in broken"),
        ("odd", r"its attribute needs should be raysubset.aggregation.Needs"),
        ("median_of", r"averages has no function median_of; did you mean median\?"),
    ],
)
def test_a_method_of_the_users_that_does_not_fit_is_refused_in_a_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        method_of(AggregationConfig(method=f"averages:{name}")).combine(minima(1.0, 2.0), context())
    assert "\n" not in str(raised.value)
