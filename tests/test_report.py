import csv
import io
import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raysubset.config import Config
from raysubset.events import Note
from raysubset.quality import ACCURACY, Quality
from raysubset.report import Command, Section, read_report, sections, write_files
from raysubset.report.commands import command, comparison_beside, conventional_beside
from raysubset.report.figures import change_in_words, loss_name, mean_metrics, standard_error
from raysubset.run_directory import (
    REPORT_PATH,
    RunDirectory,
    aggregate_path,
    minimum_folder,
    minimum_path,
)
from raysubset.run_directory.shapes import refuse_other_values
from tests import tiny
from tests.flags import parse_config

# A training set of 100, 50 to validate and 100 to test on: every number below can be worked out by hand.
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 100, 50, 100


def metrics(loss: float, num_correct: int, num_examples: int) -> dict[str, Any]:
    return tiny.metrics(loss * num_examples, num_correct, num_examples).to_dict()


def history(num_epochs: int, *, num_steps: int = 2) -> list[dict[str, Any]]:
    return [
        {"epoch": float(n), "loss": 1.0 / n, "learning_rate": 0.1, "num_steps": n * num_steps}
        for n in range(1, num_epochs + 1)
    ]


def minimum(subset: int, **changes: Any) -> dict[str, Any]:
    """Subset `subset` of 25 examples: loss 0.1 on its own, 0.2 + subset / 100 on validation, 30 + subset right."""
    return {
        "subset_id": subset,
        "num_examples": 25,
        "start_id": "trunk",
        "cost": {},
        "outcome": "epochs",
        "training": metrics(0.1, 25, 25),
        "validation": metrics(0.2 + subset / 100, 30 + subset, NUM_VALIDATION),
        "history": history(8),
        "round": 0,
        "overdetermination_ratio": 3.0,
    } | changes


def round_of(minima: list[dict[str, Any]], *, round: int = 0, **changes: Any) -> dict[str, Any]:
    ids = [m["subset_id"] for m in minima]
    made = {
        "method": "uniform_soup",
        "subset_ids": ids,
        "coefficients": [1 / len(ids)] * len(ids),
        "shared_start": True,
        "of_first": [],
        "tried": [],
        "training": metrics(0.15, 90, NUM_TRAIN),
        "validation": metrics(0.18, 33, NUM_VALIDATION),
        "uniform_mean": metrics(0.18, 33, NUM_VALIDATION),
        "ensemble": metrics(0.19, 34, NUM_VALIDATION),
        "best_member": minima[0]["validation"],
        "mean_member_loss": sum(m["validation"]["loss"] or 0 for m in minima) / len(minima),
        "mean_member_accuracy": sum(m["validation"]["accuracy"] for m in minima) / len(minima),
        "barrier": -0.03,
        "candidates": [],
        "alignment": None,
    }
    return {"round": round, "minima": minima, "aggregation": made | changes}


def stage_cost(stage: str, passes: float, critical: float, **changes: Any) -> dict[str, Any]:
    row = {"stage": stage, "passes": passes, "critical_path_passes": critical, "num_steps": 1}
    return row | {"device_s": 2.0, "wall_s": 1.0, "waited_s": 0.0, "num_attempts": 1, "num_lost": 0} | changes


def a_record(config: Config | None = None, **changes: Any) -> dict[str, Any]:
    """One round of 4 minima without a trunk (8 passes of training), then 2 epochs of fine-tuning by 2 workers."""
    config = config or Config().with_overrides({"trunk.epochs": 0.0, "fine_tuning.epochs": 2.0})
    tuned = {
        "training": metrics(0.05, 95, NUM_TRAIN),
        "validation": metrics(0.1, 45, NUM_VALIDATION),
        "history": [
            epoch | {"validation": metrics(0.3 - epoch["epoch"] / 10, 40, NUM_VALIDATION)} for epoch in history(2)
        ],
        "outcome": "epochs",
        "num_workers": 2,
        "recomputed_batch_norm": True,
    }
    loss = "squared error" if config.task.loss == "squared_error" else "cross-entropy, nats"
    return {
        "name": "a-run",
        "task": {"name": "classification", "quality": ACCURACY.to_dict(), "loss": loss},
        "uri": "/results/a-run",
        "method": "subset_pretraining",
        "config": config.to_dict(),
        "environment": {"started_at": 1e9},
        "data": {
            "name": "digits",
            "num_train": NUM_TRAIN,
            "num_validation": NUM_VALIDATION,
            "num_test": NUM_TEST,
            "notes": [Note("no test split: some carved off").to_dict()],
        },
        "model": {"name": "cnn", "num_parameters": 1234, "num_bytes": 5000, "forward_share": 0.35},
        "overdetermination_ratio": {"full_set": 12.0, "subsets": [3.0] * 4},
        "decisions": {"num_gpus": 0.0, "num_workers": 2},
        "advice": [Note("Q of 4 subsets: 3").to_dict(), Note("subset 3 lacks class 7", is_warning=True).to_dict()],
        "planned_passes": 10.0,
        "stages": {"trunk": None, "rounds": [round_of([minimum(n) for n in range(4)])], "fine_tuning": tuned},
        "test": metrics(0.12, 90, NUM_TEST),
        "validation": tuned["validation"],
        "cost": {
            "passes": 12.0,
            "critical_path_passes": 4.5,
            "lost_passes": 0.0,
            "num_steps": 12_345,
            "device_s": 7.0,
            "critical_path_s": 4.0,
            "num_network_bytes": 2_500_000,
            "stages": [stage_cost("subsets", 9.0, 2.25), stage_cost("fine_tuning", 3.0, 2.25)],
        },
        "seconds": {"startup": 3.0, "wall": 20.0, "num_sessions": 1},
    } | changes


def conventional_record() -> dict[str, Any]:
    work = minimum(0) | {"subset_id": None, "num_examples": NUM_TRAIN, "training": metrics(0.1, 99, NUM_TRAIN)}
    cost = a_record()["cost"] | {"stages": [stage_cost("conventional", 8.5, 8.5)]}
    changes = {"method": "conventional", "stages": {"conventional": work}, "advice": [], "planned_passes": 8.0}
    return a_record(Config(method="conventional"), cost=cost, **changes)


BITS = Quality("bits", higher_is_better=False, unit="bits a token")
R2 = Quality("r2")


def of_task(record: Any, name: str, quality: Quality) -> Any:
    """A record of images as one of another task: accuracy a is 3 - 2a bits, or an r2 of 2a - 1."""

    def turned(value: Any) -> Any:
        if isinstance(value, list):
            return [turned(one) for one in value]
        if not isinstance(value, dict):
            return value
        found = {}
        for key, one in value.items():
            if key.endswith("accuracy") and isinstance(one, float):
                one = 2 * one - 1 if quality.higher_is_better else 3 - 2 * one
            found[key.replace("accuracy", quality.name)] = turned(one)
        found.pop("num_correct", None)
        return found

    found = turned(record)
    return found if isinstance(record, list) else found | {"task": {"name": name, "quality": quality.to_dict()}}


def one(parts: list[Section], title: str) -> Section:
    (found,) = [part for part in parts if part.title == title]
    return found


def row(part: Section, name: str) -> tuple[str, ...]:
    (found,) = [row for row in part.rows if row[0].strip() == name]
    return found


def text(parts: list[Section]) -> str:
    return "\n".join(line for part in parts for line in (part.title, *map(" ".join, part.rows), *map(str, part.lines)))


# The page


def test_first_sentence_is_the_result_with_its_error_and_cost():
    assert sections(a_record())[0].lines == (
        "Test accuracy 90.00% ± 3.00 (90 of 100), loss 0.1200, with cnn of 1,234 parameters, "
        "for 12.00 passes over the training set in total, 4.50 of them on the critical path.",
    )


def test_standard_error_is_binomial_and_never_zero():
    def error(num_correct: int) -> float | None:
        return standard_error(metrics(1.0, num_correct, 100), ACCURACY)

    assert error(90) == pytest.approx(math.sqrt(0.9 * 0.1 / 100))
    one_otherwise = pytest.approx(math.sqrt(0.99 * 0.01 / 100))
    assert error(100) == one_otherwise
    assert error(0) == one_otherwise


def test_a_share_of_counted_examples_has_the_binomial_error_and_other_shares_have_none():
    hits = Quality("hits", is_share=True)
    record = {"num_examples": 100, "loss": 1.0, "hits": 0.9, "num_hits": 90}
    expected = pytest.approx(math.sqrt(0.9 * 0.1 / 100))
    assert standard_error(record, hits) == expected
    assert standard_error(mean_metrics([record, record], hits), hits) == expected
    assert standard_error(record | {"hits": 0.45}, hits) is None  # of tokens, of which an example has two
    assert standard_error(record, replace(hits, is_share=False)) is None
    own = {"num_examples": 100, "accuracy": 0.9, "num_accuracy": 90}
    assert standard_error(own, ACCURACY) == expected


def test_every_row_has_a_cell_for_every_column():
    several = a_record()
    several["stages"]["rounds"] = [round_of([minimum(n) for n in range(4)], round=n) for n in range(3)]
    for record in (a_record(), several, conventional_record()):
        for part in sections(record):
            assert {len(row) for row in part.rows} <= {len(part.columns)}
            assert part.rows or part.lines


def test_stages_give_the_mean_over_members_and_costs():
    stages = one(sections(a_record()), "Stages")
    # validation losses 0.20 to 0.23, 30 to 33 of 50 right
    assert row(stages, "subsets, mean of 4")[1:] == (
        *("0.1000", "100.00%", "0.2150", "63.00%"),
        *("9.00", "2.25", "2.0", "1.0", "450"),  # examples/s: 9 passes over 100 in 2 s
    )
    assert row(stages, "aggregate, uniform_soup")[1:5] == ("0.1500", "90.00%", "0.1800", "66.00%")
    assert row(stages, "fine_tuning")[3:] == ("0.1000", "90.00%", "3.00", "2.25", "2.0", "1.0", "150")
    sampled = a_record()
    sampled["stages"]["rounds"][-1]["aggregation"]["ensemble"] = metrics(0.19, 9, 10)
    aggregation = one(sections(sampled), "Aggregation")
    assert row(aggregation, f"ensemble of predictions on 10 of {NUM_VALIDATION} examples")[1:] == ("0.1900", "90.00%")


def test_gap_is_validation_less_own_loss():
    part = one(sections(a_record()), "Minima")
    assert row(part, "2") == ("2", "3.00", "25", "0.1000", "0.2200", "+0.1200", "64.00%", "epochs")


def test_a_loss_that_depends_on_the_batch_has_no_gap():
    """NT-Xent of 323 examples and of 144 differ by the logarithm of their number alone."""
    record = a_record()
    record["task"] = {
        "name": "m:T",
        "loss": "NT-Xent",
        "quality": ACCURACY.to_dict(),
        "compares_examples": True,
    }
    part = one(sections(record), "Minima")
    assert row(part, "2") == ("2", "3.00", "25", "0.1000", "0.2200", "64.00%", "epochs")
    told = text(sections(record))
    assert "losses on them and on validation data do not compare" in told
    assert "that on its own subset" not in told


def test_squared_error_shows_the_ratio_beside_what_least_squares_would_give():
    config = Config().with_overrides({"task.loss": "squared_error"})
    part = one(sections(a_record(config)), "Minima")
    assert row(part, "0")[-2:] == ("2.00", "2.00")  # 0.2 / 0.1, and (3 + 1) / (3 - 1)
    assert "(Q+1)/(Q-1)" not in text(sections(a_record()))


def test_the_recipe_says_what_each_stage_was_minimized_by_and_the_command_that_does_it_again():
    overrides = {"trunk.epochs": 0.0, "fine_tuning.learning_rate": 0.02, "minimize.clip_norm": 1.5, "seed": 7}
    record = a_record(Config(name="r").with_overrides(overrides))
    part = one(sections(record), "Recipe")
    assert part.columns == ("", "subsets", "fine tuning")
    assert row(part, "learning rate, peak")[1:] == ("0.1", "0.02")
    assert row(part, "epochs")[1:] == ("8", "2")
    assert row(part, "schedule")[1:] == ("cosine", "cosine")
    assert row(part, "clip norm")[1:] == ("1.5", "1.5")  # as it is not the default
    assert row(part, "examples")[1:] == ("25", "100")
    assert row(part, "workers")[1:] == ("4 subsets", "2")
    assert "nesterov" not in text([part])
    flags = "--name r --seed 7 --minimize.clip-norm 1.5 --trunk.epochs 0 --fine-tuning.learning-rate 0.02"
    assert part.lines[-1] == Command(f"raysubset run {flags}")
    (conventional,) = one(sections(conventional_record()), "Recipe").columns[1:]
    assert conventional == "conventional"


def test_the_recipe_of_a_users_loop_tells_of_no_optimizer_that_it_may_not_have():
    part = one(sections(a_record(Config().with_overrides({"minimize.loop": "loops:momentum"}))), "Recipe")
    assert [cells[0] for cells in part.rows][:4] == ["loop", "epochs", "batch size", "examples"]
    assert "sgd" not in text([part])


def test_law_is_not_stated_where_it_does_not_hold():
    config = Config().with_overrides({"task.loss": "squared_error"})
    record = a_record(config)
    record["stages"]["rounds"] = [round_of([minimum(0, overdetermination_ratio=0.5), minimum(1)])]
    assert row(one(sections(record), "Minima"), "0")[-1] == "none: Q ≤ 1"


def test_many_minima_are_summarised_with_their_outcomes():
    record = a_record()
    minima = [minimum(n, outcome="target" if n else "diverged") for n in range(13)]
    record["stages"]["rounds"] = [round_of(minima)]
    part = one(sections(record), "Minima")
    assert [r[0] for r in part.rows] == ["mean of 13", "least of 13", "greatest of 13"]
    assert row(part, "mean of 13")[4] == "0.2600"
    assert row(part, "mean of 13")[7] == "1 × diverged, 12 × target"
    assert "1 of 13 minima diverged" in text(sections(record))


def test_rounds_get_a_row_each_and_only_the_last_twelve():
    record = a_record()
    record["stages"]["rounds"] = [round_of([minimum(n) for n in range(4)], round=n) for n in range(15)]
    part = one(sections(record), "Rounds, validation loss and accuracy")
    assert [r[0] for r in part.rows] == [str(n) for n in range(4, 16)]
    assert part.lines == ("The first 3 of the measured rounds are in report.json.",)
    assert "Minima of round 15" in [part.title for part in sections(record)]


def test_aggregation_names_members_used_and_candidates():
    record = a_record()
    changes = {"method": "greedy_soup", "subset_ids": [2, 0], "coefficients": [0.5, 0.5]}
    tried = [{"subset_ids": [2], "validation_loss": 0.2}] * 4
    record["stages"]["rounds"] = [round_of([minimum(n) for n in range(4)], **changes, tried=tried)]
    part = one(sections(record), "Aggregation")
    assert "Members: 2, 0 (2 of 4); 4 candidates were scored" in str(part.lines[0])
    assert row(part, "plain mean of all") == ("plain mean of all", "0.1800", "66.00%")


def test_costs_part_training_from_the_rest():
    part = one(sections(a_record()), "Costs")
    assert row(part, "training that led to the result")[1:] == ("10.00", "planned: up to 10.00")  # 4 × 8 × ¼ + 2
    assert row(part, "the rest")[1] == "2.00"
    assert row(part, "seconds on the critical path")[1] == "4.0"
    assert row(part, "bytes sent")[1] == "2.5 MB"
    assert row(part, "the rest")[2] == "evaluation, batch-norm statistics, candidates, repeated work"
    skipping = a_record(Config().with_overrides({"minimize.skipping.kind": "wus"}))
    assert row(one(sections(skipping), "Costs"), "the rest")[2].endswith(
        "less the weights' gradients that training skipped"
    )
    taught = a_record()  # by 4 minima, whose forward passes are in the planned ones too
    taught["config"]["fine_tuning"]["distillation"] = 0.5
    trained = row(one(sections(taught), "Costs"), "training that led to the result")[1]
    assert trained == f"{10 + 2 * 4 * 0.35:.2f}"
    assert "lost" not in text([part])


def test_lost_attempts_and_resuming_are_told():
    record = a_record()
    record["cost"] = record["cost"] | {
        "lost_passes": 0.75,
        "stages": [stage_cost("subsets", 9.0, 2.25, num_attempts=6, num_lost=2)],
    }
    record["seconds"] = record["seconds"] | {"num_sessions": 2}
    part = one(sections(record), "Costs")
    assert row(part, "in lost attempts")[1:2] == ("0.75",)
    assert "2 of 6 attempts" in row(part, "in lost attempts")[2]
    assert "resumed: wall seconds are of its 2 sessions" in str(part.lines[0])


# What this tells


def test_a_difference_is_noise_below_two_errors():
    # 33 and 30 of 50: 6 points, with errors of 6.70 and 6.93 points
    error = 100 * math.hypot(math.sqrt(0.66 * 0.34 / 50), math.sqrt(0.6 * 0.4 / 50))
    words = [change_in_words(metrics(1.0, n, 50), metrics(1.0, 30, 50), ACCURACY, "good", "bad") for n in (33, 45, 15)]
    assert words[0] == f"accuracy +6.00 points ± {error:.2f} (within the noise)"
    assert [text[-6:] for text in words[1:]] == ["(good)", " (bad)"]


def test_noise_is_called_noise_and_harm_harm():
    tells = [str(line) for line in one(sections(a_record()), "What this tells").lines]
    (aggregation,) = [line for line in tells if "the mean member" in line]
    assert "(within the noise)" in aggregation
    (tuning,) = [line for line in tells if line.startswith("Fine-tuning")]
    assert "accuracy +24.00 points ± 7.93 (it helped), loss -0.0800" in tuning
    record = a_record()
    record["stages"]["fine_tuning"] |= {"validation": metrics(0.9, 10, NUM_VALIDATION)}
    assert "(it did harm)" in text(sections(record))


def test_another_tasks_report_says_its_quality_in_its_direction_and_unit():
    record = of_task(a_record(), "next_token", BITS)
    refuse_other_values("report.json", record)
    parts = sections(record)
    assert str(parts[0].lines[0]).startswith("Test 1.2 bits a token, loss 0.1200, with cnn")  # 3 - 2 * 0.90
    assert row(one(parts, "Final model"), "test, read once at the end")[2:] == ("0.1200", "1.2")
    stages = one(parts, "Stages")
    assert stages.columns[2] == stages.columns[4] == "bits a token"
    assert row(stages, "subsets, mean of 4")[4] == "1.74"  # 0.63
    page = text(parts)
    # 66 and then 90 % right, were it accuracy: fewer bits are better
    assert "Fine-tuning, against the aggregate: -0.48 bits a token (better), loss -0.0800" in page
    assert "accuracy" not in page
    assert "±" not in page  # as nobody knows its error
    better = of_task(a_record(), "regression", R2)
    assert "Fine-tuning, against the aggregate: r2 +0.48 (better), loss -0.0800" in text(sections(better))
    better["stages"]["fine_tuning"]["validation"] |= {"r2": 0.3}
    assert "r2 -0.02 (worse)" in text(sections(better))
    better["stages"]["fine_tuning"]["validation"] |= {"r2": 0.32}
    assert "r2 +0 (no difference)" in text(sections(better))


def test_an_error_that_the_metrics_tell_is_shown_and_bounds_the_noise():
    record = of_task(a_record(), "next_token", BITS)
    for metrics in (record["test"], record["stages"]["fine_tuning"]["validation"]):
        metrics["bits_error"] = 0.25
    record["stages"]["rounds"][-1]["aggregation"]["validation"]["bits_error"] = 0.25
    page = text(sections(record))
    assert "Test 1.2 bits a token ± 0.25, loss" in page
    assert "-0.48 bits a token ± 0.35 (within the noise)" in page  # of sqrt(2) / 4


def test_a_quality_that_is_not_finite_leaves_a_page():
    record = of_task(a_record(), "regression", R2)
    record["test"] |= {"rmse": 53.21, "error_squared_sum": [1.0, 2.0]}
    assert str(one(sections(record), "Final model").lines[0]) == "On test data also: rmse 53.21."
    several = {**record, "data": record["data"] | {"targets": ["price", "age_1"]}}
    several["test"] = record["test"] | {"rmse_0": 106.0, "rmse_1": 0.42}  # each in its target's unit
    told = "On test data also: rmse 53.21, rmse of price 106, rmse of age_1 0.42."
    assert str(one(sections(several), "Final model").lines[0]) == told
    record["test"]["r2"] = record["stages"]["fine_tuning"]["validation"]["r2"] = None
    refuse_other_values("report.json", record)
    page = text(sections(record))
    assert "Test r2 -, loss 0.1200" in page
    assert "r2 - (not finite)" in page


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"config": {"minimize": {"loss": "cross_entropy"}}}, "loss"),  # of before tasks
        ({"config": {"task": {"loss": "auto"}}, "task": {"name": "pkg:Boxes"}}, "loss"),
        ({"config": {"task": {}}, "task": {"name": "next_token", "loss": "nats a token"}}, "nats a token"),
    ],
)
def test_a_losss_axis_says_its_name_where_the_record_tells_it(record: dict[str, Any], name: str):
    assert loss_name(record) == name


def test_warnings_of_the_run_are_repeated():
    tells = text([one(sections(a_record()), "What this tells")])
    assert "warning: subset 3 lacks class 7" in tells
    assert "Q of 4 subsets" not in tells


def test_a_note_without_a_text_is_refused_by_its_place():
    with pytest.raises(ValueError, match=r"advice\[0\]\.text is missing"):
        refuse_other_values("report.json", a_record() | {"advice": [{}]})


def test_missing_subsets_independent_starts_and_high_barriers_are_told():
    record = a_record()
    record["stages"]["rounds"] = [round_of([minimum(0), minimum(1)], shared_start=False, barrier=1.25)]
    page = text(sections(record))
    assert "warning: 2 of 4 subsets failed for good" in page
    assert "warning: the members do not share a start" in page
    assert "loss is 1.2500 above" in page


def test_losses_that_are_not_finite_do_not_break_the_page():
    record = a_record()
    bad = {"loss_sum": None, "loss": None, "num_correct": 5, "num_examples": NUM_VALIDATION, "accuracy": 0.1}
    minima = [minimum(0, validation=bad), minimum(1)]
    record["stages"]["rounds"] = [round_of(minima, validation=bad, barrier=None, mean_member_loss=None)]
    page = text(sections(record))
    assert "not finite" in page
    assert "warning: the plain mean has no finite loss" in page


def test_conventional_run_has_no_rows_of_subsets():
    parts = sections(conventional_record())
    assert [r[0] for r in one(parts, "Stages").rows] == ["conventional"]
    assert "Minima" not in [part.title for part in parts]
    assert row(one(parts, "Costs"), "training that led to the result")[1] == "8.00"
    assert one(parts, "Next").lines[1] == Command("raysubset run")
    assert Command("raysubset compare") in one(parts, "Next").lines


# Commands


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"name": "my run", "seed": 7, "storage_path": "/a b/c"},
        {"minimize.channels_last": False, "minimize.compile": True, "data.download": True},
        {"minimize.learning_rate": 0.1 + 0.2, "subsets.fraction": 0.125, "minimize.weight_decay": 1e-7},
        {"fine_tuning.num_workers": 2, "actors.num_gpus": 0.25, "model.name": "pkg.module:function"},
        {"rounds.keep_minima": None, "aggregation.statistics_examples": None},
    ],
)
def test_flags_of_a_command_give_the_config_back(overrides: dict[str, Any]):
    config = Config().with_overrides(overrides)
    program, verb, *flags = shlex.split(command(config.to_dict()))
    assert (program, verb) == ("raysubset", "run")
    assert parse_config(flags) == config


def test_a_command_leaves_out_the_usual_storage_path_as_runs_record_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = Config().to_dict()
    assert command(config | {"storage_path": "/home/ann/ray_results"}) == "raysubset run"
    assert command(config | {"storage_path": "/home/bob/ray_results"}).endswith("--storage-path /home/bob/ray_results")


def test_a_comparison_command_leaves_out_what_is_refused_and_names_a_margin_that_only_the_user_knows():
    config = Config().with_overrides({"actors.quorum": 3, "subsets.shares": "measured"}).to_dict()
    assert comparison_beside(config) == "raysubset compare"
    assert comparison_beside(config, quality=R2) == "raysubset compare --margin MARGIN"
    assert comparison_beside(config, quality=replace(R2, margin=0.1)) == "raysubset compare"
    lines = [str(line) for line in sections(of_task(a_record(), "regression", R2))[-1].lines]
    assert "(--quick: a smoke test, MARGIN: how much worse in r2 still counts as good)" in "".join(lines)
    assert any(line.startswith("raysubset compare --margin MARGIN") for line in lines)


def test_conventional_command_costs_the_same_with_its_own_evaluation():
    overrides = {"name": "x", "subsets.num": 8, "trunk.epochs": 0.0, "minimize.learning_rate": 0.3, "actors.quorum": 7}
    overrides |= {"minimize.patience": 2, "minimize.validate_every": 1}
    record = a_record(Config().with_overrides(overrides | {"aggregation.method": "greedy_soup"}))
    config = parse_config(shlex.split(conventional_beside(record, 12.0, "beside"))[2:])
    # forward over 100 + 50 + 100 examples, at this network's share of 0.35 each: 0.875 passes
    assert config.conventional.epochs == pytest.approx(12 - 250 * 0.35 / 100, rel=1e-3)
    assert (config.method, config.name, config.minimize.learning_rate) == ("conventional", "x-beside", 0.3)
    assert config.subsets == Config().subsets
    assert config.actors.quorum is None
    assert (config.minimize.patience, config.minimize.validate_every) == (None, None)


@pytest.mark.parametrize(("kind", "num_passed"), [("swa", 100), ("pswa", 1000), ("none", 0)])
def test_conventional_command_counts_what_averaging_passes_for_batch_norm(kind: str, num_passed: int):
    config = Config().with_overrides({"minimize.averaging.kind": kind, "trunk.epochs": 0, "fine_tuning.epochs": 0})
    record = a_record(config)
    record["model"] |= {"has_batch_norm": True}
    epochs = parse_config(shlex.split(conventional_beside(record, 14.2, "beside"))[2:]).conventional.epochs
    # at the end of all training, or of each of 10 epochs, 100 examples for statistics; 250 for evaluation
    assert epochs == pytest.approx(14.2 - (250 + num_passed) * 0.35 / 100, rel=1e-3)


# Reading


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no run directory: nothing is there"):
        read_report(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"no run directory: it has no config\.json"):
        read_report(str(tmp_path))


def test_an_unfinished_run_says_how_far_it_is_and_how_to_go_on(tmp_path: Path):
    run = RunDirectory(str(tmp_path), "half")
    config = Config(name="half", storage_path=str(tmp_path)).with_overrides({"rounds.num": 2, "trunk.num_workers": 2})
    run.open(config.to_dict(), {})
    with pytest.raises(ValueError, match="not finished: no stage is done") as refused:
        read_report(run.uri)
    assert parse_config(shlex.split(str(refused.value).partition("To resume: ")[2])[2:]) == config
    run.write_json(minimum_path("trunk"), {})
    run.write_json(aggregate_path(0), {})
    for subset in range(3):
        run.write_json(minimum_path(minimum_folder(1, subset)), {})
    expected = "trunk done, 1 of 2 rounds done, the next round has 3 minima"
    with pytest.raises(ValueError, match=expected) as refused:
        read_report(run.uri)
    assert "\n" not in str(refused.value)


def test_a_report_is_read_without_torch_ray_or_matplotlib(finished: RunDirectory):
    """In a process of its own, as others here have imported them: they would cost its reader seconds."""
    asked = f"from raysubset import report; report.sections(report.read_report({finished.uri!r}))"
    told = "import json, sys; print(json.dumps([name for name in sys.modules if '.' not in name]))"
    done = subprocess.run([sys.executable, "-c", f"{asked}; {told}"], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "matplotlib", "pandas"} & set(json.loads(done.stdout))


# Files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory(str(tmp_path_factory.mktemp("finished")), "a-run")
    record = a_record()
    rounds = [round_of([minimum(n) for n in range(2)], round=n) for n in range(2)]
    run.write_json(REPORT_PATH, record | {"stages": record["stages"] | {"rounds": rounds}})
    write_files(run.uri)
    return run


def test_progress_csv_has_a_row_an_epoch(finished: RunDirectory):
    rows = list(csv.DictReader(io.StringIO(finished.read_bytes("progress.csv").decode())))
    assert len(rows) == 2 * 2 * 8 + 2
    last = rows[7]
    assert (last["stage"], last["round"], last["subset"], last["epoch"]) == ("subsets", "0", "0", "8.0")
    assert (last["training_iteration"], last["num_steps"]) == ("8", "16")
    assert float(last["loss"]) == 1 / 8
    assert float(last["passes"]) == 8 * 25 / 100
    assert float(last["validation_loss"]) == pytest.approx(0.2)
    assert rows[6]["validation_loss"] == ""  # an actor measures at its end
    assert [float(r["validation_loss"]) for r in rows[-2:]] == pytest.approx([0.2, 0.1])


def test_tensorboard_reads_the_events_back_and_once(finished: RunDirectory):
    first = finished.read_bytes("progress.csv")
    write_files(finished.uri)
    assert finished.read_bytes("progress.csv") == first
    (path,) = [path for path in finished.list() if path.startswith("events.out.tfevents.")]
    events = EventAccumulator(str(finished.local_path / path if finished.local_path else path))
    events.Reload()
    losses = events.Scalars("subset_0001/loss")
    assert [event.step for event in losses] == [2 * n for n in range(1, 9)] + [16 + 2 * n for n in range(1, 9)]
    assert losses[-1].value == pytest.approx(1 / 8)
    assert [e.value for e in events.Scalars("fine_tuning/validation_loss")] == pytest.approx([0.2, 0.1])
    assert [e.step for e in events.Scalars("aggregate/validation_loss")] == [1, 2]
    assert events.Scalars("result/test_accuracy")[0].value == pytest.approx(0.9)


def test_files_for_tools_have_the_quality_by_its_name(tmp_path: Path):
    run = RunDirectory(str(tmp_path), "a-run")
    run.write_json(REPORT_PATH, of_task(a_record(), "next_token", BITS))
    write_files(run.uri)
    rows = list(csv.DictReader(io.StringIO(run.read_bytes("progress.csv").decode())))
    assert float(rows[7]["validation_bits"]) == pytest.approx(1.8)  # 30 of 50 right
    assert not [name for name in rows[0] if "accuracy" in name]
    (path,) = tmp_path.glob("a-run/events.out.tfevents.*")
    events = EventAccumulator(str(path))
    events.Reload()
    assert events.Scalars("result/test_bits")[0].value == pytest.approx(1.2)
    assert [event.value for event in events.Scalars("aggregate/validation_bits")] == pytest.approx([1.68])
    assert "accuracy" not in (tmp_path / "a-run/report/report.html").read_text()


def test_sizes_by_speed_are_told_with_the_speeds_and_what_measuring_them_cost():
    record = a_record()
    assert "Sizes are by" not in " ".join(map(str, one(sections(record), "Minima").lines))
    slots = [{"kind": "A100 (8 CPU + 1 GPU)", "speed": 70.0}, {"kind": "T4 (4 CPU + 1 GPU)", "speed": 20.0}]
    record["decisions"] |= {"slots": [slots[0], *slots], "shares": [70.0, 70.0, 20.0]}
    record["cost"]["stages"].insert(0, stage_cost("measuring", 0.5, 0.5))
    told = " ".join(map(str, one(sections(record), "Minima").lines))
    assert "follow the speed of the nodes (A100 (8 CPU + 1 GPU) 70, T4 (4 CPU + 1 GPU) 20)" in told
    (row,) = [row for row in one(sections(record), "Stages").rows if row[0] == "measuring of speeds"]
    assert row[5:7] == ("0.50", "0.50")
