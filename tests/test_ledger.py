import contextlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from raysubset.pipeline.run_report import cost_record
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import (
    LOST,
    Ledger,
    Work,
    by_stage,
    critical_path,
    total_cost,
)
from raysubset.training import Cost


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path), "run")


@pytest.fixture
def ledger(run: RunDirectory) -> Ledger:
    return Ledger(run)


def work(stage="subsets", round=0, subset=0, attempt=0, *, examples=0, wall_s=0.0, started_at=100.0, **others) -> Work:
    """Done work that passed so many examples forward and backward."""
    cost = Cost(num_forward=examples, num_backward=examples, num_steps=1, device_s=wall_s)
    fields = {"outcome": "done", "ended_at": started_at + wall_s, "cost": cost} | others
    subset = subset if stage == "subsets" else None
    return Work(stage, round, subset, attempt, "node-a", "cpu", started_at=started_at, **fields)  # pyright: ignore


class TestEntries:
    def test_what_is_written_is_read_in_order_of_start(self, ledger):
        late = work(subset=3, started_at=20.0, error="CUDA out of memory", outcome="failed", num_network_bytes=12)
        early = work("trunk", started_at=10.0, ended_at=None, outcome="running", waited_s=1.5)
        for one in (late, early):
            ledger.write(one)
        assert ledger.read() == [early, late]

    def test_an_empty_ledger_can_be_read(self, ledger):
        assert ledger.read() == []
        assert ledger.close_lost() == []
        ledger.compact()
        assert total_cost(ledger.read()) == Cost()

    def test_a_heartbeat_replaces_the_last_one(self, ledger):
        ledger.write(work(examples=1, outcome="running"))
        ledger.write(work(examples=2, outcome="running"))
        assert [one.cost.num_forward for one in ledger.read()] == [2]

    def test_recorded_work_is_closed_as_it_ended(self, ledger):
        with ledger.recorded("aggregation", 1, device="cpu", node="here", waited_s=0.5) as close:
            assert [(one.outcome, one.node, one.waited_s) for one in ledger.read()] == [("running", "here", 0.5)]
            close(Cost(num_forward=7))
        for error in (ValueError("no\nsuch"), KeyboardInterrupt()):
            with pytest.raises(type(error)), ledger.recorded("aggregation", 1, device="cpu", node="here"):
                raise error
        with contextlib.suppress(OSError), ledger.recorded("aggregation", 1, device="cpu", node="here") as close:
            close(Cost(num_forward=8))
            raise OSError
        done, failed, stopped, left = ledger.read()
        assert [one.outcome for one in (done, failed, stopped, left)] == ["lost", "failed", "interrupted", "done"]
        assert [one.attempt for one in (done, failed, stopped, left)] == [0, 1, 2, 3]
        assert (done.cost.num_forward, left.cost.num_forward) == (7, 8)
        place = "see test_ledger.py, line [0-9]+, in test_recorded_work_is_closed_as_it_ended"
        assert re.fullmatch(f"ValueError: no; {place}", failed.error or "")
        assert failed.cost.device_s == pytest.approx(failed.ended_at - failed.started_at, abs=5)  # two clocks

    @pytest.mark.parametrize("is_compact", [False, True])
    def test_of_attempts_that_were_done_only_the_last_counts_as_done_as_the_others_left_no_record(
        self, ledger, is_compact
    ):
        other = work(subset=1, started_at=90.0)
        for one in (work(), other):
            ledger.write(one)
        if is_compact:
            ledger.compact()
        ledger.begin(work(attempt=1, outcome="running", started_at=101.0))
        assert [(one.subset, one.attempt, one.outcome) for one in ledger.read()] == [
            (1, 0, "done"),
            (0, 0, "lost"),
            (0, 1, "running"),
        ]
        assert total_cost(ledger.read()).num_steps == 3

    def test_each_kind_of_node_is_measured_by_an_attempt_of_its_own(self, ledger):
        for kind in ("FAST", "SLOW"):
            with ledger.recorded("measuring", 0, device=kind, node="here") as close:
                close(Cost(num_forward=7))
        assert [(one.device, one.attempt, one.outcome) for one in ledger.read()] == [
            ("FAST", 0, "done"),
            ("SLOW", 1, "done"),
        ]

    def test_a_clock_that_is_set_back_makes_no_duration_negative(self, ledger, monkeypatch):
        with contextlib.suppress(OSError), ledger.recorded("aggregation", 0, device="cpu", node="here"):
            monkeypatch.setattr("raysubset.run_directory.ledger.time.time", lambda: 0.0)
            raise OSError("the disk is full")
        (failed,) = ledger.read()
        assert 0 <= failed.cost.device_s <= failed.wall_s < 60

    def test_the_latest_of_an_attempt_is_what_its_file_says(self, ledger):
        begun = work(subset=4, examples=0, outcome="running")
        assert ledger.latest(begun) == begun
        ledger.write(work(subset=4, examples=5, outcome="running"))
        assert ledger.latest(begun).cost.num_forward == 5
        assert ledger.latest(work(subset=5)) == work(subset=5)

    def test_each_attempt_has_a_file_of_its_own(self, run, ledger):
        for one in (work(subset=7, attempt=0), work(subset=7, attempt=1), work("fine_tuning")):
            ledger.write(one)
        assert run.list("ledger") == [
            "ledger/fine_tuning-0000-all-00.json",
            "ledger/subsets-0000-0007-00.json",
            "ledger/subsets-0000-0007-01.json",
        ]

    def test_a_truncated_entry_is_left_out_and_named(self, run, ledger, caplog):
        ledger.write(work(subset=0))
        ledger.write(work(subset=1))
        run.write_bytes("ledger/subsets-0000-0001-00.json", b'{"stage": "sub')
        assert [one.subset for one in ledger.read()] == [0]
        assert "ledger/subsets-0000-0001-00.json" in caplog.text

    @pytest.mark.parametrize(
        "text",
        ["[]", "{}", '"x"', '{"stage": "foo"}', "[" * 5000, "other types", "no cost", "no steps"],
    )
    def test_what_is_no_entry_is_left_out_named_and_told_as_lacking(self, run, ledger, caplog, text):
        ledger.write(work(subset=0))
        entry = work(subset=1).to_dict()
        records = {
            "other types": entry | {"started_at": "x"},
            "no cost": {key: value for key, value in entry.items() if key != "cost"},
            "no steps": entry | {"cost": {"num_forward": 1}},
        }
        text = json.dumps(records[text]) if text in records else text
        run.write_bytes("ledger/subsets-0000-0001-00.json", text.encode())
        assert [one.subset for one in ledger.read()] == [0]
        assert "ledger/subsets-0000-0001-00.json" in caplog.text
        assert ledger.lacking([("subsets", 0, 0)]) == ["ledger/subsets-0000-0001-00.json"]

    def test_entries_from_before_lone_work_was_told_apart_are_read(self, run, ledger):
        older = work(subset=1).to_dict()
        del older["num_lone_forward"]
        run.write_json("ledger/subsets-0000-0001-00.json", older)
        run.write_table("ledger.parquet", pa.Table.from_pylist([older | {"subset": 0}]))
        assert sorted(ledger.read(), key=lambda one: one.subset or 0) == [work(subset=0), work(subset=1)]
        ledger.compact()
        assert len(ledger.read()) == 2

    def test_entries_that_are_gone_are_told_by_the_work_that_is_done_and_the_numbers_of_attempts(self, run, ledger):
        ledger.write(work(subset=0, attempt=2))
        ledger.write(work(subset=1, outcome="lost"))
        assert ledger.lacking([("subsets", 0, 0)]) == [f"ledger/subsets-0000-0000-0{n}.json" for n in (0, 1)]
        for attempt in range(2):
            ledger.write(work(subset=0, attempt=attempt, outcome="lost"))
        assert ledger.lacking([("subsets", 0, 0)]) == []
        assert ledger.lacking([("subsets", 0, 1), ("trunk", 0, None)]) == [
            "ledger/subsets-0000-0001-…",
            "ledger/trunk-0000-all-…",
        ]

    def test_a_damaged_table_is_named_and_what_was_written_since_is_read(self, run, ledger, caplog):
        ledger.write(work(subset=0))
        ledger.compact()
        ledger.write(work(subset=1))
        run.write_bytes("ledger.parquet", run.read_bytes("ledger.parquet")[:-9])
        assert [one.subset for one in ledger.read()] == [1]
        assert "ledger.parquet" in caplog.text

    def test_an_actor_elsewhere_writes_to_the_same_ledger(self, ledger):
        pickle.loads(pickle.dumps(ledger)).write(work())
        assert ledger.read() == [work()]


class TestAttempts:
    def test_they_are_counted_for_each_piece_of_work(self, ledger):
        assert ledger.next_attempt("subsets", 0, 1) == 0
        for one in (work(subset=1), work(subset=1, attempt=1), work(subset=2), work("trunk"), work(round=1, subset=1)):
            ledger.write(one)
        assert ledger.next_attempt("subsets", 0, 1) == 2
        assert ledger.next_attempt("subsets", 0, 2) == 1
        assert ledger.next_attempt("subsets", 1, 1) == 1
        assert ledger.next_attempt("subsets", 0, 10) == 0
        assert ledger.next_attempt("trunk", 0) == 1
        assert ledger.next_attempt("fine_tuning", 0) == 0

    def test_an_attempt_whose_entry_is_damaged_counts(self, run, ledger):
        run.write_bytes(work(subset=1, attempt=4).path, b"")
        assert ledger.next_attempt("subsets", 0, 1) == 5

    def test_one_listing_gives_those_of_all(self, ledger):
        for one in (work(subset=1), work(subset=12345, attempt=3), work("fine_tuning", round=2)):
            ledger.write(one)
        ledger.compact()
        ledger.write(work(subset=1, attempt=1))
        following = {("subsets", 0, 1): 2, ("subsets", 0, 12345): 4, ("fine_tuning", 2, None): 1}
        assert ledger.next_attempts() == following

    def test_they_go_on_after_compaction(self, ledger):
        ledger.write(work(subset=1, attempt=1))
        ledger.compact()
        assert ledger.next_attempt("subsets", 0, 1) == 2


class TestResuming:
    def test_what_still_claims_to_run_is_lost_and_its_last_heartbeat_counts(self, ledger):
        running = work(subset=1, examples=30, outcome="running", ended_at=None)
        ledger.write(work(subset=0, examples=100))
        ledger.write(running)
        assert ledger.close_lost() == ledger.read() == [work(subset=0, examples=100), replace(running, outcome="lost")]
        assert ledger.close_lost() == ledger.read()
        assert total_cost(ledger.read()).num_backward == 130


class TestCompaction:
    def test_the_table_holds_what_the_files_held(self, run, ledger):
        works = [work("trunk", started_at=1.0), work(subset=1, started_at=2.0, ended_at=None, error="lost node")]
        for one in works:
            ledger.write(one)
        ledger.compact()
        assert run.list(recursive=True) == ["ledger.parquet"]
        assert ledger.read() == works

    def test_later_work_joins_it(self, ledger):
        ledger.write(work("trunk", started_at=1.0))
        ledger.compact()
        ledger.write(work(started_at=2.0))
        ledger.compact()
        ledger.compact()
        assert [one.stage for one in ledger.read()] == ["trunk", "subsets"]

    def test_a_file_wins_over_the_table(self, ledger):
        ledger.write(work(examples=1))
        ledger.compact()
        ledger.write(work(examples=2))
        assert [one.cost.num_forward for one in ledger.read()] == [2]

    def test_a_damaged_file_is_kept(self, run, ledger):
        ledger.write(work(subset=0))
        run.write_bytes(work(subset=1).path, b"{")
        ledger.compact()
        assert run.list("ledger") == [work(subset=1).path]


# 300 training examples. Passes: trunk 1; subset 0 of round 0 in two attempts 1/3 + 1/3, subset 1 1/3; round 1: 1/3
# and 1; aggregation 1/3 (forward alone, 300); fine-tuning 2 by two workers.
WORKS = [
    work("trunk", examples=300, wall_s=10, started_at=0),
    work(subset=0, attempt=0, examples=100, wall_s=4, started_at=10, outcome="lost", ended_at=None),
    work(subset=0, attempt=1, examples=100, wall_s=5, started_at=15),
    work(subset=1, examples=100, wall_s=6, started_at=10),
    work("aggregation", cost=Cost(num_forward=300, device_s=1), wall_s=1, started_at=20),
    work(round=1, subset=0, examples=100, wall_s=3, started_at=21, outcome="preempted"),
    work(round=1, subset=1, examples=300, wall_s=7, started_at=21),
    work(
        "fine_tuning",
        cost=Cost(num_forward=600, num_backward=600, num_steps=20, device_s=16),
        wall_s=8,
        num_workers=2,
        started_at=28,
    ),
]


class TestSums:
    def test_the_total_counts_every_attempt(self):
        total = total_cost(WORKS)
        assert total == Cost(num_forward=1900, num_backward=1600, num_steps=26, device_s=52)
        assert total.passes(300) == pytest.approx((1900 / 3 + 1600 * 2 / 3) / 300)

    def test_lost_work_is_told_apart(self):
        lost = total_cost(work for work in WORKS if work.outcome in LOST)
        assert lost == Cost(num_forward=200, num_backward=200, num_steps=2, device_s=7)

    def test_stages_stand_in_the_order_they_began(self):
        stages = by_stage(reversed(WORKS))
        assert list(stages) == ["trunk", "subsets", "aggregation", "fine_tuning"]
        assert [len(works) for works in stages.values()] == [1, 5, 1, 1]
        assert total_cost(stages["subsets"]).num_forward == 700

    def test_the_critical_path_takes_the_longest_subset_of_each_round_and_divides_by_workers(self):
        # trunk, subset 0 of round 0 with both attempts, aggregation, subset 1 of round 1, half the fine-tuning
        passes = critical_path(WORKS, lambda work: work.critical_passes(300, 1 / 3))
        assert passes == pytest.approx(1 + 2 / 3 + 1 / 3 + 1 + 2 / 2)

    def test_what_one_of_several_workers_does_alone_is_not_divided_by_them(self):
        cost = Cost(num_forward=900, num_backward=600)  # two passes, and 300 examples that one measures: a third
        measured = work("trunk", cost=cost, num_workers=4, num_lone_forward=300)
        assert measured.critical_passes(300, 1 / 3) == pytest.approx(2 / 4 + 1 / 3)
        costs = cost_record([measured], 300, 1 / 3, overlap=False)
        assert (costs["passes"], costs["critical_path_passes"]) == pytest.approx((2 + 1 / 3, 2 / 4 + 1 / 3))

    def test_its_seconds_are_counted_the_same_way(self):
        assert critical_path(WORKS, lambda work: work.wall_s) == 10 + (4 + 5) + 1 + 7 + 8

    def test_without_work_all_sums_are_zero(self):
        assert total_cost([]) == Cost()
        assert critical_path([], lambda work: work.wall_s) == 0
        assert by_stage([]) == {}
