"""A finished run's record; of an unfinished one, how far it is."""

from typing import Any

from raysubset.report.commands import command
from raysubset.run_directory import (
    COMPARISON_PATH,
    CONFIG_PATH,
    REPORT_PATH,
    SWEEP_PATH,
    RunDirectory,
    aggregate_path,
    history_path,
    minimum_path,
)


def read_report(directory: str) -> dict[str, Any]:
    """report.json of a run directory, sweep.json of a sweep's, comparison.json of a comparison's; a path or a URI.

    Raises:
        ValueError: if this is no run directory, one of a newer version, or the run is not finished; then with how far
            it is and how to go on.
    """
    run = RunDirectory.at(directory)
    config = run.read_config() if run.exists(CONFIG_PATH) else None
    for path in (SWEEP_PATH, COMPARISON_PATH, REPORT_PATH):
        if run.exists(path):
            return run.read_json(path)
    if not run.exists(CONFIG_PATH):
        what = f"it has no {CONFIG_PATH}" if run.exists("") else "nothing is there"
        raise ValueError(f"{run.uri} is no run directory: {what}")
    if config is None:
        raise ValueError(f"{run.uri} holds nothing: its deletion was begun by --fresh and not completed")
    if config.get("kind") == "sweep":
        finished = [path for path in run.list("trials", recursive=True) if path.endswith(f"/{REPORT_PATH}")]
        done = f"{len(finished)} trials are done"
        raise ValueError(f"the sweep {run.uri} is not finished: {done}. To go on, give the same command again")
    if config.get("kind") == "comparison":
        finished = [
            path for path in run.list("legs", recursive=True) if path.endswith(("minimum.json", "aggregate.json"))
        ]
        done = f"{len(finished)} legs are done"
        raise ValueError(f"the comparison {run.uri} is not finished: {done}. To go on, give the same command again")
    raise ValueError(f"{run.uri} is not finished: {_how_far(run, config)}. To go on: {command(config)}")


def _how_far(run: RunDirectory, config: dict[str, Any]) -> str:
    """What the directory holds of each stage, in words."""
    if config["method"] == "conventional":
        return _training_done(run, "conventional") or "no stage is done"
    done = []
    if config["trunk"]["epochs"] and (trunk := _training_done(run, "trunk")):
        done.append(trunk)
    files = run.list("rounds", recursive=True)
    for round in range(config["rounds"]["num"]):
        which = f"round {round + 1} of {config['rounds']['num']}"
        minima = [path for path in files if path.startswith(f"rounds/{round:04d}/") and path.endswith("/minimum.json")]
        if aggregate_path(round) in files:
            if round + 1 == config["rounds"]["num"] or aggregate_path(round + 1) not in files:
                done.append(f"{which} done")
        elif minima:
            done.append(f"{which} has {len(minima)} minima and no aggregate")
    if tuned := _training_done(run, "fine_tuning"):
        done.append(tuned)
    return ", ".join(done) or "no stage is done"


def _training_done(run: RunDirectory, stage: str) -> str:
    if run.exists(minimum_path(stage)):
        return f"{stage} done"
    history = run.read_json_or_none(history_path(stage)) if run.exists(history_path(stage)) else None
    return f"{stage} is {history[-1]['epoch']:g} epochs far" if history else ""
