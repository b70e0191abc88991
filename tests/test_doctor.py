from pathlib import Path
from typing import Any

import pytest

from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.doctor import Check, examine, passes_in_turn
from raysubset.planning import make_plan, planned_steps
from raysubset.report import read_report
from raysubset.run_directory import CONFIG_PATH, FORMAT, REPORT_PATH, Lease, RunDirectory
from raysubset.work.identity import identify


def before_ray(config: Config) -> dict[str, list[Check]]:
    """The checks by name up to the storage's: asking for the next would start Ray."""
    checks: dict[str, list[Check]] = {}
    for check in examine(config):
        checks.setdefault(check.name, []).append(check)
        if check.name == "earlier run" or (check.name == "storage" and check.ok is False):
            break
    return checks


def config_in(tmp_path: Path, **overrides: Any) -> Config:
    return Config(name="a-run", storage_path=str(tmp_path)).with_overrides(overrides)


def test_a_config_that_can_run_has_no_failures(tmp_path: Path):
    checks = before_ray(config_in(tmp_path))
    assert not [check for found in checks.values() for check in found if check.ok is False]
    assert "1294 to train on, 144 validation, 359 test" in checks["data"][0].text
    assert any("Q of 4 subsets" in check.text for check in checks["subsets"])
    assert "a new run would start" in checks["earlier run"][0].text
    assert not list(tmp_path.iterdir())  # looked only


def test_bad_data_fails_and_what_depends_on_it_is_skipped(tmp_path: Path):
    checks = before_ray(config_in(tmp_path, **{"data.name": "digts"}))
    assert (checks["data"][0].ok, checks["model"][0].ok) == (False, None)
    assert "did you mean digits?" in checks["data"][0].text
    assert "not checked" in checks["model"][0].text
    assert checks["storage"][0].ok


@pytest.mark.parametrize(
    ("overrides", "told"),
    [({"subsets.num": 4, "subsets.size": 1000}, "1294"), ({"model.name": "resnet1888"}, "resnet18")],
)
def test_a_model_or_cut_that_does_not_fit_fails(tmp_path: Path, overrides: dict[str, Any], told: str):
    (check,) = before_ray(config_in(tmp_path, **overrides))["model and subsets"]
    assert check.ok is False
    assert told in check.text


def test_storage_that_cannot_be_written_fails_with_the_way_out():
    (check,) = before_ray(Config(storage_path="/proc/none"))["storage"]
    assert check.ok is False
    assert "--storage-path" in check.text


def test_an_earlier_run_is_told_of(tmp_path: Path):
    config = config_in(tmp_path)
    run = RunDirectory(str(tmp_path), "a-run")
    run.open(config.to_dict(), {}, identify([config], {}, None))

    def earlier(config: Config) -> Check:
        return before_ray(config)["earlier run"][0]

    assert "would resume it" in earlier(config).text
    other = earlier(config_in(tmp_path, **{"minimize.epochs": 3.0}))
    assert other.ok is False
    assert "minimize.epochs: 8.0 → 3.0" in other.text
    run.write_json(CONFIG_PATH, {"format": FORMAT, "config": None})  # as a driver leaves it that died in --fresh
    assert earlier(config).ok
    assert "partly deleted" in earlier(config).text
    with pytest.raises(ValueError, match=r"there is no run at .*: --fresh began to delete it"):
        read_report(run.uri)
    run.open(config.to_dict(), {}, identify([config], {}, None))
    with Lease(run):
        assert earlier(config).ok is False
        assert "is being written by" in earlier(config).text
    run.write_json(REPORT_PATH, {})
    assert earlier(config).ok is None
    assert "finished" in earlier(config).text


def test_a_folder_that_is_no_run_fails(tmp_path: Path):
    (tmp_path / "a-run" / "photos").mkdir(parents=True)
    (tmp_path / "a-run" / "photos" / "1.png").write_bytes(b"")
    check = before_ray(config_in(tmp_path))["earlier run"][0]
    assert check.ok is False
    assert "photos/1.png" in check.text


def test_a_cluster_that_does_not_answer_fails_at_once_and_the_rest_is_skipped(tmp_path: Path):
    *_, ray, rest = examine(config_in(tmp_path, **{"cluster.address": "127.0.0.1:1"}))
    assert (ray.name, ray.ok, rest.ok) == ("Ray", False, None)
    assert "no Ray cluster answers at 127.0.0.1:1" in ray.text
    assert "not checked" in rest.text


def test_time_counts_the_subsets_that_queue():
    config = Config().with_overrides({"subsets.num": 5, "subsets.size": 200, "minimize.epochs": 2.0, "rounds.num": 3})
    config = config.with_overrides({"trunk.epochs": 1.0, "fine_tuning.epochs": 4.0, "fine_tuning.num_workers": 2})
    plan = make_plan(config, load_full_set(config.data))
    # 5 subsets on 2 slots are 3 turns; a trunk of one pass; 4 epochs by 2 workers
    passes = passes_in_turn(planned_steps(config, plan, 1294, 2))
    assert passes == pytest.approx((3 * 2 * (3 * 200) + 1294 + 4 * 1294 / 2) / 1294)
    # a slot each: one turn
    passes = passes_in_turn(planned_steps(config, plan, 1294, 5))
    assert passes == pytest.approx((3 * 2 * 200 + 3 * 1294) / 1294)
    # five minima teach in each of four epochs, in which two workers share them
    config = config.with_overrides({"fine_tuning.distillation": 0.5})
    taught = passes_in_turn(planned_steps(config, plan, 1294, 5))
    assert taught == pytest.approx(passes + 4 * 5 * plan.forward_share / 2)


def test_time_of_a_conventional_run_is_its_passes_over_its_workers():
    config = Config(method="conventional").with_overrides({"conventional.epochs": 3.0, "conventional.num_workers": 2})
    plan = make_plan(config, load_full_set(config.data))
    assert passes_in_turn(planned_steps(config, plan, 1294, 1)) == pytest.approx(3 / 2)
