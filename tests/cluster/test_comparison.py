"""A comparison on digits through real Ray tasks: hand-counted costs, failures, going on."""

from pathlib import Path

import pytest

from raysubset import Config, compare
from raysubset.cluster import Event
from raysubset.comparison import ComparisonReport
from raysubset.report import comparison_sections, read_report

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240), pytest.mark.usefixtures("ray_cluster")]

NUM_TRAIN, NUM_VALIDATION, SIZE = 1294, 144, 323
BROKEN = "B:minimize.learning_rate=1e30"  # diverges in its first epoch


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def report(storage: Path, events: list[Event]) -> ComparisonReport:
    arms = ["B", "D", "F", "G", "H:rounds.num=2", BROKEN]
    config = Config(name="digits", storage_path=str(storage))
    return compare(config, seeds=2, budgets=[2], arms=arms, learning_rates=[0.1], on_event=events.append)


def runs(report: ComparisonReport, key: str) -> list[dict]:
    (arm,) = [arm for arm in report.arms if arm["key"] == key]
    return arm["points"][0]["runs"]


def forward(num: float) -> float:
    """Passes of so many examples passed forward alone."""
    return num / 3 / NUM_TRAIN


def test_costs_are_those_counted_by_hand(report: ComparisonReport):
    (run, _) = runs(report, "B")
    assert run["passes"] == run["critical_path_passes"] == pytest.approx(2 + forward(NUM_VALIDATION))
    # D: two passes in the proportion 8 · 323/1294 : 2, in whole steps; both legs validated
    (run, _) = runs(report, "D")
    scale = 2 / (8 * SIZE / NUM_TRAIN + 2)
    steps = round(8 * scale * 6)  # six batches make an epoch of 323
    trained = steps / 6 * SIZE / NUM_TRAIN + round(2 * scale * 21) / 21  # 21 make one of the full set
    assert run["passes"] == pytest.approx(trained + forward(2 * NUM_VALIDATION), rel=2e-3)
    # F throws the first leg away and pays for it all the same
    assert runs(report, "F")[0]["passes"] == pytest.approx(run["passes"], rel=1e-6)


def test_four_disjoint_minima_cost_four_and_lie_side_by_side(report: ComparisonReport):
    (run, _) = runs(report, "G")
    scale = 2 / (4 * 8 * SIZE / NUM_TRAIN + 2)
    subset = round(8 * scale * 6) / 6 * SIZE / NUM_TRAIN + forward(NUM_VALIDATION)
    aggregation = forward(NUM_TRAIN + NUM_VALIDATION)  # batch-norm statistics on the calibration sample; validation
    tuning = round(2 * scale * 21) / 21 + forward(NUM_VALIDATION)
    assert run["passes"] == pytest.approx(4 * subset + aggregation + tuning, rel=5e-3)
    assert run["critical_path_passes"] == pytest.approx(subset + aggregation + tuning, rel=5e-3)


def test_an_arm_that_fails_is_named_and_ends_no_other(report: ComparisonReport):
    assert all("DivergedError" in run["error"] for run in runs(report, BROKEN))
    assert all(run["error"] is None for key in ("B", "D", "F", "G") for run in runs(report, key))
    assert set(report.record["failed"].values()) == {run["error"] for run in runs(report, BROKEN)}
    assert BROKEN not in report.record["speed_ups"]["total"]


def test_two_seeds_are_called_a_smoke_test(report: ComparisonReport):
    for verdict in report.verdicts.values():
        assert verdict["is_smoke_test"]
        assert "smoke test" in verdict["text"]


def test_the_report_is_read_back_and_shown(report: ComparisonReport):
    record = read_report(report.uri)
    assert record == report.to_dict()
    title, *_ = comparison_sections(record)
    assert report.verdicts["total"]["text"] in title.lines[0]


def test_going_on_does_only_what_is_new(report: ComparisonReport, storage: Path):
    events: list[Event] = []
    config = Config(name="digits", storage_path=str(storage))
    again = compare(config, seeds=2, budgets=[2], arms=["B", "G"], learning_rates=[0.1], on_event=events.append)
    assert [event.text for event in events if event.kind == "leg"] == []
    assert any("legs are already there" in event.text for event in events)
    assert runs(again, "G") == runs(report, "G")
