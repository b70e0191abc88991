"""run() does the stages of one run in order. Read this file first.

[trunk] → rounds × (subset minima in parallel → aggregate) → [shrink-perturb] → fine-tune on the full set → report

report = run(Config(), on_event=lambda event: print(event.text))
report.test.accuracy, report.passes, report.critical_path_passes
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from raysubset import uris
from raysubset.cluster import get_shared, num_slots, own_address, put_once
from raysubset.config import Config
from raysubset.costs import works_of
from raysubset.data import refuse_changed_files
from raysubset.errors import counted
from raysubset.events import EpochDone, Event, Note, OnEvent, Planned, Progress, Waiting, stage_event
from raysubset.fine_tuning import refuse_old_ray_train
from raysubset.legs import FRESH, Leg, Start
from raysubset.models import architecture
from raysubset.objects_in_hand import accepts_objects
from raysubset.pipeline.decisions import Decisions, refuse_what_has_no_place
from raysubset.pipeline.node_speeds import fastest_nodes, in_words, speed_of_node
from raysubset.pipeline.rounds import Rounds
from raysubset.pipeline.run_report import RunReport, cost_record, data_record, task_record
from raysubset.pipeline.session import Command
from raysubset.planning import Plan, actor_bytes, make_plan, planned_steps
from raysubset.planning.idle_settings import idle_settings
from raysubset.quality import metrics_in_words
from raysubset.run_directory import (
    ENVIRONMENT_PATH,
    FROZEN_FOLDER,
    REPORT_PATH,
    RESULT_PATH,
    TRACES_FOLDER,
    CorruptFile,
    RunDirectory,
    Seal,
    history_path,
    minimum_path,
    weights_path,
)
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors import ActorPool, Pack, minimum_done
from raysubset.tasks import NextToken
from raysubset.tracking import track_finished, tracked
from raysubset.trained_model import ModelRecord, leave_samples, save_model
from raysubset.training import Weights
from raysubset.user_code.given import is_given
from raysubset.work import Output, Piece, Run, TestPiece, leave_test, restore_frozen, seeded_model
from raysubset.work.identity import places_notes


@accepts_objects
def run(
    config: Config,
    *,
    data: Any = None,
    model: Any = None,
    task: Any = None,
    on_event: OnEvent | None = None,
    fresh: bool = False,
    accept_changed_code: bool = False,
    full_set_ref: Sequence[Any] | None = None,
    trunk: RunDirectory | None = None,
) -> RunReport:
    """Run all stages that the run directory does not hold yet, and leave a report there.

    A run of the same name is resumed: finished work is read back, unfinished work continues from its checkpoints.
    If this process dies, call run() again.

    Args:
        config: what to run.
        data: replaces data.name: arrays, tables, texts, a Dataset, or a function that returns one of these. The
            manual lists all that such a function may return.
        model: replaces model.name: an nn.Module, whose weights become the shared start, or a function of a Spec.
        task: replaces task.name: a raysubset.tasks.Task, or a subclass of it.
        on_event: called with stages, progress, waiting and retries as they happen. Without it nothing is shown;
            raysubset.run() then shows events as the command does.
        fresh: delete what a run of this name left behind, and start over.
        accept_changed_code: resume a run although the user's code has changed since. Finished work is kept.
        full_set_ref: the full set of config.data in the object store, from put_once(). By default it is loaded and put.
        trunk: the run directory of an equal trunk, as a sweep's leg leaves it. Its weights are copied here, and its
            cost is counted here in full.

    Raises:
        ValueError: the user's mistake, with the way out.
        SubsetFailed, FineTuningFailed: if work failed more often than actors.max_attempts allows.
    """
    refuse_old_ray_train()
    command = Command("run", config, on_event, fresh=fresh, accept_changed_code=accept_changed_code)
    directory, tell = command.directory, command.tell
    full_sets = {} if full_set_ref is None else {config.learned: get_shared(full_set_ref)}
    # None also if something that it names is damaged or missing, with a warning
    if command.has_report(REPORT_PATH) and (record := directory.read_record(REPORT_PATH, whole=True)) is not None:
        command.tell_finished([config], full_sets)
        track_finished(config, directory, tell)
        with suppress(OSError):  # nothing is missing if the storage is read-only
            Ledger(directory).compact()  # unless its driver died in that
        return RunReport.from_dict(record | {"uri": directory.uri})  # it may have been moved
    # mistakes in the data are reported before Ray starts
    tell(Waiting(f"reading {uris.shown(config.data.name)}"))
    identity = command.load([config], full_sets)
    full_set = full_sets[config.learned]
    tell(Waiting("planning, with one trial step of training"))
    plan = make_plan(config, full_set)
    for note in (*places_notes(identity), *full_set.advice, *idle_settings(config), *plan.advice):
        tell(note)
    with (
        command.opened(identity, partial(refuse_what_has_no_place, config)) as sessions,
        tracked(config, directory, tell, quality=full_set.quality) as tell_trackers_too,
    ):
        tell_checked = sessions.checked(tell_trackers_too)
        stages = _Stages(Run(config, directory, full_set, full_set_ref or put_once(full_set), tell_checked), plan)
        tell(stages.planned())
        sessions.started_up()
        if trunk is not None:
            stages.take_over_trunk(trunk)
        record = stages.run()
        sessions.write()
        record["seconds"] = sessions.seconds()
        result = {key: record[key] for key in ("name", "test", "validation", "cost")}
        record["files"][RESULT_PATH] = directory.write_json(RESULT_PATH, result)
        directory.write_json(REPORT_PATH, record)
        Ledger(directory).compact()
    return RunReport.from_dict(record)


class _Stages:
    """Does the stages of one run. Each stage reads back what is done and does what is missing."""

    def __init__(self, run: Run, plan: Plan) -> None:
        self._run, self._plan = run, plan
        self._config, self._directory, self._full_set, self._tell = run.config, run.directory, run.full_set, run.tell
        self._decisions = Decisions(run, plan)
        self._by_train = ""  # the stage that a Ray Train job is at work on; "" if there is none
        self._num_epochs = 0  # epochs of that stage that are reported, or were done by an earlier driver

    def run(self) -> dict[str, Any]:
        """Do all stages and return the report's record.

        If a file is damaged, its record is deleted and the stages are repeated, which make it again: once a file.
        """
        damaged_paths: set[str] = set()
        while True:
            try:
                return self._conventional() if self._config.method == "conventional" else self._subset_pretraining()
            except CorruptFile as error:
                if error.path in damaged_paths:
                    raise
                damaged_paths.add(error.path)
                self._tell(Note(f"{error}; it is computed again", is_warning=True))
                self._directory.forget(error.path)
                if error.path.startswith(FROZEN_FOLDER):
                    self._restore_frozen(error.path)

    def _restore_frozen(self, path: str) -> None:
        """Write frozen weights again as the run's start has them; if they were others, have all work done again."""
        start = seeded_model(self._config, self._full_set).state_dict()
        if not restore_frozen(self._directory, path, start):
            for record_path in self._directory.list("", recursive=True):
                if record_path.endswith(("/minimum.json", "/aggregate.json")):
                    self._directory.delete(record_path)

    def planned(self) -> Planned:
        """Return the planned steps and passes, given how many actors the cluster can have at once."""
        config, sizes = self._config, [len(subset.indices) for subset in self._plan.subsets]
        request = {"CPU": config.actors.num_cpus, "GPU": self._decisions.num_gpus}
        at_once = max(1, min(len(sizes), num_slots(request, startable=True), config.actors.max_num or len(sizes)))
        num_train = len(self._full_set.train)
        text = f"planned: up to {self._plan.passes:.2f} passes of training in total"
        return Planned(text, tuple(planned_steps(config, self._plan, num_train, at_once)), num_train)

    def take_over_trunk(self, source: RunDirectory) -> None:
        """Copy the trunk of another directory and its work's record, unless this run has a trunk."""
        directory = self._directory
        if directory.exists(minimum_path("trunk")):
            return
        for work in Ledger(source).close_lost():
            if work.stage == "trunk":
                self._run.ledger.write(work)
        record, path = source.read_json(minimum_path("trunk")), weights_path("trunk")
        files = {path: directory.write_weights(path, source.read_weights(path, record["files"]))}
        directory.write_json(minimum_path("trunk"), record | {"files": files})

    def _subset_pretraining(self) -> dict[str, Any]:
        config, rounds = self._config, []
        if config.subsets.shares != "equal":
            self._plan = self._plan_by_speed()
        drawing = self._plan.drawing(config, self._directory)
        executor = Rounds(self._run, self._plan, self._decisions)
        start, trunk, fine_tuning = FRESH, None, None
        with self._pool() as pool:
            if config.trunk.epochs:
                start, trunk = self._on_full_set(pool, drawing.trunk())
            for round in range(config.rounds.num):
                refuse_changed_files(self._full_set)
                aggregate, record = executor.run(pool, round, start)
                start = Start("warm", aggregate)
                rounds.append(record)
            if config.fine_tuning.epochs:
                num_teachers = len(executor.members) if config.fine_tuning.distillation else 0
                num_workers = self._decisions.num_workers(num_teachers=num_teachers)
                leg = drawing.fine_tuning(start, executor.members, num_workers=num_workers)
                start, fine_tuning = self._on_full_set(pool, leg)
        last_stage = fine_tuning or rounds[-1]["aggregation"]
        record = self._report(start, last_stage["validation"], trunk=trunk, rounds=rounds, fine_tuning=fine_tuning)
        executor.finish()
        return record

    def _conventional(self) -> dict[str, Any]:
        """Do the baseline: one run on the full set, by one actor or by Ray Train.

        Its passes are those of subset pretraining unless conventional.epochs says otherwise.
        """
        drawing, num_workers = self._plan.drawing(self._config, self._directory), self._config.conventional.num_workers
        with self._pool() as pool:
            end, record = self._on_full_set(pool, drawing.conventional(self._plan.passes, num_workers=num_workers))
        return self._report(end, record["validation"], conventional=record)

    def _on_full_set(self, pool: ActorPool, leg: Leg) -> tuple[Start, dict[str, Any]]:
        """Do a leg on the full set.

        Returns:
            A start from its weights, and its record. A leg that is done is read back.
        """
        piece, stage, full_set = leg.piece, leg.stage, self._full_set
        assert isinstance(piece, Piece)
        workers = counted(leg.num_workers, "worker")
        what = f"the full set by Ray Train, {workers}, {leg.start.kind} start"
        if stage != "fine_tuning":
            what = f"{len(full_set.train)} examples, {workers}"
        self._tell(stage_event(stage, f"{counted(leg.epochs, 'epoch')} on {what}"))
        refuse_changed_files(full_set)
        if (record := piece.record()) is None:
            if piece.by_train:
                self._by_train, self._num_epochs = stage, len(self._epochs_of(stage))
            # actors that minimize stay for the subsets
            ((_, record),) = pool.run([Pack((piece,))], keep=0 if piece.by_train else math.inf)
            self._by_train = ""
            if piece.by_train:
                self._tell_epochs(stage)
            else:
                self._tell(minimum_done(piece, record, full_set.quality, "1 of 1"))
        return Start("warm", leg), record

    def _report(self, end: Start, validation: dict[str, Any], **stages: Any) -> dict[str, Any]:
        """Evaluate the final model on the test split, save it as the run's model, and return the report's record."""
        config, full_set, plan = self._config, self._full_set, self._plan
        assert end.leg is not None
        weights = end.leg.output.weights()
        refuse_changed_files(full_set)
        self._run.ledger.close_lost()
        self._run.ledger.compact()  # the sums below read all of it
        files = self._leave_model(weights)
        self._tell(stage_event("test", f"{len(full_set.test)} examples, which no choice has used"))
        test, test_files = self._test(end.leg.output, weights)  # last: only the report keeps what it read
        return {
            "name": config.run_name(),
            "uri": self._directory.uri,
            "method": config.method,
            "config": self._directory.read_config(),
            "environment": self._directory.read_json_or_none(ENVIRONMENT_PATH),
            "decisions": self._decisions.record,
            "task": task_record(full_set),
            "data": data_record(full_set),
            "model": {"name": architecture(config.model, full_set.spec).name, **plan.network},
            "overdetermination_ratio": plan.ratios,
            "advice": [note.to_dict() for note in plan.advice],
            "planned_passes": plan.passes,
            "stages": stages,
            "test": test,
            "validation": validation,
            "cost": cost_record(
                self._run.ledger.read(),
                len(full_set.train),
                plan.forward_share,
                overlap=config.rounds.overlaps,
                lacking=self._run.ledger.lacking((stage, round, n) for stage, round, n, _ in works_of(stages)),
            ),
            **self._traces(),
            "files": files | test_files,
        }

    def _traces(self) -> dict[str, Any]:
        """Return the paths of the traces that actors.profile requested, and name them in a note."""
        if not (num := self._config.actors.profile):
            return {}
        traces = self._directory.list(TRACES_FOLDER)
        places = ", ".join(uris.shown(self._directory.below(path)) for path in traces)
        text = f"traces of {num} steps, for Perfetto: {places}"
        if not traces:
            text = f"--profile {num} traced nothing: the stages were done before, or had few steps"
        self._tell(Note(text, is_warning=not traces))
        return {"traces": traces}

    def _test(self, output: Output, weights: Weights) -> tuple[dict[str, Any], dict[str, Seal]]:
        """Call leave_test() in this process, or in an actor if actors have GPUs. Return its metrics and files."""
        run = self._run
        piece = TestPiece(run.config, output, "test", is_final=True)
        if self._decisions.num_gpus:
            with self._pool() as pool:
                ((_, record),) = pool.run([Pack((piece,))])
            return record["metrics"], record["files"]
        num_threads = torch.get_num_threads()
        try:
            record = leave_test(run.full_set, 0, piece, weights, node=own_address())
            return record["metrics"], record["files"]
        finally:
            torch.set_num_threads(num_threads)  # the process is the caller's

    def _leave_model(self, weights: Weights) -> dict[str, Seal]:
        """Save the run's model and return the seals of its files. A note says if loading it needs the user's code."""
        config, full_set = self._config, self._full_set
        record = ModelRecord(architecture(config.model, full_set.spec), full_set.task)
        files, flaw = save_model(self._directory, weights, record)
        if flaw:
            name = config.model.name
            text = f"load_model(), predict and export will call {name} of this run, and need trust_code for that"
            if is_given(name):
                text = "load_model() will need model=… again, and predict and export cannot use this run"
            self._tell(Note(f"{text}: its network's graph could not be kept ({flaw})"))
        if isinstance(full_set.task, NextToken):
            self._tell(Waiting("the model continues some texts, for the report"))
            files |= leave_samples(self._directory, weights, record, full_set.test.take())
        return files

    def _plan_by_speed(self) -> Plan:
        """Return the plan with subsets sized by the nodes' speed, which is measured once and then kept."""
        self._decisions.decide_sizes()
        plan = make_plan(self._config, self._full_set, shares=self._decisions.shares)
        sizes = [len(subset.indices) for subset in plan.subsets]
        plan = dataclasses.replace(plan, advice=(*plan.advice, Note(in_words(self._decisions.slots, sizes))))
        for note in plan.advice:
            if note not in self._plan.advice:
                self._tell(note)
        return plan

    def _pool(self) -> ActorPool:
        num_gpus, slots = self._decisions.num_gpus, self._decisions.slots
        return ActorPool(
            dataclasses.replace(self._run, tell=self._hear),
            num_gpus=num_gpus,
            speed_of_node=partial(speed_of_node, self._config.subsets, slots) if slots else None,
            preferred_nodes=fastest_nodes(self._config, slots, num_gpus=num_gpus) if slots else (),
            actor_bytes=actor_bytes(self._config, self._full_set, self._plan) if num_gpus else None,
        )

    def _hear(self, event: Event) -> None:
        """Pass on an event of the pool, and report new epochs of a stage that Ray Train does."""
        self._tell(event)
        if self._by_train and isinstance(event, Progress) and not event.worker:
            self._tell_epochs(self._by_train)

    def _tell_epochs(self, stage: str) -> None:
        """Report each epoch that Ray Train has added to the stage's history since the last call."""
        try:
            entries = self._epochs_of(stage)
        except OSError:  # the storage may answer the next time
            return
        for entry in entries[self._num_epochs :]:
            self._num_epochs += 1
            loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
            text = f"{stage}: epoch {entry['epoch']:g}, loss {loss}, validation "
            text += metrics_in_words(entry["validation"], self._full_set.quality)
            self._tell(EpochDone(text, stage, entry))

    def _epochs_of(self, stage: str) -> list[dict[str, Any]]:
        return self._directory.read_json_or_none(history_path(stage)) or []
