"""compare() tunes the arms, runs them over budgets and seeds, tests them once, and judges them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from raysubset.cluster import num_gpus_of, num_slots, offered, put_once, refuse_unplaceable
from raysubset.comparison.arms import Settings, parse_arm
from raysubset.comparison.checks import checked_arms, checked_margin, rates_set_aside, takes, unparted_arms, usual_arms
from raysubset.comparison.gathering import gather
from raysubset.comparison.records import ComparisonReport, Record
from raysubset.comparison.running import Comparison
from raysubset.comparison.tuning import LEARNING_RATES, MOST_BEYOND
from raysubset.config import Config, Learned, check_number, list_of
from raysubset.data import FullSet
from raysubset.events import OnEvent, Waiting
from raysubset.objects_in_hand import accepts_objects
from raysubset.pipeline.run_report import environment
from raysubset.pipeline.session import Command
from raysubset.planning import make_plan
from raysubset.run_directory import COMPARISON_PATH, DECISIONS_PATH, RunDirectory
from raysubset.tracking import track_comparison
from raysubset.uris import shown as shown_uri
from raysubset.work import Run
from raysubset.work.identity import places_notes

BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)
BANDWIDTH = 1.0  # Gbit/s


@accepts_objects
def compare(
    config: Config,
    *,
    data: Any = None,
    model: Any = None,
    task: Any = None,
    seeds: int | Sequence[int] = 5,
    budgets: Sequence[float] = BUDGETS,
    arms: Sequence[str] = (),
    learning_rates: Sequence[float] = (),
    batch_sizes: Sequence[int] = (),
    margin: float | None = None,
    num_workers: int | None = None,
    bandwidth: float = BANDWIDTH,
    on_event: OnEvent | None = None,
    fresh: bool = False,
    accept_changed_code: bool = False,
) -> ComparisonReport:
    """Find out whether subset pretraining pays for this data and model, against conventional training and controls.

    Every arm trains for each budget of passes in total, with each seed; evaluation comes on top. Each arm's learning
    rate is tuned on validation data, at the middle budget and with a seed of its own; the batch size is tuned once, for
    B. The test split is read after all these choices. Equal pieces of work are done once, and counted in full for each
    arm. A comparison of the same name resumes, and arms, budgets and seeds may be added. New budgets may have another
    middle; then learning rates are tuned again. If this process dies, call it again. A single value may stand for a
    list.

    Args:
        config: data, model, subsets and recipe. The epochs of its stages give the proportions in which arms D to H
            divide a budget.
        data, model, task: objects instead of names, as for run().
        seeds: their number, from config.seed on, or the seeds themselves. At least two.
        budgets: passes of training in total, each at least one. A trains for twice the largest.
        arms: letters A to I, or letters with overrides as in "G:aggregation.method=fisher"; by default those of
            ALL_ARMS that the config allows, with a note on the others.
        learning_rates: the grid tried for each arm (times num_workers for I). By default LEARNING_RATES times the
            recipe's own, and beyond that, for an arm whose best rate is at an edge, at most MOST_BEYOND further rates.
        batch_sizes: the grid tried for B; by default only the config's.
        margin: of non-inferiority, in the units of the task's quality. By default the task's; for accuracy that of
            checks.MARGINS for the data, or else checks.MARGIN.
        num_workers: of arm I; by default the number of subsets, but no more than the cluster has room for (recorded).
        bandwidth: of each worker's link, in Gbit/s, for the report's sentence on the way of least wall time.
        on_event: receives events, of finished, lost and repeated legs for example; None: nobody does. Without it,
            raysubset.compare() shows the events, as the command does.
        fresh: delete the earlier comparison of this name, and start over.
        accept_changed_code: resume although the user's code has changed; finished legs stay as they are.

    Raises:
        ValueError: for the user's mistakes, with the way out.
    """
    command = Command("comparison", config, on_event, fresh=fresh, accept_changed_code=accept_changed_code)
    directory, tell = command.directory, command.tell
    seeds = command.chosen_seeds(seeds, least=0)
    arms, budgets = list_of("--arms", arms, str), list_of("--budgets", budgets, float)
    learning_rates = list_of("--learning-rates", learning_rates, float)
    batch_sizes = list_of("--batch-sizes", batch_sizes, int)
    own_rates = [factor * config.minimize.peak_learning_rate() for factor in LEARNING_RATES]
    usable = (rate for rate in own_rates if takes(parse_arm("B"), config, Settings(rate, config.minimize.batch_size)))
    rates = sorted(set(learning_rates or usable))
    named_arms, notes = (arms, []) if arms else usual_arms(config, rates[0])
    chosen_arms = checked_arms(config, seeds, budgets, named_arms, rates)
    for size in batch_sizes:
        check_number("--batch-sizes", size, "[1, ∞)")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"--num-workers {num_workers}: arm I needs at least one")
    check_number("--bandwidth", bandwidth, "(0, ∞)")
    tell(Waiting(f"reading {shown_uri(config.data.name)}"))
    full_sets: dict[Learned, FullSet] = {}
    configs = [config, *(config.with_overrides(dict(arm.overrides)) for arm in chosen_arms)]
    identity = command.load(configs, full_sets)
    full_set = full_sets[config.learned]
    if full_set.task.compares_examples:
        chosen_arms, parted_notes = unparted_arms(chosen_arms, full_set.task.name, are_usual=not arms)
        notes += parted_notes
    margin = checked_margin(margin, full_set.quality, config.data.name)
    plan = make_plan(config, full_set)
    plans = {
        arm: make_plan(config.with_overrides(dict(arm.overrides)), full_set) if arm.overrides else plan
        for arm in chosen_arms
    }
    for note in (*notes, *rates_set_aside(config), *places_notes(identity), *full_set.advice, *plan.advice):
        tell(note)
    with command.opened(identity, partial(_refuse_no_place, config)) as sessions:
        tell = sessions.checked(tell)
        sessions.started_up()
        decisions = _decide(directory, config, len(plan.subsets), num_workers, tell)
        comparison = Comparison(
            Run(config, directory, full_set, put_once(full_set), tell),
            plans,
            seeds,
            budgets=sorted(set(map(float, budgets))),  # floats: 2 and 2.0 would name two legs
            rates=rates,
            sizes=sorted(set(batch_sizes)) or [config.minimize.batch_size],
            most_beyond=0 if learning_rates else MOST_BEYOND,
            num_workers=decisions["num_workers"],
            num_gpus=decisions["num_gpus"],
        )
        comparison.refuse_unplaceable()
        with comparison.runner:
            settings = comparison.tune()
            finals = comparison.finish(settings)
        gathered = gather(comparison, finals, settings, margin=margin, bandwidth=bandwidth)
        record = command.leave(COMPARISON_PATH, {"environment": environment(), **gathered}, sessions)
        track_comparison(config, directory, record, tell)
    return ComparisonReport.from_dict(record)


def _refuse_no_place(config: Config, directory: RunDirectory | None) -> None:
    """Stop before a new cluster starts if the cluster can never place an actor. What was decided before is kept."""
    if directory is None or not directory.exists(DECISIONS_PATH):
        types = offered(config.cluster)
        num_gpus = num_gpus_of(config.actors, lambda event: None, types=types)
        refuse_unplaceable({"CPU": config.actors.num_cpus, "GPU": num_gpus}, "legs of a comparison", types=types)


def _decide(
    directory: RunDirectory, config: Config, num_subsets: int, num_workers: int | None, tell: OnEvent
) -> Record:
    """Return what depends on the cluster, decided once and written down. A given number of workers takes precedence."""
    decisions = directory.read_json_or_none(DECISIONS_PATH)
    if decisions is None:
        num_gpus = num_gpus_of(config.actors, tell)
        most = num_slots({"CPU": config.actors.num_cpus, "GPU": num_gpus}, startable=True)
        decisions = {"num_gpus": num_gpus, "num_workers": max(2, min(num_subsets, most))}
    decisions |= {"num_workers": num_workers or decisions["num_workers"]}
    directory.write_json(DECISIONS_PATH, decisions)
    return decisions
