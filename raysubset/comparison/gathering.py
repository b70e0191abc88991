"""gather() sums up by arm what the legs' folders hold: costs on two clocks, speed-ups, verdicts, wall times."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TypeVar, get_args

from raysubset.comparison.arms import Arm, Settings
from raysubset.comparison.network import BANDWIDTHS, Communication, Exchange, all_reduce_bytes, critical_bytes
from raysubset.comparison.records import Record, has_diverged
from raysubset.comparison.regime import Curves, Way, regime_at, regime_text, way_of
from raysubset.comparison.running import Comparison, Finals, flat
from raysubset.comparison.statistics import (
    Interval,
    SpeedUp,
    cheapest_within_error,
    paired_difference,
    speed_up,
    t_interval,
)
from raysubset.comparison.verdict import TENTH, Verdict, judge
from raysubset.data import FullSet, StreamedSplit
from raysubset.legs import Leg, closure, critical_path
from raysubset.pipeline.run_report import data_record, task_record
from raysubset.planning import Plan
from raysubset.quality import Quality
from raysubset.run_directory import at_once, mean_optimizer_path, optimizer_path, outputs_path, size_of
from raysubset.run_directory.ledger import LOST, Work, total_cost
from raysubset.work import Piece

CLOCKS = {"total": "passes", "critical_path": "critical_path_passes"}  # and the field of a run that counts by each

Cost = TypeVar("Cost")


def gather(
    comparison: Comparison, finals: Finals, settings: Mapping[str, Settings], *, margin: float, bandwidth: float
) -> Record:
    """Return all numbers of a comparison whose legs are done.

    Args:
        finals: of every arm, with the settings that it was tuned to.
        margin: of non-inferiority, in the quality's units.
        bandwidth: of each worker's link, in Gbit/s, for the sentence on the regime.

    Raises:
        ValueError: if the conventional run has no finite quality to compare the arms with.
    """
    full_set, seeds, num_workers = comparison.run.full_set, comparison.seeds, comparison.num_workers
    plan, failed, quality = comparison.plan, comparison.runner.failed, full_set.quality
    legs = Legs(full_set, plan, failed)
    done = (leg for leg in flat(finals) if leg not in failed)
    at_once(legs.works, closure(*done, *comparison.tuning_legs))  # one by one they took minutes from slow storage
    data = data_record(full_set)
    step = 1 / data["num_test"] if quality.is_share else 0.0
    arms = [_arm(arm, by_budget, settings[arm.key], legs, step) for arm, by_budget in finals.items()]
    baseline = [point for arm in arms if arm["role"] == "baseline" for point in arm["points"]]
    finished = [point for point in baseline if not any(run["error"] for run in point["runs"])]
    budget = cheapest_within_error({point["budget"]: _validation_losses(point["runs"]) for point in finished})
    conventional = next(point for point in baseline if point["budget"] == budget)
    reference = _gains(conventional["runs"], quality)
    target = statistics.fmean(reference.values()) - margin
    if not math.isfinite(target):
        raise ValueError(f"the conventional run of {budget:g} passes has no finite {quality.name} on test data")
    gains: list[tuple[str, Interval, Record]] = []  # of candidates at their points, and the means there
    for arm in arms:
        for point in arm["points"]:
            is_itself = point is conventional  # which differs in nothing
            gain = paired_difference(_gains(point["runs"], quality), reference, step=0.0 if is_itself else step)
            point["difference"] = None if gain is None else dataclasses.asdict(_turned(gain, quality))
            point["is_non_inferior"] = None if gain is None else gain.low > -margin
            if gain is not None and arm["role"] == "candidate":
                gains.append((arm["key"], gain, point["mean"]))
    failed_at = [
        (arm, point["budget"])
        for arm in arms
        for point in arm["points"]
        if point["mean"] is None and not all(map(has_diverged, point["runs"]))
    ]
    speed_ups, verdicts = dict[str, dict[str, SpeedUp]](), dict[str, Verdict]()
    for clock, field in CLOCKS.items():

        def cost(point: Record, run: Record, field: str = field) -> float:
            return run[field]

        base, passes = _curves(baseline, cost, quality), conventional["mean"][field]
        least = 1 if clock == "total" else 1 / num_workers  # of a budget's passes, what an arm that failed would cost
        curves = {arm["key"]: _curves(arm["points"], cost, quality) for arm in arms if arm["role"] != "baseline"}
        speed_ups[clock] = {key: speed_up(base, curve, target) for key, curve in curves.items() if curve}
        candidates = {arm["key"] for arm in arms if arm["role"] == "candidate"}
        verdicts[clock] = judge(
            [(key, gain) for key, gain, mean in gains if mean[field] <= TENTH * passes],
            {key: of_arm for key, of_arm in speed_ups[clock].items() if key in candidates},
            [(arm["key"], least * budget) for arm, budget in failed_at if arm["role"] == "candidate"],
            conventional_passes=passes,
            margin=margin,
            quality=quality,
            num_seeds=len(seeds),
        )
    test, bandwidths = f"test_{quality.name}", sorted({*BANDWIDTHS, bandwidth})
    network = _network(arms, finals, legs, num_workers, bandwidths)
    ways = _wall_curves(arms, network["rows"], quality)
    rule = {"target": target, "s_per_pass": network["s_per_pass"], "seeds": seeds}
    regimes = {speed: regime_at(speed, ways, **rule) for speed in bandwidths}
    return {
        "task": task_record(full_set),
        "data": data,
        "model": plan.network,
        "regime": {
            "overdetermination_ratio": plan.ratios,
            "num_subsets": len(plan.subsets),
            "num_parameters": plan.num_parameters,
            "num_workers": num_workers,
            "gbit_per_s": bandwidth,
            "by_bandwidth": [dataclasses.asdict(regime) for regime in regimes.values()],
            "sentence": regime_text(
                regimes[bandwidth],
                quality=quality.show(quality.gain(target)),
                place=_place(plan, num_workers, arms),
                is_complete=len({way for way, _ in ways.values()}) == len(get_args(Way)),
                failed=sorted({arm["key"] for arm, _ in failed_at}),
                num_seeds=len(seeds),
            ),
        },
        "seeds": list(seeds),
        "margin": margin,
        "arms": arms,
        "conventional": {
            "budget": budget,
            "passes": conventional["mean"]["passes"],
            test: conventional["mean"][test],
            f"target_{quality.name}": quality.gain(target),
        },
        "speed_ups": {c: {key: dataclasses.asdict(of_arm) for key, of_arm in speed_ups[c].items()} for c in CLOCKS},
        "verdicts": {clock: dataclasses.asdict(verdict) for clock, verdict in verdicts.items()},
        "tuning": {
            "tried": sorted(comparison.tried, key=lambda at: (at["arm"], at["batch_size"], at["learning_rate"])),
            "passes": sum(map(legs.passes, closure(*comparison.tuning_legs))),
            "goes_beyond": comparison.most_beyond > 0,
            "at_edge": [arm.key for arm in finals if ("B" if arm.key == "A" else arm.key) in comparison.at_edge],
        },
        "network": network,
        "failed": {leg.key: reason for leg, reason in failed.items()},
        "legs": {leg.key: _leg_record(leg) for leg in closure(*flat(finals))},
    }


def _gains(runs: Sequence[Record], quality: Quality) -> dict[int, float]:
    """Return the test quality of the finished runs by seed, so that more is better; NaN if it is not finite."""
    values = {run["seed"]: run["test"][quality.name] for run in runs if run["error"] is None}
    return {seed: math.nan if value is None else quality.gain(value) for seed, value in values.items()}


def _turned(gain: Interval, quality: Quality) -> Interval:
    """Return an interval of gains, or of their differences, in the quality's own direction."""
    if quality.higher_is_better:
        return gain
    return dataclasses.replace(gain, estimate=-gain.estimate, low=-gain.high, high=-gain.low)


def _leg_record(leg: Leg) -> Record:
    """Return what a leg is and which legs it needs: all that a run's `leg` depends on."""
    return {
        "kind": leg.kind,
        "stage": leg.told_stage,
        "round": leg.round,
        "subset": leg.subset,
        "num_workers": leg.num_workers,
        "inputs": [input_leg.key for input_leg in leg.inputs],
    }


class Legs:
    """Costs and results of legs. Each ledger is read once."""

    def __init__(self, full_set: FullSet, plan: Plan, failed: Mapping[Leg, str]) -> None:
        self._full_set, self.plan, self.failed, self.quality = full_set, plan, failed, full_set.quality
        self._sizes = len(full_set.train), plan.forward_share  # what passes are counted by
        self.works: Callable[[Leg], list[Work]] = cache(lambda leg: leg.works())

    def passes(self, leg: Leg) -> float:
        """Return the passes of one leg, with every attempt and evaluation."""
        return total_cost(self.works(leg)).passes(*self._sizes)

    def critical_passes(self, leg: Leg) -> float:
        """Return likewise its passes on the critical path."""
        return math.fsum(work.critical_passes(*self._sizes) for work in self.works(leg))

    def reads(self, leg: Leg) -> float:
        """Return how often the leg reads a streamed training set from storage, without reading again after losses."""
        train = self._full_set.train
        if leg.kind == "aggregate" or not isinstance(train, StreamedSplit):
            return 0.0
        if leg.subset is None:
            return leg.epochs
        assert isinstance(leg.piece, Piece)
        positions = leg.piece.positions(self._full_set)
        assert positions is not None
        return train.share_read(positions)

    def exchange(self, leg: Leg) -> Exchange:
        """Return the bytes that an aggregation and its members write and fetch, as if each had its own process."""
        start_leg, aggregate_sizes, start_bytes = leg.members[0].start.leg, _file_sizes(leg), self.plan.num_bytes
        if start_leg:
            start_bytes = _file_sizes(start_leg)[start_leg.output.weights_path]
        shared_bytes, own_bytes, state_bytes, fetched_bytes = (defaultdict[int | None, int](int) for _ in range(4))
        for member in leg.members:
            piece = member.piece
            assert isinstance(piece, Piece)
            for path, num_bytes in _file_sizes(member).items():
                is_state = path == optimizer_path(piece.folder)
                is_own = is_state or (member.is_subsample and path == outputs_path(piece.folder))
                (own_bytes if is_own else shared_bytes)[member.subset] += num_bytes
                state_bytes[member.subset] += num_bytes * is_state
            source = member.predecessor or start_leg
            if piece.optimizer and source and (member.is_subsample or source is start_leg):  # else its process has it
                fetched_bytes[member.subset] += _file_sizes(source)[piece.optimizer[1]]
        mean_bytes = aggregate_sizes.get(mean_optimizer_path(leg.round), 0)
        has_start = leg.round == 1 and leg.config.rounds.overlaps  # that of the first round
        return Exchange(
            num_members=len(shared_bytes),
            start=0 if leg.members[0].start.kind == "independent" or has_start else start_bytes,
            shared=max(shared_bytes.values()),
            own=max(own_bytes.values(), default=0),
            aggregate=sum(aggregate_sizes.values()) - mean_bytes,
            states=max(fetched_bytes.values(), default=0),
            averaged=sum(state_bytes.values()) + mean_bytes if mean_bytes else 0,
            is_first=leg.round == 0,
        )

    def sent(self, leg: Leg) -> tuple[int, int]:
        """Return (bytes on the critical path of a leg and all it needs, exchanges: rounds of members and all-reduces).

        Checkpoints are left out for all arms: an epoch of data-parallel training leaves as large a one as a member.
        """
        num_bytes, num_exchanges, exchanges = 0, 0, list[Exchange]()
        for each in closure(leg):
            if each.kind == "aggregate":
                exchanges.append(self.exchange(each))
            # an elastic job has fewer workers for a while
            for work in self.works(each) if each.kind == "train" else ():
                if work.num_workers > 1:
                    num, num_steps, size = work.num_workers, work.cost.num_steps, each.config.minimize.bytes_a_gradient
                    num_bytes += num_steps * all_reduce_bytes(self.plan.num_parameters, num, each=size)
                    num_exchanges += num_steps
        if exchanges:
            num_bytes += critical_bytes(exchanges, overlap=leg.config.rounds.overlaps)
        return num_bytes, num_exchanges + len(exchanges)

    def run(self, leg: Leg, seed: int) -> Record:
        """Return an arm's run: the results of its last leg, and the costs of all its legs."""
        if (reason := self.failed.get(leg)) is not None:
            return {"seed": seed, "leg": leg.key, "error": reason}
        legs = list(closure(leg))
        works = [work for each in legs for work in self.works(each)]
        cost = total_cost(works)
        return {
            "seed": seed,
            "leg": leg.key,
            "error": None,
            "passes": cost.passes(*self._sizes),
            "critical_path_passes": critical_path(legs, self.critical_passes),
            "num_steps": cost.num_steps,
            "device_s": cost.device_s,
            "critical_path_s": critical_path(legs, lambda each: sum(work.wall_s for work in self.works(each))),
            "num_network_bytes": sum(work.num_network_bytes for work in works),
            "storage_reads": sum(map(self.reads, legs)),
            "num_lost": sum(work.outcome in LOST for work in works),
            "validation": leg.validation(),
            "test": leg.tested(),
        }


def _file_sizes(leg: Leg) -> dict[str, int]:
    """Return the sizes of the files that a leg has left, by path, from the seals in its record."""
    return {path: size_of(seal) for path, seal in leg.output.files().items()}


def _arm(arm: Arm, by_budget: Mapping[float, Mapping[int, Leg]], settings: Settings, legs: Legs, step: float) -> Record:
    points, recipe = [], flat({arm: by_budget})[0].config.minimize
    for budget, by_seed in by_budget.items():
        runs = [legs.run(leg, seed) for seed, leg in by_seed.items()]
        mean = _means([run for run in runs if run["error"] is None], legs.quality, step)
        points.append({"budget": budget, "runs": runs, "mean": mean})
    return {
        "key": arm.key,
        "title": arm.title,
        "role": arm.role,
        "overrides": dict(arm.overrides),
        "settings": dataclasses.asdict(settings),
        "trained": dataclasses.asdict(Settings(recipe.peak_learning_rate(), recipe.batch_size)),
        "points": points,
    }


def _means(runs: Sequence[Record], quality: Quality, step: float) -> Record | None:
    """Return means over the seeds that finished, with Student's t interval of test quality; None if none finished."""
    if not runs:
        return None
    names = "passes critical_path_passes num_steps device_s critical_path_s num_network_bytes storage_reads"
    test_interval = _turned(t_interval([*_gains(runs, quality).values()], step=step), quality)
    return {name: statistics.fmean(run[name] for run in runs) for name in names.split()} | {
        "num_seeds": len(runs),
        f"test_{quality.name}": test_interval.estimate,
        f"test_{quality.name}_interval": dataclasses.asdict(test_interval),
        "validation_loss": statistics.fmean(_validation_losses(runs)),
    }


def _validation_losses(runs: Sequence[Record]) -> list[float]:
    return [math.nan if (loss := run["validation"]["loss"]) is None else loss for run in runs]


def _curves(
    points: Sequence[Record], cost_of: Callable[[Record, Record], Cost], quality: Quality
) -> dict[int, list[tuple[Cost, float]]]:
    """Return (cost, gain) by seed, of the runs that finished with a finite quality; `cost_of` takes point and run."""
    curves: dict[int, list[tuple[Cost, float]]] = {}
    for point in points:
        gains = _gains(point["runs"], quality)
        for run in point["runs"]:
            if math.isfinite(gain := gains.get(run["seed"], math.nan)):
                curves.setdefault(run["seed"], []).append((cost_of(point, run), gain))
    return curves


def _place(plan: Plan, num_workers: int, arms: Sequence[Record]) -> str:
    """Return the network, Q, workers and budgets that the regime holds for, in words."""
    budgets = [point["budget"] for arm in arms if arm["key"][0] != "A" for point in arm["points"]]
    q = f"Q = {plan.full_set_ratio:.3g}, subsets {min(plan.subset_ratios):.3g}"
    network = f"{plan.num_parameters:,} parameters ({q})"
    least, most = min(budgets), max(budgets)
    words = f"budgets of {least:g} to {most:g} passes" if least < most else f"a budget of {most:g} passes"
    return f"With {network}, {num_workers} workers and {words}"


def _wall_curves(arms: Sequence[Record], rows: Sequence[Record], quality: Quality) -> dict[str, tuple[Way, Curves]]:
    """Return for each arm, by seed, what its budgets took on the critical path, and the gains that they led to."""
    sent = {(row["arm"], row["budget"]): (row["num_bytes"], row["num_exchanges"]) for row in rows}

    def curves(key: str, points: Sequence[Record]) -> Curves:
        def cost(point: Record, run: Record) -> Communication:
            return Communication(run["critical_path_passes"], *sent[key, point["budget"]])

        return _curves(points, cost, quality)

    return {arm["key"]: (way_of(arm["key"][0], arm["role"]), curves(arm["key"], arm["points"])) for arm in arms}


def _network(
    arms: Sequence[Record], finals: Finals, legs: Legs, num_workers: int, bandwidths: Sequence[float]
) -> Record:
    """Return the bytes on each arm's critical path, those of data-parallel training, and the wall times that follow.

    The time of a pass is the baseline's, as measured here. Wall times at a bandwidth are computed, not measured.
    """
    points = [point for arm in arms if arm["role"] == "baseline" for point in arm["points"]]
    baseline = [run for point in points for run in point["runs"] if not run["error"]]
    s_per_pass = sum(run["device_s"] for run in baseline) / sum(run["passes"] for run in baseline)
    rows, test = [], f"test_{legs.quality.name}"
    for arm, by_budget in zip(arms, finals.values(), strict=True):
        for point, by_seed in zip(arm["points"], by_budget.values(), strict=True):
            if (mean := point["mean"]) is None:
                continue
            leg = next(leg for leg in by_seed.values() if leg not in legs.failed)
            num_bytes, num_exchanges = legs.sent(leg)
            communication = Communication(mean["critical_path_passes"], num_bytes, num_exchanges)
            wall_s = communication.wall_times(s_per_pass=s_per_pass, bandwidths=bandwidths)
            row = {"arm": arm["key"], "budget": point["budget"], test: mean[test], "wall_s": wall_s}
            rows.append({**row, "num_bytes": num_bytes, "num_exchanges": num_exchanges})
    return {
        "s_per_pass": s_per_pass,
        "bandwidths": list(bandwidths),
        "data_parallel_bytes_a_step": all_reduce_bytes(legs.plan.num_parameters, num_workers, each=4),
        "rows": rows,
    }
