"""sweep() plans the trials, runs them by Ray Tune, and gathers their results."""

import contextlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import ray
from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from raysubset.cluster import num_gpus_of, num_slots, put_once, workplace
from raysubset.config import ActorsConfig, Config, Learned
from raysubset.data import FullSet
from raysubset.errors import one_line
from raysubset.events import Note, OnEvent, Stage, TrialReport, Waiting
from raysubset.legs import Leg, LegRunner
from raysubset.objects_in_hand import accepts_objects
from raysubset.pipeline.decisions import refuse_what_has_no_place
from raysubset.pipeline.run_report import task_record
from raysubset.pipeline.session import Command
from raysubset.planning import Plan, make_plan
from raysubset.quality import Quality
from raysubset.run_directory import REPORT_PATH, SWEEP_PATH, RunDirectory
from raysubset.run_directory.ledger import Work, total_cost
from raysubset.sweeping.lookout import TrialsLookout
from raysubset.sweeping.plan import Trial, divide, plan_trials, shared_trunks, widest_stage
from raysubset.sweeping.records import Record, SweepReport, recommend, recommendation, settings_of, trial_measures
from raysubset.sweeping.standing import TrialsStanding
from raysubset.sweeping.trials import Task, run_trial
from raysubset.training import Cost
from raysubset.user_code.source_files import at
from raysubset.work import Run
from raysubset.work.identity import places_notes

# A trial only waits for its actors and workers, so it takes no resources that they need. It stays on the head, which is
# the last node to go
PLACE_OF_TRIAL = {"node:__internal_head__": 0.001}

FIRST_JUDGED_PASSES = 1  # ASHA's grace period: at least the usual trunk
MOST_PASSES = 1_000_000  # beyond any run: ASHA stops a trial that gets there
FEWER = 2  # ASHA's reduction factor: each rung lets this fraction of trials continue, 1 / FEWER


@accepts_objects
def sweep(
    config: Config,
    space: Mapping[str, Any],
    *,
    data: Any = None,
    model: Any = None,
    task: Any = None,
    seeds: int | Sequence[int] = 3,
    num_samples: int = 1,
    scheduler: TrialScheduler | Literal["asha"] | None = None,
    on_event: OnEvent | None = None,
    baseline: bool = False,
    fresh: bool = False,
    accept_changed_code: bool = False,
) -> SweepReport:
    """Run the whole pipeline for each point of a space and each seed, side by side as the cluster has room.

    Each trial is a run with its own name below the sweep's directory. A sweep of the same name resumes: finished trials
    are read back, others continue where they stopped, and values and seeds may be added. A trial that fails ends no
    other, and the report names it. If this process dies, call it again.

    Args:
        config: what all trials have in common. Its name and storage path are the sweep's.
        data, model, task: objects instead of names, as for run().
        space: dotted names of fields to lists of values, all combinations of which run, or to Tune's distributions.
        seeds: their number, from config.seed on, or the seeds themselves.
        num_samples: of the distributions.
        scheduler: "asha" stops trials that fall behind others at equal passes (time_attr="passes"). Or one of Tune's,
            without metric and mode, which may stop a trial but not pause it. No trial is stopped in a Ray Train job.
        baseline: also run conventional training with each seed, for `conventional.epochs`, or else for as many epochs
            as a subset has over all rounds: a line in the figure, and the reference for shares of costs.
        on_event: receives the trials' begins, reports and ends; None: nobody does. Without it, raysubset.sweep() shows
            the events, as the command does.
        fresh: delete the earlier sweep of this name, and start over.
        accept_changed_code: resume although the user's code has changed; finished work stays as it is.

    Raises:
        ValueError: for the user's mistakes, with the way out.
    """
    command = Command("sweep", config, on_event, fresh=fresh, accept_changed_code=accept_changed_code)
    directory, tell = command.directory, command.tell
    if config.tracking.names():
        config = command.config = config.with_overrides({"tracking.group": config.tracking.group or directory.name})
    seeds = command.chosen_seeds(seeds, least=1)
    places = {"storage_path": directory.below("trials"), "baseline": baseline}
    trials = plan_trials(config, space, seeds=seeds, num_samples=num_samples, **places)
    configs = [trial.config for trial in trials]
    full_sets: dict[Learned, FullSet] = {}
    if command.has_report(SWEEP_PATH) and (record := _finished(directory, trials)) is not None:
        command.tell_finished(configs, full_sets)
        return SweepReport.from_dict(record | {"uri": directory.uri})  # it may have been moved
    tell(Waiting("reading the data, and planning each setting"))
    identity = command.load(configs, full_sets)
    if losses := _different_losses(full_sets.values()):
        if scheduler is not None:
            raise ValueError(f"{losses}, by which a scheduler stops trials: leave --prune out, or sweep over one loss")
        tell(Note(losses, is_warning=True))
    for note in places_notes(identity):
        tell(note)

    @cache
    def plan_of(setting: Config) -> Plan:
        return make_plan(setting, full_sets[setting.learned])  # refuses settings that no trial can run

    plans = {trial.name: plan_of(trial.config.with_overrides({"seed": 0, "name": None})) for trial in trials}

    def passes(trial: Trial, cost: Cost) -> float:
        return cost.passes(len(full_sets[trial.config.learned].train), plans[trial.name].forward_share)

    with command.opened(identity, partial(_refuse_no_place, trials)) as sessions:
        tell = sessions.checked(tell)
        sessions.started_up()
        full_set_refs = {learned: put_once(full_set) for learned, full_set in full_sets.items()}
        at_once, slots_each = _divide_cluster(trials, tell)
        tell(Note(f"{at_once} of {len(trials)} trials at once, of at most {slots_each} actors or workers each"))
        trunks = _run_trunks(trials, full_sets, full_set_refs, directory, tell)
        tasks = {}
        for trial in trials:  # with no more actors at a time than a trial has places: the field shapes no result
            room = {"actors.max_num": min(slots_each, trial.config.actors.max_num or slots_each)}
            full_set_ref, trunk = full_set_refs[trial.config.learned], trunks.get(trial.name)
            config_with_room, share = trial.config.with_overrides(room), plans[trial.name].forward_share
            tasks[trial.name] = Task(config_with_room, full_set_ref, trunk, share, accept_changed_code)
        if scheduler == "asha":
            scheduler = ASHAScheduler(
                time_attr="passes", max_t=MOST_PASSES, grace_period=FIRST_JUDGED_PASSES, reduction_factor=FEWER
            )
        tell(Waiting("Ray Tune starts"))
        quality = full_sets[trials[0].config.learned].quality
        found = {trial.name: passes(trial, total_cost(trial.works())) for trial in trials}
        standing = TrialsStanding(quality, {name: plan.passes for name, plan in plans.items()}, found)
        lookout = TrialsLookout(tell, stall_s=config.actors.stall_s)
        callback = _TrialEvents(tell, standing, lookout)
        errors = _tune(trials, tasks, directory, scheduler=scheduler, most_at_once=at_once, callback=callback)
        record = {
            "task": task_record(full_sets[trials[0].config.learned]),
            "seeds": list(seeds),
            **_gather(trials, space, errors, quality, losses),
            "cost": _total_cost(trials, passes),
            "at_once": {"trials": at_once, "slots_each": slots_each},
        }
        record = command.leave(SWEEP_PATH, record, sessions)
    return SweepReport.from_dict(record)


def _refuse_no_place(trials: Sequence[Trial], directory: RunDirectory | None) -> None:
    for trial in trials:
        if directory is None or not trial.directory.exists(REPORT_PATH):
            refuse_what_has_no_place(trial.config, directory and trial.directory)


def _different_losses(full_sets: Collection[FullSet]) -> str:
    """Return in words that the trials minimize different losses, or "" if they do not.

    Raises:
        ValueError: if they learn different things.
    """
    qualities = sorted({full_set.quality.unit or full_set.quality.name for full_set in full_sets})
    losses = sorted({full_set.task.loss_name for full_set in full_sets})
    if len(qualities) > 1:
        names = ", ".join(qualities)
        raise ValueError(f"the trials learn different things ({names}), which cannot be compared: sweep over one task")
    text = f"the trials minimize different losses ({', '.join(losses)}), so their validation losses cannot be compared"
    return text if len(losses) > 1 else ""


def _finished(directory: RunDirectory, trials: Sequence[Trial]) -> Record | None:
    """Return the report of a finished sweep of these trials; None if work is left.

    Work is left if a trial failed, or if something of a trial is damaged or missing (with a warning).
    """
    record = directory.read_json_or_none(SWEEP_PATH)
    states = {trial["name"]: trial["state"] for trial in record["trials"]} if record else {}
    if states.keys() != {trial.name for trial in trials}:
        return None
    for trial in trials:
        is_done = states[trial.name] == "done" and trial.directory.read_record(REPORT_PATH, whole=True) is not None
        if not is_done and states[trial.name] != "pruned":
            return None
    return record


def _divide_cluster(trials: Sequence[Trial], tell: OnEvent) -> tuple[int, int]:
    """Return divide() by what the cluster has or its autoscaler may start, and the most that any trial requests."""
    actors = dict.fromkeys(trial.config.actors for trial in trials)  # each once, so that it is reported once
    num_gpus = max(num_gpus_of(each, tell) for each in actors)
    request = {"CPU": max(each.num_cpus for each in actors), "GPU": num_gpus}
    widest = max(widest_stage(trial.config) for trial in trials)
    return divide(num_slots(request, startable=True), widest=widest, num_trials=len(trials))


def _run_trunks(
    trials: Sequence[Trial],
    full_sets: Mapping[Learned, FullSet],
    full_set_refs: Mapping[Learned, Sequence[ray.ObjectRef]],
    directory: RunDirectory,
    tell: OnEvent,
) -> dict[str, RunDirectory]:
    """Run each trunk that trials share, once. Return where it lies by trial name; a trunk that fails is left out."""
    shared = shared_trunks(trials, directory.below("trunks"))
    groups: dict[tuple[Learned, ActorsConfig], list[Leg]] = defaultdict(list)
    for leg in dict.fromkeys(shared.values()):
        groups[leg.config.learned, leg.config.actors].append(leg)
    if groups:
        tell(Stage(f"trunks: {len(set(shared.values()))} that trials share"))
    failed: set[Leg] = set()
    for (learned, actors), legs in groups.items():
        run = Run(legs[0].config, directory, full_sets[learned], full_set_refs[learned], tell)
        with LegRunner(run, num_gpus=num_gpus_of(actors, tell), then="each of its trials runs its own") as runner:
            runner.run(legs)
        failed |= runner.failed.keys()
    return {name: leg.directory for name, leg in shared.items() if leg not in failed}


def _tune(
    trials: Sequence[Trial],
    tasks: Mapping[str, Task],
    directory: RunDirectory,
    *,
    scheduler: TrialScheduler | None,
    most_at_once: int,
    callback: "_TrialEvents",
) -> dict[str, str]:
    """Run the trials to their ends. Return the causes of failures, each in a line, by trial name.

    Tune pickles the file system that it writes to, with credentials. So for remote storage Tune gets a temporary folder
    of this machine, which is deleted at the end: nothing is read from it again.
    """
    points = [{"name": trial.name, "seed": trial.seed, **trial.overrides} for trial in trials]
    session = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")  # a new folder for Tune each time: it resumes nothing
    with TemporaryDirectory(prefix="tune-") as temporary, _quiet_tune():
        folder = directory.local_path / "tune" if directory.local_path else temporary
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(at(workplace(), run_trial), tasks=dict(tasks), pulses=callback.lookout.key),
                PLACE_OF_TRIAL,
            ),
            param_space={"trial": tune.grid_search(points)},
            tune_config=tune.TuneConfig(
                metric="validation_loss",
                mode="min",
                scheduler=scheduler,
                max_concurrent_trials=most_at_once,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(name=session, storage_path=str(folder), verbose=0, callbacks=[callback]),
        )
        results: Any = tuner.fit()
        return {result.config["trial"]["name"]: one_line(result.error) for result in results if result.error}


_TUNE_SETTINGS = {  # in the environment
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # we handle Ctrl-C: Tune would end quietly, as if all were done
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # reports between validations lack validation_loss
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints tables to stdout at any verbosity
}


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Silence Tune's log, which shows the whole traceback of each failed trial. Tune's error.txt has it.

    Settings that the user's environment lacks are set for the block alone: the process may have other uses of Tune.
    """
    log = logging.getLogger("ray.tune")
    level, lacking = log.level, {name: value for name, value in _TUNE_SETTINGS.items() if name not in os.environ}
    log.setLevel(logging.CRITICAL)
    os.environ.update(lacking)
    try:
        yield
    finally:
        for name in lacking:
            os.environ.pop(name, None)
        log.setLevel(level)


def _trial_name(trial: Any) -> str:
    return trial.config["trial"]["name"]


class _TrialEvents(tune.Callback):
    """Passes what Tune reports of its trials on to the sweep's listener, and has their processes watched."""

    def __init__(self, tell: OnEvent, standing: TrialsStanding, lookout: TrialsLookout) -> None:
        self._tell, self._standing, self.lookout = tell, standing, lookout

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle nothing, as a terminal's listener holds locks. Tune pickles callbacks, but nobody reads them."""
        return tune.Callback, ()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.lookout.look({_trial_name(trial) for trial in trials if trial.status == "RUNNING"})

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(Stage(f"{_trial_name(trial)} starts"))
        self._tell(self._standing.update(_trial_name(trial), "at work"))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell(self._standing.update(_trial_name(trial), "at work", result))
        if "validation_loss" in result:
            loss = result["validation_loss"]
            text = f"{_trial_name(trial)}: {result['stage']}, {result['passes']:.2f} passes, validation loss"
            text += f" {loss:.4f}" if math.isfinite(loss) else " not finite"
            self._tell(TrialReport(text, _trial_name(trial), result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(self._standing.update(_trial_name(trial), "done"))
        self._tell(Note(f"{_trial_name(trial)} ends after {trial.last_result.get('passes', 0.0):.2f} passes"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(self._standing.update(_trial_name(trial), "failed"))
        file = trial.pickled_error_file  # get_pickled_error() looks in Tune's storage, which has it a moment later
        why = f" ({one_line(cloudpickle.loads(Path(file).read_bytes()))})" if file and Path(file).exists() else ""
        self._tell(Note(f"{_trial_name(trial)} failed{why}; the others continue", is_warning=True))


def _gather(
    trials: Sequence[Trial], space: Mapping[str, Any], errors: Mapping[str, str], quality: Quality, losses: str
) -> Record:
    """Return what the trials' run directories and Tune's errors amount to: trials, settings, and the recommendation.

    `losses` is what _different_losses() returns: if they differ there is no recommendation.
    """
    records, swept, conventional = list[Record](), list[Record](), list[Record]()
    for trial in trials:
        record: Record = {"name": trial.name, "uri": trial.directory.uri}
        record |= {"overrides": dict(trial.overrides), "seed": trial.seed, "state": "pruned"}
        if (report := trial.directory.read_json_or_none(REPORT_PATH)) is not None:
            record |= {"state": "done", **trial_measures(report)}
        elif trial.name in errors:
            record |= {"state": "failed", "error": errors[trial.name]}
        (conventional if trial.is_baseline else swept).append(record)
        records.append(record)
    settings = settings_of(swept, quality)
    return {
        "space": {key: list(dict.fromkeys(trial["overrides"][key] for trial in swept)) for key in space},
        "trials": records,
        "settings": settings,
        "baseline": settings_of(conventional, quality)[0] if conventional else None,
        "recommended": None if losses else recommend(settings),
        "recommendation": f"No recommendation: {losses}." if losses else recommendation(settings),
    }


def _total_cost(trials: Sequence[Trial], passes: Callable[[Trial, Cost], float]) -> Record:
    """Return the cost of all trials, with pruned and failed ones. A shared trunk, in several ledgers, counts once."""
    sums, counted_trunks = {"passes": 0.0, "device_s": 0.0}, set[Work]()
    for trial in trials:
        works = trial.works()
        cost = total_cost([work for work in works if work not in counted_trunks])
        counted_trunks |= {work for work in works if work.stage == "trunk"}
        sums["passes"] += passes(trial, cost)
        sums["device_s"] += cost.device_s
    return sums
