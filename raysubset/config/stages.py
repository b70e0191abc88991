"""Settings of the stages around the subsets: trunk, rounds, aggregation, fine-tuning, and the conventional run."""

from collections.abc import Iterator
from typing import Annotated, Literal

from raysubset.config.trees import Part

AGGREGATIONS = (
    *("uniform_soup", "weighted_soup", "greedy_soup", "select_best", "fisher", "regmean", "ties", "dare", "savgm"),
    *("aligned_soup", "auto"),
)
WHOLE_EVERY = 16  # rounds, of which the first's aggregate is sent in full


class TrunkConfig(Part, prefix="trunk."):
    epochs: Annotated[float, "[0, ∞)"] = 1.0
    """Epochs on the full set before the subsets, for a trained common start. 0: no trunk, as in the paper."""
    learning_rate: Annotated[float | None, "(0, ∞)"] = None
    """Peak learning rate of the trunk; by default minimize.learning_rate."""
    schedule: Literal["constant", "cosine", "one_cycle", "warmup_linear"] = "constant"
    """Learning rate over the trunk. It need not fall, because the subsets continue from the trunk's end."""
    num_workers: Annotated[int, "[1, ∞)"] = 1
    """1: one actor; 2 or more: a Ray Train job."""


class RoundsConfig(Part, prefix="rounds."):
    num: Annotated[int, "[1, ∞)"] = 1
    """Rounds of subset minima and aggregation; with 2 or more the subsets are redrawn each round (local SGD). In
    pilots 16 or more exchanges paid, with Muon or SGD."""
    lengths: Literal["equal", "quadratic"] = "equal"
    """equal: as many epochs in each round; quadratic: rounds longer as the learning rate falls, by 1/rate²
    (arXiv:2310.14423), with the same sum."""
    optimizer_state: Literal["keep", "reset", "average"] = "keep"
    """Optimizer state at the start of later rounds: each member's own, none, or the mean of all members' states."""
    learning_rate_scale: Annotated[float, "(0, ∞)"] = 1.0
    """Factor of minimize.learning_rate for the members only: far from convergence a mean gains by longer steps."""
    outer_learning_rate: Annotated[float, "(0, ∞)"] = 1.0
    """Learning rate of the outer Nesterov step along the mean's displacement (DiLoCo, arXiv:2311.08105); 1 without
    momentum gives the mean itself."""
    outer_momentum: Annotated[float | None, "[0, 1)"] = None
    """Momentum of the outer step over the rounds; by default 0.6 if there are several rounds (which paid in pilots)."""
    evaluate_every: Annotated[int, "[1, ∞)"] = 1
    """Measure the minima and the aggregate every so many rounds, and in the last. The cost is counted: many short
    rounds can cost more to measure than to train. Batch-norm statistics are recomputed only in measured rounds."""
    send: Literal["float32", "bfloat16", "int8"] = "float32"
    """What members send in all rounds but the last: float32: their weights; bfloat16: differences from the round's
    start in 16 bits; int8: in 8 bits with a scale for each tensor. Below 32 bits they leave optimizer states in 16.
    Aggregates and the outer step's momentum are sent likewise, but for one in 16, the first and the last."""
    overlap: bool = False
    """Let members start a round before the last one is aggregated: from the aggregate before that, plus the member's
    own displacement in the last round (averages come a round late: DaSGD, arXiv:2006.00441)."""
    keep_minima: Annotated[int | None, "[0, ∞)"] = 1
    """Number of last rounds whose minima stay on disk. 0: none once the run is finished, which leaves about twenty
    files of a run of a thousand subsets; null: all. If an older file is damaged, all rounds since are done again."""

    @property
    def momentum(self) -> float:
        """Return the momentum of the outer step, or its default."""
        if self.outer_momentum is None:
            return 0.6 if self.num > 1 else 0.0
        return self.outer_momentum

    @property
    def overlaps(self) -> bool:
        """Return True if members start a round before the last one is aggregated."""
        return self.overlap and self.num > 1

    def has_outer_step(self) -> bool:
        return (self.outer_learning_rate, self.momentum) != (1.0, 0.0)

    def sends_whole(self, round: int) -> bool:
        """Return True if the aggregate of the round (counted from 0) is sent in full, and False if as differences from
        the one before. A process that joins reads all since the last that is whole."""
        return self.send == "float32" or round % WHOLE_EVERY == 0 or round + 1 == self.num

    def evaluated(self, round: int) -> bool:
        """Return True if the minima and the aggregate of the round (counted from 0) are measured."""
        return (round + 1) % self.evaluate_every == 0 or round + 1 == self.num


class AggregationConfig(Part, prefix="aggregation."):
    method: Annotated[str, (*AGGREGATIONS, "package.module:function")] = "uniform_soup"
    """How the minima are aggregated: their mean (uniform_soup), a weighted mean (weighted_soup), a mean of those that
    help (greedy_soup), the best one (select_best); means weighted by curvature (fisher, regmean); of task vectors
    (ties, dare); without the subset bias (savgm); after permuting units (aligned_soup, for independent starts;
    select_best was better); whichever of these validates best (auto); or your own package.module:function of (minima,
    context)."""
    weight_by: Literal["examples", "validation_loss"] = "examples"
    """Weights of weighted_soup: the subsets' sizes, or the inverse of the minima's validation loss, which may not
    be below 0."""
    allow_independent: bool = False
    """Average minima even if they do not share a start; the result is labelled."""
    statistics_examples: Annotated[int | None, "[1, ∞)"] = 2048
    """Examples of each subset on which the statistics for fisher and regmean are computed; null: all of them."""
    fisher_labels: Literal["model", "true"] = "model"
    """Labels for the Fisher's gradients under cross-entropy: expected under the model, or the true ones (empirical
    Fisher). Under squared error the Fisher is the loss's own curvature."""
    regmean_factor: Annotated[float, "[0, 1]"] = 0.9
    """Factor of the off-diagonals of regmean's Gram matrices."""
    ties_density: Annotated[float, "(0, 1]"] = 0.2
    """Share of each task vector's elements that ties keeps: the largest ones."""
    dare_drop: Annotated[float, "[0, 1)"] = 0.5
    """Share of each task vector's elements that dare drops at random."""
    task_scale: Annotated[float, "(0, ∞)"] = 1.0
    """λ: factor of the merged task vector of ties and dare."""
    savgm_fraction: Annotated[float, "(0, 1)"] = 0.25
    """r: share of each subset on which savgm minimizes once more, to estimate the bias."""
    matching: Literal["weights", "activations"] = "weights"
    """What aligned_soup compares to match the units of two minima; weights did at least as well on MNIST (n = 2)."""
    repair: bool = True
    """aligned_soup: restore the statistics of activations that averaging shrinks (REPAIR, arXiv:2211.08403)."""


class FineTuningConfig(Part, prefix="fine_tuning."):
    epochs: Annotated[float, "[0, ∞)"] = 2.0
    """Epochs of fine-tuning on the full set by Ray Train. 0: the aggregate is the model."""
    learning_rate: Annotated[float | None, "(0, ∞)"] = None
    """Peak learning rate of fine-tuning; by default minimize.learning_rate."""
    start: Literal["warm", "shrink_perturb", "reinit"] = "warm"
    """Start from the aggregate, from shrink * aggregate + perturb * fresh weights (arXiv:1910.08475), or from fresh
    weights."""
    shrink: Annotated[float, "[0, 1]"] = 0.4
    """λ of shrink_perturb."""
    perturb: Annotated[float, "[0, 1]"] = 0.1
    """γ of shrink_perturb."""
    num_workers: Annotated[int | Literal["auto"], "[1, ∞)"] = "auto"
    """Ray Train workers. 1: an actor, in Ray Train's local mode. auto: 1 if the work is shorter than the start of more
    processes, else as many as the cluster can hold or start, at most one for each subset (measured, recorded)."""
    min_workers: Annotated[int | None, "[1, ∞)"] = None
    """Make the job elastic: continue with as few workers as this when some are lost, and grow back to num_workers."""
    keep: Literal["best", "last"] = "last"
    """The epoch whose weights are the result: best: that of least validation loss; last: the end of the schedule."""
    distillation: Annotated[float, "[0, 1]"] = 0.0
    """Share of the loss that is the distance from the ensemble of the last round's minima."""
    temperature: Annotated[float, "(0, ∞)"] = 2.0
    """Temperature of the ensemble's soft targets under cross-entropy."""
    sync_batch_norm: bool = False
    """Compute batch-norm statistics over the whole batch, across workers (CUDA only)."""

    def problems(self) -> Iterator[str]:
        if self.distillation and not self.epochs:
            yield "fine_tuning.distillation needs fine-tuning: give fine_tuning.epochs more than 0"
        least, most = self.min_workers, self.num_workers
        if least is not None and (most == "auto" or least > most):
            yield f"fine_tuning.min_workers = {least} must be between 1 and fine_tuning.num_workers = {most}"

    def workers(self, *, auto: int) -> int:
        """Return the requested number of workers, or `auto` if num_workers is "auto"."""
        return auto if self.num_workers == "auto" else self.num_workers


class ConventionalConfig(Part, prefix="conventional."):
    epochs: Annotated[float | None, "(0, ∞)"] = None
    """Epochs of `--method conventional`; by default as many as give the total cost of the config's subset pretraining,
    evaluation counted in both."""
    num_workers: Annotated[int, "[1, ∞)"] = 1
    """1: one actor; 2 or more: a Ray Train job."""
