"""sweep() by real Tune trials on a local cluster: sharing, failing, pruning, going on, and in an object store."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from raysubset import Config, load_model, run
from raysubset.events import Event, Note, TrialReport
from raysubset.report import sweep_sections, write_files
from raysubset.run_directory import RunDirectory, weights_path
from raysubset.run_directory.ledger import Ledger
from raysubset.sweeping import SweepReport, sweep
from tests.buckets import bucket
from tests.tiny import stored_weights

# isort: split
import ray
from ray.tune.schedulers import TrialScheduler  # after raysubset.cluster, which sets what Ray reads when it is imported

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]

SMALL = {"subsets.num": 2, "minimize.epochs": 1.0, "fine_tuning.epochs": 0.0}
SMALL |= {"actors.max_num": 1}  # each takes seconds of a CPU to start


def a_sweep(folder: Path | str, sizes: list[int], **options: Any) -> tuple[SweepReport, list[Event]]:
    events: list[Event] = []
    overrides, heed = SMALL | options.pop("overrides", {}), options.pop("heed", lambda event: None)

    def on_event(event: Event) -> None:
        events.append(event)
        heed(event)

    config = Config(name="sweep", storage_path=str(folder)).with_overrides(overrides)
    report = sweep(config, {"subsets.size": sizes}, seeds=1, on_event=on_event, **options)
    return report, events


def test_a_failed_trial_is_named_the_others_finish_and_the_same_sweep_goes_on(tmp_path: Path) -> None:
    def take_place_of_one(event: Event) -> None:
        if "trials at once" in event.text:
            taken = RunDirectory(str(tmp_path / "sweep/trials"), "subsets.size-300_seed-0")
            taken.open({"of": "another config"}, {})

    report, events = a_sweep(tmp_path, [100, 200, 300], heed=take_place_of_one)
    states = {trial["overrides"]["subsets.size"]: trial["state"] for trial in report.trials}
    assert states == {100: "done", 200: "done", 300: "failed"}
    assert report.trials[2]["error"].startswith("ValueError: ")
    assert "subsets.size-300_seed-0 holds a run of another config" in report.trials[2]["error"]
    (failed,) = [event.text for event in events if isinstance(event, Note) and event.is_warning]
    assert "subsets.size-300_seed-0 failed (ValueError: " in failed
    assert report.recommended is not None
    told = {event.report["stage"] for event in events if isinstance(event, TrialReport)}
    assert told >= {"subsets", "aggregation", "done"}

    # the trunk was run once, by itself; each trial's own cost has it in full, the sweep's once
    trunk = {work for work in Ledger(RunDirectory.at(report.trials[0]["uri"])).read() if work.stage == "trunk"}
    assert trunk == {work for work in Ledger(RunDirectory.at(report.trials[1]["uri"])).read() if work.stage == "trunk"}
    assert len(trunk) == 1
    share = RunDirectory.at(report.trials[0]["uri"]).read_json("report.json")["model"]["forward_share"]
    shared = next(iter(trunk)).cost.passes(1294, share)
    assert report.passes == pytest.approx(sum(trial["passes"] for trial in report.trials[:2]) - shared)

    # a trial is the run that the same config would be by itself
    config = Config(name="alone", storage_path=str(tmp_path)).with_overrides(
        SMALL | {"subsets.size": 100, "fine_tuning.num_workers": 1}
    )
    alone, swept = run(config), RunDirectory.at(report.trials[0]["uri"])
    own = RunDirectory.at(alone.uri)
    for path in (weights_path("trunk"), "rounds/0000/aggregate.safetensors"):
        a, b = stored_weights(own, path), stored_weights(swept, path)
        assert all(torch.equal(a[key], b[key]) for key in a), path
    assert alone.passes == pytest.approx(report.trials[0]["passes"])

    assert len(sweep_sections(report.to_dict())) == 4  # settings, what fine-tuning did, what failed, what this tells
    assert write_files(report.uri)

    # without its own report, as if the driver had been killed: what is done is read back, what failed is tried again
    (tmp_path / "sweep" / "sweep.json").unlink()
    before = (tmp_path / "sweep/trials/subsets.size-100_seed-0/report.json").stat().st_mtime_ns
    again, events = a_sweep(tmp_path, [100, 200])
    assert any("resuming" in event.text for event in events)
    assert [trial["passes"] for trial in again.trials] == [trial["passes"] for trial in report.trials[:2]]
    assert again.record["seconds"]["num_sessions"] == 2
    assert again.record["seconds"]["wall"] > report.record["seconds"]["wall"] > 0
    assert (tmp_path / "sweep/trials/subsets.size-100_seed-0/report.json").stat().st_mtime_ns == before
    # and what is finished is not begun again
    last, events = a_sweep(tmp_path, [100, 200])
    assert "is finished" in events[0].text
    assert last.to_dict() == again.to_dict()


class StopOne(TrialScheduler):
    """Stops the trial of 200 examples before its fine-tuning."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        pending = [t for t in tune_controller.get_trials() if t.status in ("PENDING", "PAUSED")]
        return pending[0] if pending else None

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None: ...
    def on_trial_error(self, tune_controller: Any, trial: Any) -> None: ...
    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None: ...
    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None: ...

    def debug_string(self) -> str:
        return "stops one"

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        behind = result["stage"] == "aggregation" and trial.config["trial"]["subsets.size"] == 200
        return self.STOP if behind else self.CONTINUE


@dataclass(frozen=True)
class Pruned:
    """A sweep with Ray Train in an object store: one of its two trials was pruned."""

    report: SweepReport
    events: list[Event]
    storage_path: str
    of_tune: list[Path]  # the folders with Tune's own files


SECRET = "a-secret-that-stands-nowhere"
WHOLE = {"fine_tuning.epochs": 2.0, "fine_tuning.num_workers": 2, "actors.num_cpus": 2, "trunk.epochs": 0.0}


@pytest.fixture(scope="module")
def pruned(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pruned]:
    kept: list[Path] = []

    class Kept:
        """TemporaryDirectory that stays, so that Tune's files can be read."""

        def __init__(self, prefix: str) -> None:
            kept.append(tmp_path_factory.mktemp(prefix))

        def __enter__(self) -> str:
            return str(kept[-1])

        def __exit__(self, *error: object) -> None: ...

    with bucket("runs/results", SECRET) as uri, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("raysubset.sweeping.driver.TemporaryDirectory", Kept)
        report, events = a_sweep(uri, [200, 100], overrides=WHOLE, scheduler=StopOne())
        yield Pruned(report, events, uri, kept)


def test_a_pruned_trial_leaves_the_cluster_to_one_that_trains_on_all_of_it(pruned: Pruned) -> None:
    report = pruned.report
    assert report.record["at_once"] == {"trials": 1, "slots_each": 2}
    assert [trial["state"] for trial in report.trials] == ["pruned", "done"]
    reports = [event.report for event in pruned.events if isinstance(event, TrialReport)]
    epochs = [report for report in reports if report["stage"] == "fine_tuning"]
    assert [report["epoch"] for report in epochs] == [1.0, 2.0]
    assert epochs[0]["passes"] < epochs[1]["passes"] < report.trials[1]["passes"] < report.passes


def test_a_sweep_with_ray_train_lives_in_an_object_store_whose_secret_is_in_no_file(pruned: Pruned) -> None:
    """Tune's tuner.pkl and state files had it, and Ray's logs."""
    _, trial = pruned.report.trials
    assert SECRET not in trial["uri"]
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())  # pyright: ignore
    files = [path for folder in (*pruned.of_tune, session) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "tuner.pkl" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    directory = RunDirectory(pruned.storage_path, "sweep")
    names = directory.list("", recursive=True)
    assert names
    assert [name for name in names if SECRET.encode() in directory.read_bytes(name)] == []

    name = trial["uri"].partition("?")[0].rpartition("/")[2]
    path, _, query = pruned.storage_path.partition("?")
    made = RunDirectory(f"{path}/sweep/trials?{query}", name)
    assert made.read_json("fine_tuning/minimum.json")["num_workers"] == 2
    notes: list[str] = []
    own = Config(name=name, storage_path=made.storage_path).with_overrides(SMALL | WHOLE | {"subsets.size": 100})
    again = run(own, on_event=lambda event: notes.append(event.text))
    assert "is finished" in notes[0]
    assert again.test.to_dict() == made.read_json("report.json")["test"]
    assert load_model(f"{path}/sweep/trials/{name}?{query}").class_names == tuple("0123456789")
