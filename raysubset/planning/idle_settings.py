"""Settings that a config changes although nothing in it uses them, each with the reason."""

from collections.abc import Iterator
from dataclasses import fields

from raysubset.aggregation import methods_tried
from raysubset.config import OF_SUBSET_PRETRAINING, WHOLE_SUBSET, AggregationConfig, Config, flatten
from raysubset.events import Note
from raysubset.planning.soundness import workers_of_stages

_WARMING_UP = ("one_cycle", "warmup_linear")
_USED_BY_AVERAGING = {
    "none": (),
    "pswa": ("period", "feedback"),
    "pwalks": ("period", "feedback", "num_samples"),
    "pswm": ("period", "feedback", "decay"),
    "ema": ("decay",),
    "swa": ("swa_start",),
}
_OF_AVERAGING = ("period", "num_samples", "decay", "swa_start", "feedback", "stages")
_OF_SKIPPING = ("window", "threshold", "epochs", "drop", "decay", "stages")
_OF_FINE_TUNING = ("learning_rate", "start", "num_workers", "min_workers", "keep", "sync_batch_norm")
_OF_ROUNDS = ("lengths", "optimizer_state", "evaluate_every", "send", "overlap")


def idle_settings(config: Config) -> list[Note]:
    """Return a warning for each setting that differs from its default although this config does not use it.

    Settings of data are not among them, as their readers report them (raysubset.data), nor are those of the user's own
    optimizer, loop or aggregation, which receive all settings.
    """
    values, defaults = flatten(config.to_dict()), flatten(Config().to_dict())
    return [
        Note(f"{key} = {values[key]} has no effect: {reason}", is_warning=True)
        for key, reason in dict(_idle(config)).items()
        if values[key] != defaults[key]
    ]


def _idle(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the names of settings that are not used, changed or not, and why."""
    yield from _of_minimizing(config)
    if config.method == "conventional":
        yield from _of_conventional(config)
        return
    for name in ("epochs", "num_workers"):
        yield f"conventional.{name}", "it is for --method conventional"
    yield from _of_stages(config)
    if ":" not in config.aggregation.method:
        used = {name for method in methods_tried(config).values() for name in method.settings}
        for name in {field.name for field in fields(AggregationConfig)} - used - {"method", "allow_independent"}:
            yield f"aggregation.{name}", f"aggregation.method={config.aggregation.method} does not use it"
    if config.subsets.start == "shared":
        yield "aggregation.allow_independent", "all minima share their start"
    if config.subsets.scheme != "dirichlet":
        yield "subsets.alpha", "it is for subsets.scheme=dirichlet"


def _of_conventional(config: Config) -> Iterator[tuple[str, str]]:
    """Yield settings of subset pretraining: its stages give the budget, unless conventional.epochs does."""
    for name in ("tolerance", "target_loss"):
        yield f"minimize.{name}", "it ends minimizations on subsets"
    if config.conventional.epochs is not None:
        for name in flatten(config.to_dict()):
            if name.startswith(OF_SUBSET_PRETRAINING):
                yield name, "conventional.epochs gives the length of the run"


def _of_minimizing(config: Config) -> Iterator[tuple[str, str]]:
    recipe, optimizer = config.minimize, config.minimize.optimizer
    schedules = {recipe.schedule, config.trunk.schedule if config.trunk.epochs else recipe.schedule}
    if recipe.loop is None and optimizer in WHOLE_SUBSET:
        for name in ("momentum", "weight_decay", "schedule", "warmup_fraction"):
            yield f"minimize.{name}", f"{optimizer} has none"
        yield "trunk.schedule", f"{optimizer} has none"
    elif recipe.loop is None and optimizer in ("adam", "adamw"):
        yield "minimize.momentum", f"{optimizer} has moments of its own"
    if recipe.loop is None and schedules.isdisjoint(_WARMING_UP):
        yield "minimize.warmup_fraction", f"it is for the schedules {' and '.join(_WARMING_UP)}"
    if max(workers_of_stages(config, of_fine_tuning=config.fine_tuning.workers(auto=2)).values()) == 1:
        yield "minimize.gradients", "each stage has one worker, which exchanges no gradients"
    if recipe.extrapolation.kind == "none":
        for name in ("rate", "accelerated", "stages"):
            yield f"minimize.extrapolation.{name}", "minimize.extrapolation.kind is none"
    used = _USED_BY_AVERAGING[recipe.averaging.kind]
    for name in _OF_AVERAGING:
        if name not in used and (name != "stages" or recipe.averaging.kind == "none"):
            yield f"minimize.averaging.{name}", f"minimize.averaging.kind={recipe.averaging.kind} does not use it"
    for name in _OF_SKIPPING:
        if recipe.skipping.kind == "none" or (name == "decay" and recipe.skipping.kind == "wus"):
            yield f"minimize.skipping.{name}", f"minimize.skipping.kind={recipe.skipping.kind} does not use it"


def _of_stages(config: Config) -> Iterator[tuple[str, str]]:
    tuning = config.fine_tuning
    if not config.trunk.epochs:
        for name in ("learning_rate", "schedule", "num_workers"):
            yield f"trunk.{name}", "there is no trunk (trunk.epochs is 0)"
    if not tuning.epochs:
        for name in _OF_FINE_TUNING:
            yield f"fine_tuning.{name}", "there is no fine-tuning (fine_tuning.epochs is 0)"
    if not tuning.epochs or tuning.start != "shrink_perturb":
        for name in ("shrink", "perturb"):
            yield f"fine_tuning.{name}", "it is for fine_tuning.start=shrink_perturb"
    if not tuning.distillation:
        yield "fine_tuning.temperature", "fine_tuning.distillation is 0"
    elif config.task.name == "regression" or config.task.loss not in ("auto", "cross_entropy"):
        yield "fine_tuning.temperature", "it softens cross-entropy's probabilities, and this loss is another"
    if config.rounds.num == 1:
        for name in _OF_ROUNDS:
            yield f"rounds.{name}", "there is one round (rounds.num)"
