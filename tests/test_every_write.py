"""The short form of tests/chaos/every_write.py, which ends a run at each of its writes in turn."""

from pathlib import Path

import pytest

from tests.chaos import every_write, punish

TINY = {"subsets.size": 64, "minimize.epochs": 2.0, "trunk.epochs": 0.0, "rounds.num": 1, "fine_tuning.epochs": 1.0}
NUM = 20  # writes of a process before it ends


def test_a_run_that_ends_after_every_twentieth_write_ends_at_the_bits_and_the_costs_of_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(punish, "FLAGS", every_write.flags_of("run", TINY))
    reference, folder, codes = tmp_path / "reference", tmp_path / "ended", list[int]()
    assert every_write.attempt(reference, "run", TINY, None)[0] == 0
    while not codes or (codes[-1] == every_write.ENDED and len(codes) < 10):
        codes.append(every_write.attempt(folder, "run", TINY, NUM)[0])
    assert codes == [every_write.ENDED] * (len(codes) - 1) + [0]
    assert len(codes) > 2
    assert every_write.problems(reference, folder) == []
