"""A forecast before a run: the times of subset pretraining, data-parallel training and one device, by formulas."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raysubset.comparison.network import Communication, all_reduce_bytes, critical_bytes
from raysubset.comparison.sizes import Sizes
from raysubset.config import Config
from raysubset.planning import Plan, planned_steps
from raysubset.quality import quality_of

Q_BELOW = 1.0  # smaller subsets do not determine the network


@dataclass(frozen=True)
class Advice:
    """Forecasts at equal training passes in total, which does not mean equal quality, and what follows from them."""

    passes: float  # of training, in total
    s_per_pass: float  # of one device, measured
    num_workers: int
    ways: dict[str, Communication]  # one device, data-parallel, subset pretraining; by arithmetic
    break_even_gbit_per_s: float | None  # below it subset pretraining is faster than data-parallel; None: nowhere
    overdetermination_ratio: float  # Q of the smallest subset

    def to_dict(self) -> dict[str, Any]:
        """Return everything, with what follows in words."""
        forecasts = [
            {"name": name, **asdict(way), "wall_s": way.wall_times(s_per_pass=self.s_per_pass)}
            for name, way in self.ways.items()
        ]
        return asdict(self) | {"forecasts": forecasts, "lines": list(advice_lines(self))}


def advise(config: Config, plan: Plan, sizes: Sizes, *, num_train: int, s_per_pass: float, num_workers: int) -> Advice:
    """Return the three forecasts for a config of subset pretraining.

    one device:         b · t
    data-parallel:      b · t / N + ⌈b · n / batch⌉ · 2 (N-1)/N · 4 P bytes · 8 / bandwidth (2 P: bfloat16 gradients)
                        + a checkpoint an epoch · 8 / bandwidth
    subset pretraining: (trunk + rounds · epochs · largest subset / n · ⌈subsets / N⌉ + fine-tuning) · t
                        + what rounds send and fetch one after the other (critical_bytes()) · 8 / bandwidth

    b is what subset pretraining trains in total. Fine-tuning and trunk are assumed to run on one device. Evaluation,
    start-up, and overlap of computing and sending are left out for all three.

    Args:
        plan: of make_plan(), for the method subset_pretraining.
        sizes: of sizes_of(), for the same config.
        num_train: n, examples of the training set.
        s_per_pass: t, measured on one device.
        num_workers: N, devices.
    """
    passes, turns = plan.passes, math.ceil(len(plan.subsets) / num_workers)
    steps = planned_steps(config, plan, num_train, num_workers)
    on_full_set = math.fsum(step.passes for step in steps if step.stage in ("trunk", "fine_tuning"))
    num_steps = math.ceil(passes * num_train / config.minimize.batch_size)
    num_checkpoints = math.ceil(passes / min(1.0, config.actors.checkpoint_epochs))
    a_step = all_reduce_bytes(plan.num_parameters, num_workers, each=config.minimize.bytes_a_gradient)
    parallel_bytes = num_steps * a_step + num_checkpoints * sizes.checkpoint
    parallel = Communication(passes / num_workers, parallel_bytes, num_steps)
    subsets = Communication(
        on_full_set + turns * (plan.critical_path_passes - on_full_set),
        critical_bytes(sizes.rounds, overlap=config.rounds.overlaps),
        len(sizes.rounds),
    )
    more_s, fewer_bits = (subsets.passes - parallel.passes) * s_per_pass, (parallel_bytes - subsets.num_bytes) * 8
    break_even = None  # it sends more
    if fewer_bits > 0:
        break_even = math.inf if more_s <= 0 else fewer_bits / 1e9 / more_s
    return Advice(
        passes=passes,
        s_per_pass=s_per_pass,
        num_workers=num_workers,
        ways={
            "one device": Communication(passes, 0, 0),
            f"data-parallel on {num_workers}": parallel,
            f"subset pretraining on {num_workers}": subsets,
        },
        break_even_gbit_per_s=break_even,
        overdetermination_ratio=min(plan.subset_ratios),
    )


def advice_lines(advice: Advice) -> Iterator[str]:
    """Yield what follows from the forecasts, in words."""
    ratio, even = advice.overdetermination_ratio, advice.break_even_gbit_per_s
    if ratio < Q_BELOW:
        yield (
            f"Q of a subset is {ratio:.2g}, under 1: its loss does not determine the network, and minima of subsets "
            "tell little of the full set's. Take larger subsets or a smaller network."
        )
    else:
        gap = f"{(ratio + 1) / (ratio - 1):.2f}" if ratio > 1 else "any number of"
        yield f"Q of a subset is {ratio:.3g}: under squared error its fresh loss is about {gap} times its own."
    if even is None:
        yield "Subset pretraining would send more than data-parallel training: use data-parallel training."
    elif math.isinf(even):
        yield "Subset pretraining takes less time than data-parallel training at any bandwidth, for as many passes."
    else:
        text = "For as many passes in total, subset pretraining takes less time than data-parallel training where each"
        yield f"{text} worker gets less than {even:.3g} Gbit/s."
    yield (
        "As many passes are not the same quality: of a mean of minima far from convergence expect less than of "
        "data-parallel training with as many steps. `raysubset compare` measures it for this data and model."
    )


def measured_lines(record: dict, advice: Advice) -> Iterator[str]:
    """Compare the formula with a comparison: yield computed and measured seconds of each arm's critical path.

    Args:
        record: comparison.json of a comparison with the same data and model.
    """
    per_pass, quality = record["network"]["s_per_pass"], quality_of(record)
    yield f"A pass took {per_pass:.3g} s there, {advice.s_per_pass:.3g} s here and now."
    for arm in record["arms"]:
        point = max(arm["points"], key=lambda point: point["budget"])
        if (mean := point["mean"]) is None:
            continue
        computed, measured = mean["critical_path_passes"] * per_pass, mean["critical_path_s"]
        entry = record["speed_ups"]["critical_path"].get(arm["key"])
        speed_up = ""
        if entry is not None and (estimate := entry["interval"]["estimate"]) is not None:
            speed_up = f"; speed-up at equal quality {estimate:.2f}"
        yield (
            f"{arm['key']} at {point['budget']:g} passes: critical path computed {computed:.3g} s, measured "
            f"{measured:.3g} s; {quality.phrase(mean[f'test_{quality.name}'])} on test{speed_up}."
        )
