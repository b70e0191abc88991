"""Techniques in a Ray Train job: every worker's own state survives a driver that gives up within an epoch."""

import signal
from pathlib import Path

import pytest

from raysubset import Config, RunReport, run
from raysubset.data import load_full_set
from raysubset.events import EpochDone, Event
from raysubset.ledger import Ledger
from raysubset.run_directory import RunDirectory, weights_path
from tests.tiny import same_bits, stored_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400), pytest.mark.usefixtures("ray_cluster")]

NUM_EPOCHS = 11
VARIATIONS = {
    "trunk.epochs": 0.0,
    "subsets.num": 2,
    "minimize.epochs": 1.0,
    "minimize.extrapolation.kind": "past_local",
    "minimize.skipping.kind": "wus",
    "minimize.skipping.threshold": 0.999,  # so that every second epoch is frozen, from the third on
    "minimize.skipping.drop": 1.0,
    "fine_tuning.epochs": float(NUM_EPOCHS),
    "fine_tuning.num_workers": 2,
    "fine_tuning.distillation": 0.5,
    "actors.checkpoint_epochs": 0.4,
}


class Enough(Exception):
    """What a listener may raise, as the driver's own does when it has lost its lease."""


@pytest.mark.usefixtures("prompt_reports")
def test_extrapolation_skipping_and_distillation_survive_an_interruption_to_the_bit_and_are_counted(
    tmp_path: Path,
) -> None:
    def finish(name: str, on_event=None) -> RunReport:
        return run(Config(name=name, storage_path=str(tmp_path)).with_overrides(VARIATIONS), on_event=on_event)

    heard: list[float] = []

    def raise_in_the_middle(event: Event) -> None:
        if isinstance(event, EpochDone):
            heard.append(event.record["epoch"])
            if len(heard) == 4:
                raise Enough

    on_interrupt = signal.getsignal(signal.SIGINT)
    whole = finish("whole")
    with pytest.raises(Enough):
        finish("broken", raise_in_the_middle)
    assert heard == [1, 2, 3, 4]
    assert signal.getsignal(signal.SIGINT) == on_interrupt
    broken = finish("broken")
    directories = [RunDirectory.at(report.uri) for report in (whole, broken)]
    works = [[w for w in Ledger(d).read() if w.stage == "fine_tuning"] for d in directories]
    assert [w.outcome for w in works[1]] == ["lost", "done"]
    assert sum(w.cost.num_backward for w in works[1]) >= works[0][0].cost.num_backward
    assert [e["epoch"] for e in broken.record["stages"]["fine_tuning"]["history"]] == list(range(1, NUM_EPOCHS + 1))
    assert same_bits(*(stored_weights(d, weights_path("fine_tuning")) for d in directories))

    full_set = load_full_set(Config().data)
    num_train, num_validation = len(full_set.train), len(full_set.validation)
    num_frozen = (NUM_EPOCHS - 1) // 2
    forward = NUM_EPOCHS * (num_train + 2 * num_train + num_validation)  # two teachers
    forward += num_train + num_train + num_validation  # batch-norm statistics, training and validation losses
    (cost,) = [w.cost for w in works[0]]
    assert (cost.num_forward, cost.num_backward) == (forward, NUM_EPOCHS * num_train - num_frozen * num_train // 2)
