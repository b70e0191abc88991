"""How a loss is minimized: the recipe, and the sister methods that vary it."""

import math
import typing
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from raysubset.config.trees import check_fields, nearest, need

TrainingStage = Literal["trunk", "subsets", "fine_tuning", "conventional"]

TRAINING_STAGES = typing.get_args(TrainingStage)

WHOLE_SUBSET = ("lbfgs", "cg", "gauss_newton", "levenberg_marquardt")  # optimizers whose every step uses all examples
OPTIMIZERS = ("sgd", "adam", "adamw", "muon", *WHOLE_SUBSET)

_VARIATIONS = ("extrapolation", "averaging", "skipping")  # fields that vary our loop's steps
_DECAYS = {"pswm": 0.9, "ema": 0.999}

_LEARNING_RATES = {"sgd": 0.1, "adam": 2e-3, "adamw": 2e-3, "muon": 0.1, **dict.fromkeys(WHOLE_SUBSET, 1.0)}

_PATIENCE = 5  # of levenberg_marquardt


def _check_stages(stages: str, name: str) -> None:
    unknown = set(_stages(stages)) - set(TRAINING_STAGES)
    need(not unknown, f"{name}.stages = {stages!r} should be all, or some of {', '.join(TRAINING_STAGES)}, by commas")


def _stages(stages: str) -> tuple[str, ...]:
    return TRAINING_STAGES if stages == "all" else tuple(part.strip() for part in stages.split(","))


@dataclass(frozen=True, kw_only=True)
class ExtrapolationConfig:
    """Extrap-SGD (arXiv:2006.05720), from its abstract: the gradient is taken at extrapolated weights, for a step with
    heavy-ball momentum."""

    kind: Literal["none", "past_local", "past_global", "isotropic", "filter_scaled"] = "none"
    """Along this worker's last gradient, the last gradient of all workers, random directions, or such directions scaled
    to the norm of each filter."""
    rate: Annotated[float, "[0, 1]"] = 0.5
    """Extrapolation rate as a share of the learning rate; our choice. Of noise it is the standard deviation,
    of filter_scaled the length, with each filter's own for unit."""
    accelerated: bool = False
    """Extrapolate along the momentum as well."""
    stages: str = "all"
    """Stages that do it, by commas: trunk, subsets, fine_tuning, conventional."""

    def __post_init__(self) -> None:
        check_fields(self, "minimize.extrapolation.")
        _check_stages(self.stages, "minimize.extrapolation")


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """Averages of weights along the way: periodic sampling (arXiv:1905.05774), EMA, SWA (arXiv:1803.05407)."""

    kind: Literal["none", "pswa", "pwalks", "pswm", "ema", "swa"] = "none"
    """Mean of an epoch's samples, of the last num_samples, or their moving mean; EMA of each step; mean of epochs."""
    period: Annotated[float, "(0, ∞)"] = 0.1
    """Epochs between two samples of pswa, pwalks and pswm; our choice."""
    num_samples: Annotated[int, "[1, ∞)"] = 10
    """Samples that pwalks averages, across epochs; as many copies of the weights are held."""
    decay: Annotated[float | None, "[0, 1)"] = None
    """Of the moving mean. Defaults: pswm 0.9 by sample, ema 0.999 by step (for runs of thousands of steps)."""
    swa_start: Annotated[float, "[0, 1)"] = 0.75
    """Share of the epochs after which swa begins to average."""
    feedback: Literal["auto", "restart", "evaluate"] = "auto"
    """restart: go on from the average at each epoch's end (pswa, pwalks, pswm); evaluate: only the result is it."""
    stages: str = "all"
    """Stages that do it, by commas: trunk, subsets, fine_tuning, conventional."""

    def __post_init__(self) -> None:
        check_fields(self, "minimize.averaging.")
        need(
            not (self.kind in ("ema", "swa") and self.feedback == "restart"),
            f"minimize.averaging.kind={self.kind} averages beside the run and never restarts it: leave feedback out",
        )
        _check_stages(self.stages, "minimize.averaging")

    def restarts(self) -> bool:
        """Whether the run goes on from the average at each epoch's end."""
        return self.feedback == "restart" or (self.feedback == "auto" and self.kind in ("pswa", "pwalks", "pswm"))

    def decay_or_default(self) -> float:
        """The decay with the kind's default filled in."""
        return self.decay if self.decay is not None else _DECAYS.get(self.kind, 0.0)

    def num_epochs_averaged(self, epochs: float) -> int:
        """Ends of epochs, the last part of one included, that swa takes of a run of so many."""
        return sum(min(end, epochs) > self.swa_start * epochs for end in range(1, math.ceil(epochs) + 1))


@dataclass(frozen=True, kw_only=True)
class SkippingConfig:
    """Weight Update Skipping (arXiv:2012.02792), from its abstract; the rule and its constants are our own."""

    kind: Literal["none", "wus", "wus_lr"] = "none"
    """While training accuracy hardly improves, only biases and normalisation parameters move; wus_lr also decays the
    learning rate each time."""
    window: Annotated[float, "(0, ∞)"] = 1.0
    """Epochs over which the improvement is watched."""
    threshold: Annotated[float, "[0, 1)"] = 0.005
    """Least rise of training accuracy in a window that keeps weights moving."""
    epochs: Annotated[float, "(0, ∞)"] = 1.0
    """Epochs that weights stay frozen."""
    drop: Annotated[float, "(0, 1]"] = 0.01
    """Fall of training accuracy that ends a freeze early."""
    decay: Annotated[float, "(0, 1]"] = 0.5
    """wus_lr: what the learning rate is multiplied by at each freeze."""
    stages: str = "all"
    """Stages that do it, by commas: trunk, subsets, fine_tuning, conventional."""

    def __post_init__(self) -> None:
        check_fields(self, "minimize.skipping.")
        _check_stages(self.stages, "minimize.skipping")


@dataclass(frozen=True, kw_only=True)
class MinimizeConfig:
    optimizer: str = "sgd"
    """sgd has Nesterov momentum. muon makes the momentum of matrices and kernels orthogonal; biases and
    normalisation parameters take sgd's steps at twice the rate. lbfgs, cg (Polak-Ribière+, both with a strong-Wolfe
    line search), gauss_newton (conjugate gradients on damped Gauss-Newton products) and levenberg_marquardt (the exact
    damped step, for squared error and at most 5,000 parameters) use the whole subset for every step. Or your own,
    package.module:function of (parameters, recipe), which gives a torch.optim.Optimizer."""
    objective: str | None = None
    """What is minimized in place of the task's loss: package.module:function of (model, inputs, targets, task,
    generator), which gives (loss summed over the examples, outputs). For mixup, auxiliary heads, contrastive losses."""
    loop: str | None = None
    """A whole loop of your own in the place of ours: package.module:function of (model, examples, recipe, progress,
    on_step), which may call another library's trainer. What costs it says are what is counted."""
    learning_rate: Annotated[float | None, "(0, ∞)"] = None
    """Peak learning rate. Defaults: sgd and muon 0.1, adam and adamw 0.002; whole-subset optimizers 1, a scale of what
    a line search tries first (cg: of the very first), or the share of a full step. An optimizer of your own has its
    groups' lr for default; one that is given is the largest group's, and the others keep their share of it."""
    momentum: Annotated[float, "[0, 1)"] = 0.9
    """Nesterov momentum of sgd and muon; heavy-ball momentum with extrapolation."""
    weight_decay: Annotated[float, "[0, ∞)"] = 5e-4
    """L2 penalty (sgd, adam, muon), decoupled (adamw); whole-subset optimizers have none. Biases and normalisation
    parameters are spared."""
    batch_size: Annotated[int, "[1, ∞)"] = 64
    """Examples per step over all workers. Whole-subset optimizers take this many times 16 per chunk."""
    accumulation: Annotated[int, "[1, ∞)"] = 1
    """Equal parts in which each worker passes its share of a step's batch, for the memory of one: the gradient is the
    whole batch's to rounding, but for batch normalisation, which sees a part at a time."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """What the workers of a stage exchange gradients in: bfloat16 halves the bytes, and rounds each worker's before the
    mean. One worker exchanges none."""
    clip_norm: Annotated[float | None, "(0, ∞)"] = None
    """Scale a step's gradient, the whole batch's over all parameters, to this length where it is longer."""
    epochs: Annotated[float, "(0, ∞)"] = 8.0
    """Epochs of the subset, per round; for whole-subset optimizers the budget in passes over the subset, a function
    with its gradient being one, a Gauss-Newton product 4/3. Fractions stop within an epoch."""
    epoch_fraction: Annotated[float, "(0, 1]"] = 1.0
    """Share of an epoch's batches that a turn takes, of examples drawn anew each time (RS2, arXiv:2305.18424). `epochs`
    still counts steps as for whole epochs; what is done at epochs' ends is done at turns' ends."""
    schedule: Literal["constant", "cosine", "one_cycle", "warmup_linear"] = "cosine"
    """Learning rate over the stage (over all rounds): cosine to 0; one-cycle; warm-up, then linearly to 0."""
    warmup_fraction: Annotated[float, "(0, 1)"] = 0.1
    """Share of the steps in which one_cycle and warmup_linear rise."""
    tolerance: Annotated[float | None, "(0, ∞)"] = None
    """Stop when an epoch (an iteration of whole-subset optimizers, ten of lbfgs) lowers the subset's own loss by less
    than this share of it."""
    validate_every: Annotated[int | None, "[1, ∞)"] = None
    """Look at validation data after every so many epochs, each look counted: a curve. By default not at all, with
    patience after each; fine-tuning and Ray Train jobs look after each anyway."""
    patience: Annotated[int | None, "[0, ∞)"] = None
    """Stop when the validation loss has not fallen for so many looks, and keep the weights where it was least.
    Whole-subset optimizers look after each iteration (lbfgs: ten), as part of `epochs`. Default: 5 of
    levenberg_marquardt, which overfits within a few steps; 0, never, of the others."""
    gradient_tolerance: Annotated[float | None, "(0, ∞)"] = None
    """Whole-subset optimizers: stop when the gradient's largest element is at most this."""
    target_loss: Annotated[float | None, "[0, ∞)"] = None
    """Stop when the subset's own mean loss over an epoch is at most this."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """bfloat16 and float16 are mixed precision; auto: bfloat16 on CUDA cards that have it, float32 elsewhere. float16,
    for cards that have not, scales the loss (torch.amp.GradScaler), and leaves out steps whose gradients overflow."""
    channels_last: bool = True
    """Memory layout of images and convolutions: 1.7 times as fast as the default layout on one CPU thread."""
    compile: bool = False
    """torch.compile the network: pays on GPUs and long runs; 0.6 times the speed on one CPU thread."""
    extrapolation: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    skipping: SkippingConfig = field(default_factory=SkippingConfig)

    def __post_init__(self) -> None:
        need(
            self.optimizer in OPTIMIZERS or ":" in str(self.optimizer),
            f"minimize.optimizer = {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}, nor a "
            f"package.module:function{nearest(str(self.optimizer), OPTIMIZERS)}",
        )
        check_fields(self, "minimize.")
        whole = self.optimizer in WHOLE_SUBSET
        need(
            self.gradient_tolerance is None or whole,
            f"minimize.gradient_tolerance = {self.gradient_tolerance} is for {', '.join(WHOLE_SUBSET)}: leave it out",
        )
        need(
            self.validate_every is None or not whole,
            f"minimize.validate_every = {self.validate_every} is for optimizers of batches, and {self.optimizer} looks "
            "after each iteration, with minimize.patience: leave it out",
        )
        need(
            not self.patience or self.averaging.kind == "none" or self.averaging.restarts(),
            f"minimize.patience chooses among epochs, and minimize.averaging.kind={self.averaging.kind} averages over "
            "them: leave one of them out",
        )
        need(
            self.objective is None or ":" in self.objective,
            f"minimize.objective = {self.objective!r} should be package.module:function; the task's losses are "
            "task.loss",
        )
        need(
            self.objective is None or not whole,
            f"minimize.objective is called with batches, and {self.optimizer} minimizes the task's loss over the whole "
            "subset: use sgd, adam, adamw or muon, or leave it out",
        )
        need(self.loop is None or ":" in self.loop, f"minimize.loop = {self.loop!r} should be package.module:function")
        for name, is_left_out in (
            ("optimizer", self.optimizer in OPTIMIZERS and not whole),
            ("objective", self.objective is None),
            ("epoch_fraction", self.epoch_fraction == 1),
            ("patience", not self.patience),
            *((name, getattr(self, name).kind == "none") for name in _VARIATIONS),
        ):
            need(
                self.loop is None or is_left_out,
                f"minimize.{name} is of our loop, in whose place {self.loop} stands: leave one of them out",
            )
        need(
            self.accumulation <= self.batch_size,
            f"minimize.accumulation = {self.accumulation} parts need as many examples, and minimize.batch_size = "
            f"{self.batch_size}: give at most that",
        )
        need(
            not whole or (self.accumulation == 1 and self.clip_norm is None),
            f"minimize.optimizer={self.optimizer} takes the whole subset's gradient in chunks, and searches how long a "
            "step is: leave minimize.accumulation and minimize.clip_norm out",
        )
        need(
            not whole or self.epoch_fraction == 1,
            f"minimize.optimizer={self.optimizer} uses all examples for every step: leave minimize.epoch_fraction at 1",
        )
        need(
            self.optimizer not in ("gauss_newton", "levenberg_marquardt") or self.peak_learning_rate() <= 1,
            f"learning_rate = {self.learning_rate}: {self.optimizer} takes that share of its full step, at most 1",
        )
        need(
            not whole or self.precision not in ("bfloat16", "float16"),
            f"{self.optimizer} needs more digits of the loss than {self.precision} has: set "
            "--minimize.precision=float32",
        )
        need(
            self.precision != "float16" or self.extrapolation.kind == "none",
            f"minimize.extrapolation.kind={self.extrapolation.kind} goes by other steps' gradients, which float16 "
            "scales otherwise: set --minimize.precision to float32 or bfloat16",
        )
        for name in _VARIATIONS:
            kind = getattr(self, name).kind
            need(
                not whole or kind == "none",
                f"minimize.{name}.kind={kind} varies the steps of sgd, adam, adamw and muon; {self.optimizer} searches "
                "lines",
            )
        need(
            self.extrapolation.kind == "none" or self.optimizer == "sgd",
            f"minimize.extrapolation.kind={self.extrapolation.kind} is defined for sgd's update, not for "
            f"minimize.optimizer={self.optimizer}'s: leave it out",
        )
        need(
            self.momentum > 0 or not self.extrapolation.accelerated,
            "minimize.extrapolation.accelerated looks ahead along the momentum: give minimize.momentum more than 0",
        )
        if (kind := self.averaging.kind) in ("pswa", "pwalks", "pswm"):
            most = self.epoch_fraction / (2 if kind == "pswa" else 1)
            need(
                self.averaging.period <= most,
                f"minimize.averaging.period = {self.averaging.period:g} epochs leaves {kind} "
                f"{'fewer than two samples' if kind == 'pswa' else 'no sample'} to average at the end of some epochs: "
                f"give at most {most:g}",
            )

    def peak_learning_rate(self) -> float:
        """The learning rate with the optimizer's default filled in.

        Raises:
            ValueError: if an optimizer of the user's own is not made yet, whose groups have the default.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        if self.has_own_optimizer:
            raise ValueError(
                f"what is to be scaled or tuned is minimize.learning_rate, which {self.optimizer} chooses by itself: "
                "give it"
            )
        return _LEARNING_RATES[self.optimizer]

    @property
    def bytes_a_gradient(self) -> int:
        """Bytes of a number that workers exchange."""
        return 2 if self.gradients == "bfloat16" else 4

    def patience_or_default(self) -> int:
        """Iterations without a lower validation loss that end it; 0: it is not looked at."""
        if self.patience is None and self.optimizer == "levenberg_marquardt":
            return _PATIENCE
        return self.patience or 0

    def watched_patience(self) -> int:
        """Looks between epochs without a lower loss that end it; 0: none, as of optimizers that look themselves."""
        return 0 if self.optimizer in WHOLE_SUBSET else self.patience or 0

    @property
    def whole_loop(self) -> str | None:
        """What minimizes in a loop other than ours of batches: in one process, with all examples in memory."""
        return self.loop or (self.optimizer if self.optimizer in WHOLE_SUBSET else None)

    @property
    def has_own_optimizer(self) -> bool:
        """Whether it is the user's: package.module:function."""
        return ":" in self.optimizer

    def for_stage(self, stage: TrainingStage) -> "MinimizeConfig":
        """The recipe without the variations that another stage is to have."""
        changes = {
            name: type(method)() for name in _VARIATIONS if stage not in _stages((method := getattr(self, name)).stages)
        }
        return replace(self, **changes) if changes else self
