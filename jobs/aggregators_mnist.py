"""Every aggregation on MNIST: minima of four quarter subsets, from one trained start and from independent starts.

Command:    python jobs/aggregators_mnist.py --data-root ~/data --seeds 3
Hardware:   one of two CPU cores, shared with other work; torch 2.15.
Time:       20 minutes at a load of 8 to 12.
Result:     n = 3 seeds, a CNN of 5,178 parameters, subsets of 13,500 examples, three epochs each; test accuracy in %
            (mean ± standard error), barrier on validation data (the aggregate's loss minus the mean member's), passes
            beyond the members' own (every evaluation, statistic and second minimization counted).

            one trained start (a trunk of one epoch)         independent starts
            (mean member)   96.58 ± 0.03                     94.26 ± 0.04
            select_best     96.57 ± 0.04  -0.0025  0.04      94.28 ± 0.06  -0.0078  0.04
            uniform_soup    96.68 ± 0.03  -0.0061  0.10      14.91 ± 0.96  +2.5724  0.10
            weighted_soup   96.68 ± 0.03  -0.0061  0.10
            greedy_soup     96.68 ± 0.03  -0.0062  0.40
            fisher          96.70 ± 0.03  -0.0057  1.21
            regmean         96.67 ± 0.06  -0.0057  0.15
            ties            96.15 ± 0.15  +0.0186  0.10
            dare            96.00 ± 0.15  +0.0204  0.10
            savgm           96.80 ± 0.03  -0.0091  0.85
            aligned_soup    96.68 ± 0.04  -0.0062  0.12      87.56 ± 1.09  +0.2193  0.12
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

# A checkout is enough: raysubset need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysubset.aggregation import Minimum, Scorer, barrier, combine_and_score
from raysubset.config import Config, derive_seed
from raysubset.data import Examples, FullSet, load_full_set
from raysubset.models import build_model
from raysubset.training import (
    Cost,
    Metrics,
    Weights,
    diagonal_fisher,
    evaluate,
    gram_matrices,
    metrics_of_outputs,
    minimize,
    place,
    predict,
)
from raysubset.work import calibration_examples, cut_subsample, cut_subsets

EPOCHS = 3.0  # of each subset; the trunk is one epoch of the full set
SHARED = (
    "select_best", "uniform_soup", "weighted_soup", "greedy_soup", "fisher", "regmean", "ties", "dare", "savgm",
    "aligned_soup",
)  # fmt: skip
INDEPENDENT = ("select_best", "uniform_soup", "aligned_soup")


def config_of(data_root: str, start: str, seed: int) -> Config:
    return Config(seed=seed).with_overrides(
        {
            "data.name": "mnist",
            "data.root": data_root,
            "model.width": 16,
            "subsets.num": 4,
            "subsets.start": start,
            "trunk.epochs": 1.0 if start == "shared" else 0.0,
            "minimize.epochs": EPOCHS,
            "aggregation.allow_independent": True,
        }
    )


def minimum(
    config: Config, full_set: FullSet, start: Weights, examples: Examples, *, subset: int, stage: str
) -> tuple[Weights, Metrics, Tensor, Cost]:
    """Weights, validation metrics and outputs of one minimization, and what it cost."""
    model = place(network(config, full_set, start), torch.device("cpu"), channels_last=True)
    recipe = config.stage("subsets")
    result = minimize(model, examples, recipe, seed=derive_seed(config.seed, "minimize", stage, 0, subset))
    validation = full_set.examples("validation")
    outputs = predict(model, validation, recipe)
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return weights, metrics_of_outputs(outputs, validation.targets(), validation.task), outputs, result.cost


def network(config: Config, full_set: FullSet, weights: Weights | None = None, *path: str) -> torch.nn.Module:
    seed = derive_seed(config.seed, "start", *path)
    model = build_model(config.model, full_set.spec, seed=seed)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def members(config: Config, full_set: FullSet) -> tuple[list[Minimum], Weights, dict[str, Cost]]:
    """The minima with all their statistics, their start, and what each kind of statistics cost."""
    shared = config.subsets.start == "shared"
    start = network(config, full_set).state_dict()
    if shared:
        model = place(network(config, full_set), torch.device("cpu"), channels_last=True)
        minimize(model, full_set.examples("train"), config.stage("trunk"), seed=derive_seed(config.seed, "trunk"))
        start = {key: value.detach().clone() for key, value in model.state_dict().items()}
    made, extra = [], {kind: Cost() for kind in ("fisher", "gram", "subsample")}
    for subset in cut_subsets(config, full_set, 0):
        own = start if shared else network(config, full_set, None, f"independent-{subset.id}").state_dict()
        examples = full_set.examples("train", subset.indices)
        weights, validation, outputs, cost = minimum(config, full_set, own, examples, subset=subset.id, stage="subsets")
        kept: dict[str, Mapping[str, Tensor]] = {}
        if shared:
            model = network(config, full_set, weights)
            taken = {"num_examples": config.aggregation.statistics_examples, "seed": subset.id}
            fisher, fisher_cost = diagonal_fisher(model, examples, config.minimize, labels="model", **taken)
            gram, gram_cost = gram_matrices(model, examples, config.minimize, **taken)
            part = full_set.examples("train", cut_subsample(config, subset.indices, 0, subset.id))
            subsample, _, _, part_cost = minimum(config, full_set, own, part, subset=subset.id, stage="subsamples")
            kept = {"fisher": fisher, "gram": gram, "subsample": subsample}
            for kind, more in (("fisher", fisher_cost), ("gram", gram_cost), ("subsample", part_cost)):
                extra[kind] += more
        made.append(
            Minimum(
                subset_id=subset.id,
                num_examples=len(examples),
                start_id="trunk" if shared else f"independent-{subset.id}",
                outcome="epochs",
                training=None,
                validation=validation,
                cost=cost,
                load_weights=lambda weights=weights: weights,
                load_outputs=lambda outputs=outputs: outputs,
                load_statistics=lambda kind, kept=kept: dict(kept[kind]),
            )
        )
    return made, start, extra


def compare(data_root: str, start: str, seeds: Sequence[int]) -> None:
    """A line an aggregation: test accuracy, barrier on validation data, and passes beyond the members' own."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in seeds:
        config = config_of(data_root, start, seed)
        full_set = load_full_set(*config.learned)
        num_train, test = len(full_set.train), full_set.examples("test")
        minima, begun, extra = members(config, full_set)
        networks = [network(config, full_set, one.load_weights()) for one in minima]
        accuracies = [evaluate(one, test, config.minimize).accuracy for one in networks]
        found.setdefault("(mean member)", []).append((statistics.fmean(accuracies), 0.0, 0.0))
        for method in SHARED if start == "shared" else INDEPENDENT:
            scorer = Scorer(
                network(config, full_set),
                calibration=calibration_examples(config, full_set, "cpu"),
                validation=full_set.examples("validation"),
                minimize=config.minimize,
            )
            options = dataclasses.replace(config.aggregation, method=method)  # pyright: ignore[reportArgumentType]
            aggregate, validation = combine_and_score(minima, options, scorer, start=begun, seed=seed)
            kind = {"fisher": "fisher", "regmean": "gram", "savgm": "subsample"}.get(method)
            cost = scorer.cost() + (extra[kind] if kind else Cost())
            accuracy = evaluate(network(config, full_set, aggregate.weights), test, config.minimize).accuracy
            found.setdefault(method, []).append((accuracy, barrier(validation, minima), cost.passes(num_train)))
        print(f"{start} starts, seed {seed} done", file=sys.stderr, flush=True)
    print(f"{start} starts, n = {len(seeds)} seeds: test accuracy in %, barrier, passes")
    for method, rows in found.items():
        accuracy, gap, passes = (statistics.fmean(column) for column in zip(*rows, strict=True))
        error = statistics.stdev(row[0] for row in rows) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
        print(f"  {method:14s} {100 * accuracy:6.2f} ± {100 * error:.2f}   {gap:+.4f}   {passes:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="~/.cache/raysubset/data")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for starts in ("shared", "independent"):
        compare(arguments.data_root, starts, range(arguments.seeds))
