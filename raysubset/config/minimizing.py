"""Settings of how a loss is minimized: the recipe, and the sister methods that vary it."""

import math
import typing
from collections.abc import Iterator
from dataclasses import field, replace
from typing import Annotated, Literal

from raysubset.config.trees import Part
from raysubset.errors import counted

TrainingStage = Literal["trunk", "subsets", "fine_tuning", "conventional"]

TRAINING_STAGES = typing.get_args(TrainingStage)

WHOLE_SUBSET = ("lbfgs", "cg", "gauss_newton", "levenberg_marquardt")  # optimizers whose every step uses all examples
OPTIMIZERS = ("sgd", "adam", "adamw", "muon", *WHOLE_SUBSET)

_VARIATIONS = ("extrapolation", "averaging", "skipping")  # fields that vary the steps of the built-in loop
_DECAYS = {"pswm": 0.9, "ema": 0.999}

_LEARNING_RATES = {"sgd": 0.1, "adam": 2e-3, "adamw": 2e-3, "muon": 0.1, **dict.fromkeys(WHOLE_SUBSET, 1.0)}

_PATIENCE = 5  # default of levenberg_marquardt


class _Variation(Part):
    """A method that varies the steps of the built-in loop, in some stages."""

    stages: str = "all"
    """Stages that use it, separated by commas: trunk, subsets, fine_tuning, conventional."""

    def problems(self) -> Iterator[str]:
        if set(self.used_in()) - set(TRAINING_STAGES):
            stages = ", ".join(TRAINING_STAGES)
            yield f"{self.prefix}stages = {self.stages!r} should be all, or some of {stages}, by commas"

    def used_in(self) -> tuple[str, ...]:
        """Return the names of the stages that use it."""
        return TRAINING_STAGES if self.stages == "all" else tuple(part.strip() for part in self.stages.split(","))


class ExtrapolationConfig(_Variation, prefix="minimize.extrapolation."):
    """Extrap-SGD (arXiv:2006.05720), from its abstract: take the gradient at extrapolated weights, then step with
    heavy-ball momentum."""

    kind: Literal["none", "past_local", "past_global", "isotropic", "filter_scaled"] = "none"
    """Extrapolate along this worker's last gradient, the last gradient of all workers, random directions, or random
    directions scaled to the norm of each filter. None was ahead of plain steps when measured."""
    rate: Annotated[float, "[0, 1]"] = 0.5
    """Extrapolation rate as a share of the learning rate; our choice. For isotropic the product is the noise's standard
    deviation, for filter_scaled its length relative to each filter's norm."""
    accelerated: bool = False
    """Extrapolate along the momentum as well."""


class AveragingConfig(_Variation, prefix="minimize.averaging."):
    """Average the weights during training: periodic sampling (arXiv:1905.05774), EMA, SWA (arXiv:1803.05407)."""

    kind: Literal["none", "pswa", "pwalks", "pswm", "ema", "swa"] = "none"
    """Mean of an epoch's samples (pswa) or of the last num_samples (pwalks), moving mean of the samples (pswm) or of
    each step (ema), mean of the epochs (swa)."""
    period: Annotated[float, "(0, ∞)"] = 0.1
    """Epochs between two samples of pswa, pwalks and pswm; our choice."""
    num_samples: Annotated[int, "[1, ∞)"] = 10
    """Samples that pwalks averages, across epochs; it holds as many copies of the weights."""
    decay: Annotated[float | None, "[0, 1)"] = None
    """Decay of the moving mean. Defaults: pswm 0.9 per sample, ema 0.999 per step (for runs of thousands of steps)."""
    swa_start: Annotated[float, "[0, 1)"] = 0.75
    """Share of the epochs after which swa begins to average."""
    feedback: Literal["auto", "restart", "evaluate"] = "auto"
    """restart: continue from the average at each epoch's end (auto: pswa, pwalks, pswm); evaluate: only return it."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.kind in ("ema", "swa") and self.feedback == "restart":
            yield f"minimize.averaging.kind={self.kind} averages beside the run, never restarts it: leave feedback out"

    def restarts(self) -> bool:
        """Return True if training continues from the average at each epoch's end."""
        return self.feedback == "restart" or (self.feedback == "auto" and self.kind in ("pswa", "pwalks", "pswm"))

    def decay_or_default(self) -> float:
        """Return the decay, or the kind's default."""
        return self.decay if self.decay is not None else _DECAYS.get(self.kind, 0.0)

    def num_epochs_averaged(self, epochs: float) -> int:
        """Return the number of epoch ends that swa averages in a run of `epochs`; a last partial epoch counts."""
        return sum(min(end, epochs) > self.swa_start * epochs for end in range(1, math.ceil(epochs) + 1))


class SkippingConfig(_Variation, prefix="minimize.skipping."):
    """Weight Update Skipping (arXiv:2012.02792), from its abstract; the rule and its constants are our own."""

    kind: Literal["none", "wus", "wus_lr"] = "none"
    """Freeze the weights while training accuracy hardly improves, and train only biases and normalisation parameters;
    wus_lr also decays the learning rate at each freeze."""
    window: Annotated[float, "(0, ∞)"] = 1.0
    """Epochs over which the improvement is measured."""
    threshold: Annotated[float, "[0, 1)"] = 0.005
    """Least rise of training accuracy from window to window that keeps the weights training."""
    epochs: Annotated[float, "(0, ∞)"] = 1.0
    """Epochs that weights stay frozen."""
    drop: Annotated[float, "(0, 1]"] = 0.01
    """Fall of training accuracy that ends a freeze early."""
    decay: Annotated[float, "(0, 1]"] = 0.5
    """wus_lr: factor of the learning rate at each freeze."""


class MinimizeConfig(Part, prefix="minimize."):
    optimizer: Annotated[str, (*OPTIMIZERS, "package.module:function")] = "sgd"
    """sgd (Nesterov momentum), adam, adamw, or muon, which makes the momentum of matrices and kernels orthogonal, and
    gives biases and normalisation parameters sgd's steps at twice the rate. lbfgs, cg (Polak-Ribière+, both with a
    strong-Wolfe line search), gauss_newton (conjugate gradients on damped Gauss-Newton products) and
    levenberg_marquardt (the exact damped step, for squared error and at most 5,000 parameters) use the whole subset for
    every step. Or your own package.module:function of (parameters, recipe), which returns a torch.optim.Optimizer."""
    objective: Annotated[str | None, ("package.module:function; the task's losses are task.loss",)] = None
    """Your own loss in place of the task's: package.module:function of (model, inputs, targets, task, generator), which
    returns (loss summed over the examples, outputs). For mixup, auxiliary heads, contrastive losses."""
    loop: Annotated[str | None, ("package.module:function",)] = None
    """Your own training loop, in place of the built-in one: package.module:function of (model, examples, recipe,
    progress, on_step), which may call another library's trainer. The costs it reports are the costs counted."""
    learning_rate: Annotated[float | None, "(0, ∞)"] = None
    """Peak learning rate. Defaults: sgd and muon 0.1, adam and adamw 0.002, whole-subset optimizers 1: a scale of the
    step that a line search tries first (cg: only the very first), or the share of a full step. An optimizer of your own
    uses its groups' lr by default; a rate given here is the largest group's, and the others keep their ratio to it."""
    momentum: Annotated[float, "[0, 1)"] = 0.9
    """Nesterov momentum of sgd and muon; heavy-ball momentum with extrapolation."""
    weight_decay: Annotated[float, "[0, ∞)"] = 5e-4
    """L2 penalty (sgd, adam, muon), decoupled (adamw); whole-subset optimizers have none. Biases and normalisation
    parameters are not decayed."""
    batch_size: Annotated[int, "[1, ∞)"] = 64
    """Examples per step over all workers. Whole-subset optimizers take 16 times as many per chunk."""
    accumulation: Annotated[int, "[1, ∞)"] = 1
    """Split each worker's share of a batch into so many equal parts, passed one after another to save memory. The
    gradient is the whole batch's up to rounding; only batch normalisation sees one part at a time."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """Number format in which a stage's workers exchange gradients: bfloat16 halves the bytes, and rounds each worker's
    gradient before the mean. A single worker exchanges none."""
    clip_norm: Annotated[float | None, "(0, ∞)"] = None
    """Scale a step's gradient (of the whole batch, over all parameters) down to this length if it is longer."""
    epochs: Annotated[float, "(0, ∞)"] = 8.0
    """Epochs over the subset, per round; fractions stop within an epoch. For whole-subset optimizers the budget in
    passes over the subset: the loss with its gradient is one pass, a Gauss-Newton product 4/3."""
    epoch_fraction: Annotated[float, "(0, 1]"] = 1.0
    """Shorten each epoch to this share of its batches, of newly drawn examples (RS2, arXiv:2305.18424). `epochs` still
    means passes over the whole subset. Checkpoints, history and averaging happen after each shortened epoch."""
    schedule: Literal["constant", "cosine", "one_cycle", "warmup_linear"] = "cosine"
    """Learning rate over the stage (over all rounds): constant; cosine to 0; one-cycle; warm-up, then linearly to 0."""
    warmup_fraction: Annotated[float, "(0, 1)"] = 0.1
    """Share of the steps in which the rate of one_cycle and warmup_linear rises."""
    tolerance: Annotated[float | None, "(0, ∞)"] = None
    """Stop when an epoch lowers the subset's own loss by less than this share of it. Whole-subset optimizers compare
    after each iteration (lbfgs: ten)."""
    validate_every: Annotated[int | None, "[1, ∞)"] = None
    """Measure validation loss after every so many epochs, for a curve; the cost is counted. By default never, or after
    each epoch with patience; fine-tuning and Ray Train jobs measure it after each epoch anyway."""
    patience: Annotated[int | None, "[0, ∞)"] = None
    """Stop when the validation loss has not fallen for so many measurements, and keep the weights with the least.
    Whole-subset optimizers measure it after each iteration (lbfgs: ten), as part of `epochs`. Default: 5 for
    levenberg_marquardt, which overfits within a few steps; 0, never, for the others."""
    gradient_tolerance: Annotated[float | None, "(0, ∞)"] = None
    """Whole-subset optimizers: stop when the gradient's largest element is at most this."""
    target_loss: Annotated[float | None, "[0, ∞)"] = None
    """Stop when the subset's own mean loss over an epoch is at most this."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """bfloat16 and float16 are mixed precision; auto: bfloat16 on CUDA cards that have it, float32 elsewhere. float16,
    for cards without it, scales the loss (torch.amp.GradScaler) and skips steps whose gradients overflow."""
    channels_last: bool = True
    """Store images and convolutions channels-last: 1.7 times as fast as the default layout on one CPU thread."""
    compile: bool = False
    """Compile the network by torch.compile: pays on GPUs and in long runs; 0.6 times the speed on one CPU thread."""
    extrapolation: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    skipping: SkippingConfig = field(default_factory=SkippingConfig)

    def problems(self) -> Iterator[str]:
        optimizer, averaging, extrapolation = self.optimizer, self.averaging, self.extrapolation
        whole = optimizer in WHOLE_SUBSET
        if self.gradient_tolerance is not None and not whole:
            yield f"minimize.gradient_tolerance is for {', '.join(WHOLE_SUBSET)}: leave it out with {optimizer}"
        if self.patience and averaging.kind != "none" and not averaging.restarts():
            yield f"minimize.patience chooses among epochs, but {averaging.kind} averages over them: leave one out"
        of_batches = {  # what only steps on batches have
            "validate_every": self.validate_every is not None,
            "accumulation": self.accumulation != 1,
            "clip_norm": self.clip_norm is not None,
        }
        of_our_loop = {  # and what only our loop over batches has
            "objective": self.objective is not None,
            "epoch_fraction": self.epoch_fraction != 1,
            **{name: getattr(self, name).kind != "none" for name in _VARIATIONS},
        }
        for name, is_set in (of_batches | of_our_loop).items():
            if whole and is_set:
                yield f"minimize.{name} is for steps on batches, and {optimizer} uses the whole subset: use sgd or adam"
        own_optimizer_or_whole = {"optimizer": whole or self.has_own_optimizer, "patience": bool(self.patience)}
        for name, is_set in (own_optimizer_or_whole | of_our_loop).items():
            if self.loop and is_set:
                yield f"minimize.{name} is for the built-in loop, which {self.loop} replaces: leave one of them out"
        if self.accumulation > self.batch_size:
            yield f"minimize.accumulation = {self.accumulation} exceeds minimize.batch_size = {self.batch_size}"
        if optimizer in ("gauss_newton", "levenberg_marquardt") and self.peak_learning_rate() > 1:
            yield f"learning_rate = {self.learning_rate}: {optimizer} takes that share of its full step, at most 1"
        if whole and self.precision in ("bfloat16", "float16"):
            yield f"{optimizer} needs a more precise loss than {self.precision}: set --minimize.precision=float32"
        kind = f"minimize.extrapolation.kind={extrapolation.kind}"
        if self.precision == "float16" and extrapolation.kind != "none":
            yield f"{kind} uses gradients of other steps, which float16 scales differently: use float32 or bfloat16"
        if extrapolation.kind != "none" and optimizer != "sgd":
            yield f"{kind} is defined for sgd's update, not for minimize.optimizer={optimizer}: leave it out"
        if extrapolation.accelerated and not self.momentum:
            yield "minimize.extrapolation.accelerated looks ahead along the momentum: set minimize.momentum above 0"
        if averaging.kind in ("pswa", "pwalks", "pswm"):
            least = 2 if averaging.kind == "pswa" else 1
            if averaging.period > (most := self.epoch_fraction / least):
                text = f"minimize.averaging.period = {averaging.period:g} epochs: {averaging.kind} takes at least"
                yield f"{text} {counted(least, 'sample')} an epoch: give at most {most:g}"

    def peak_learning_rate(self) -> float:
        """Return the learning rate, or the optimizer's default.

        Raises:
            ValueError: if the optimizer is the user's own: its default is only known once it is built.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        if self.has_own_optimizer:
            raise ValueError(
                f"{self.optimizer} chooses a rate that cannot be scaled or tuned: give minimize.learning_rate"
            )
        return _LEARNING_RATES[self.optimizer]

    @property
    def bytes_a_gradient(self) -> int:
        """Return the bytes of one element of the gradients that workers exchange."""
        return 2 if self.gradients == "bfloat16" else 4

    def patience_or_default(self) -> int:
        """Return how many measurements without a lower validation loss stop training; 0: it is not measured."""
        if self.patience is None and self.optimizer == "levenberg_marquardt":
            return _PATIENCE
        return self.patience or 0

    def watched_patience(self) -> int:
        """Return the patience of our loop between epochs; 0: none, or an optimizer that measures by itself."""
        return 0 if self.optimizer in WHOLE_SUBSET else self.patience or 0

    @property
    def whole_loop(self) -> str | None:
        """Return the name of what replaces the built-in loop, if any: in one process, with all examples in memory."""
        return self.loop or (self.optimizer if self.optimizer in WHOLE_SUBSET else None)

    @property
    def has_own_optimizer(self) -> bool:
        """Return True if the optimizer is the user's own: package.module:function."""
        return ":" in self.optimizer

    def for_stage(self, stage: TrainingStage) -> "MinimizeConfig":
        """Return the recipe without the variations that are meant for other stages only."""
        methods = {name: getattr(self, name) for name in _VARIATIONS}
        changes = {name: type(method)() for name, method in methods.items() if stage not in method.used_in()}
        return replace(self, **changes) if changes else self
