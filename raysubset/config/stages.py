"""The stages around the subsets: trunk, rounds, aggregation, fine-tuning, and the conventional run."""

from dataclasses import dataclass
from typing import Annotated, Literal

from raysubset.config.trees import check_fields, nearest, need

AGGREGATIONS = (
    *("uniform_soup", "weighted_soup", "greedy_soup", "select_best", "fisher", "regmean", "ties", "dare", "savgm"),
    *("aligned_soup", "auto"),
)


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    epochs: Annotated[float, "[0, ∞)"] = 1.0
    """Epochs on the full set before the subsets, for a trained common start; 0: none (the paper's form)."""
    learning_rate: Annotated[float | None, "(0, ∞)"] = None
    """Peak learning rate of the trunk; by default that of minimize."""
    schedule: Literal["constant", "cosine", "one_cycle", "warmup_linear"] = "constant"
    """The trunk's own schedule: it ends where the subsets go on, so its learning rate need not fall."""
    num_workers: Annotated[int, "[1, ∞)"] = 1
    """1: one actor; from 2 up: a Ray Train job."""

    def __post_init__(self) -> None:
        check_fields(self, "trunk.")


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    num: Annotated[int, "[1, ∞)"] = 1
    """Rounds of subset minima and aggregation; from 2 up the subsets are redrawn each round (local SGD). 16 or more
    exchanges are what paid in pilots, with Muon or SGD."""
    lengths: Literal["equal", "quadratic"] = "equal"
    """Epochs of the rounds: as many each, or longer as the learning rate falls, by 1/rate² (arXiv:2310.14423), with
    the same sum."""
    optimizer_state: Literal["keep", "reset", "average"] = "keep"
    """What members begin a later round with: their own momenta, none, or the mean of all members'."""
    learning_rate_scale: Annotated[float, "(0, ∞)"] = 1.0
    """Times minimize.learning_rate, for the members alone: far from convergence a mean gains by longer steps."""
    outer_learning_rate: Annotated[float, "(0, ∞)"] = 1.0
    """Of the outer Nesterov step along the mean's displacement (DiLoCo, arXiv:2311.08105); 1 alone is the mean."""
    outer_momentum: Annotated[float | None, "[0, 1)"] = None
    """Momentum of the outer step over the rounds; by default 0.6 where there are several (what paid in pilots)."""
    evaluate_every: Annotated[int, "[1, ∞)"] = 1
    """Measure the minima and the aggregate of each so-many-th round, and of the last: what that costs is counted, and
    many short rounds can cost more to measure than to train. Batch-norm statistics are recomputed then only."""
    send: Literal["float32", "bfloat16", "int8"] = "float32"
    """What members of all rounds but the last send: their weights, or differences from the round's start in 16 bits,
    or in 8 with a scale a tensor; with fewer than 32 their optimizer states are left in 16. The start is sent to them
    as it is."""
    keep_minima: Annotated[int | None, "[0, ∞)"] = 1
    """Rounds, counted from the last, whose minima stay on disk; 0: none once the run is finished, which leaves a run of
    a thousand subsets some twenty files; null: all. A damaged older file costs all since."""

    def __post_init__(self) -> None:
        check_fields(self, "rounds.")

    @property
    def momentum(self) -> float:
        """Of the outer step."""
        if self.outer_momentum is None:
            return 0.6 if self.num > 1 else 0.0
        return self.outer_momentum

    def has_outer_step(self) -> bool:
        return (self.outer_learning_rate, self.momentum) != (1.0, 0.0)

    def evaluated(self, round: int) -> bool:
        """Whether minima and aggregate of the round, from 0, are measured."""
        return (round + 1) % self.evaluate_every == 0 or round + 1 == self.num


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    method: str = "uniform_soup"
    """What becomes of the minima: their mean (uniform_soup), a weighted mean (weighted_soup), a mean of those that help
    (greedy_soup), the best one (select_best); means weighted by curvature (fisher, regmean); of task vectors (ties,
    dare); without the subset bias (savgm); after permuting units (aligned_soup, the one for independent starts);
    whichever of these validates best (auto); or your own, package.module:function of minima and context."""
    weight_by: Literal["examples", "validation_loss"] = "examples"
    """Weights of weighted_soup: the subsets' sizes, or the inverse of the minima's validation loss."""
    allow_independent: bool = False
    """Average minima that share no start all the same; the result is labelled."""
    statistics_examples: Annotated[int | None, "[1, ∞)"] = 2048
    """Examples of its subset on which an actor takes what fisher and regmean need; null: all of them."""
    fisher_labels: Literal["model", "true"] = "model"
    """Labels of the Fisher's gradients under cross-entropy: expected under the model, or the true ones (empirical
    Fisher). Under squared error it is the loss's own curvature."""
    regmean_factor: Annotated[float, "[0, 1]"] = 0.9
    """What regmean multiplies the off-diagonals of its Gram matrices by."""
    ties_density: Annotated[float, "(0, 1]"] = 0.2
    """Share of each task vector's elements, the largest, that ties keeps."""
    dare_drop: Annotated[float, "[0, 1)"] = 0.5
    """Share of each task vector's elements that dare drops at random."""
    task_scale: Annotated[float, "(0, ∞)"] = 1.0
    """λ: what ties and dare multiply the merged task vector by."""
    savgm_fraction: Annotated[float, "(0, 1)"] = 0.25
    """r: share of each subset that savgm minimizes on once more, to estimate the bias."""
    matching: Literal["weights", "activations"] = "weights"
    """How aligned_soup finds which units of two minima correspond; weights did at least as well on MNIST (n = 2)."""
    repair: bool = True
    """aligned_soup: restore the statistics of activations that averaging shrinks (REPAIR, arXiv:2211.08403)."""

    def __post_init__(self) -> None:
        need(
            self.method in AGGREGATIONS or ":" in self.method,
            f"aggregation.method = {self.method!r} is none of {', '.join(AGGREGATIONS)}, nor a package.module:function"
            f"{nearest(self.method, AGGREGATIONS)}",
        )
        check_fields(self, "aggregation.")


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    epochs: Annotated[float, "[0, ∞)"] = 2.0
    """Epochs on the full set by Ray Train; 0: the aggregate is the model."""
    learning_rate: Annotated[float | None, "(0, ∞)"] = None
    """Peak learning rate; by default that of minimize."""
    start: Literal["warm", "shrink_perturb", "reinit"] = "warm"
    """From the aggregate; from shrink * aggregate + perturb * fresh weights (arXiv:1910.08475); from fresh weights."""
    shrink: Annotated[float, "[0, 1]"] = 0.4
    """λ of shrink_perturb."""
    perturb: Annotated[float, "[0, 1]"] = 0.1
    """γ of shrink_perturb."""
    num_workers: Annotated[int | Literal["auto"], "[1, ∞)"] = "auto"
    """Ray Train workers; 1: an actor, by Ray Train's local mode. auto: 1 where the work is shorter than the start of
    further processes, else as many as the cluster can hold or start, at most one a subset (measured, recorded)."""
    min_workers: Annotated[int | None, "[1, ∞)"] = None
    """Makes the job elastic: go on with as few as this when workers are lost, grow back to num_workers."""
    keep: Literal["best", "last"] = "last"
    """Which epoch's weights are the result: the least validation loss, or the end of the schedule."""
    distillation: Annotated[float, "[0, 1]"] = 0.0
    """Share of the loss that is the distance from the ensemble of the last round's minima."""
    temperature: Annotated[float, "(0, ∞)"] = 2.0
    """Of the ensemble's soft targets under cross-entropy."""
    sync_batch_norm: bool = False
    """Batch-norm statistics over all workers' parts of a batch (CUDA only)."""

    def __post_init__(self) -> None:
        check_fields(self, "fine_tuning.")
        need(
            not (self.distillation and not self.epochs),
            "fine_tuning.distillation needs fine-tuning: give fine_tuning.epochs more than 0",
        )
        if self.min_workers is not None:
            most = self.num_workers
            need(
                most != "auto" and self.min_workers <= most,
                f"fine_tuning.min_workers = {self.min_workers} must be between 1 and fine_tuning.num_workers = {most}",
            )

    def workers(self, *, auto: int) -> int:
        """Return the number of workers asked for, or `auto` where it is left to the run."""
        return auto if self.num_workers == "auto" else self.num_workers


@dataclass(frozen=True, kw_only=True)
class ConventionalConfig:
    epochs: Annotated[float | None, "(0, ∞)"] = None
    """Epochs of `--method conventional`; by default of the same total cost as the config's subset pretraining,
    evaluation counted in both."""
    num_workers: Annotated[int, "[1, ∞)"] = 1
    """1: one actor; from 2 up: a Ray Train job."""

    def __post_init__(self) -> None:
        check_fields(self, "conventional.")
