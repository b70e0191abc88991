"""Settings that a config changes although nothing in it uses them, each with the reason."""

from collections.abc import Iterator
from dataclasses import fields

from raysubset.aggregation import methods_tried
from raysubset.config import OF_SUBSET_PRETRAINING, WHOLE_SUBSET, AggregationConfig, Config, flatten
from raysubset.events import Note
from raysubset.planning.soundness import workers_of_stages

_WARMING_UP = ("one_cycle", "warmup_linear")
_USED_BY_AVERAGING = {
    "none": "",
    "pswa": "period feedback stages",
    "pwalks": "period feedback num_samples stages",
    "pswm": "period feedback decay stages",
    "ema": "decay stages",
    "swa": "swa_start stages",
}
_OF_AVERAGING = ("period", "num_samples", "decay", "swa_start", "feedback", "stages")


def idle_settings(config: Config) -> list[Note]:
    """Return a warning for each setting that differs from its default although this config does not use it.

    Settings of data are not among them, as their readers report them (raysubset.data), nor are those of the user's own
    optimizer, loop or aggregation, which receive all settings.
    """
    values, defaults = flatten(config.to_dict()), flatten(Config().to_dict())
    rows = [
        (not config.tracking.names(), "tracking", "project group", "no tracker follows the run (tracking.to)"),
        *_of_minimizing(config),
        *(_of_conventional if config.method == "conventional" else _of_stages)(config),
    ]
    reasons = {f"{room}.{name}": reason for is_idle, room, names, reason in rows if is_idle for name in names.split()}
    return [
        Note(f"{key} = {values[key]} has no effect: {reason}", is_warning=True)
        for key, reason in reasons.items()
        if values[key] != defaults[key]
    ]


Row = tuple[bool, str, str, str]  # whether settings are not used, their room, their names there, and why


def _of_conventional(config: Config) -> Iterator[Row]:
    """Yield settings of subset pretraining: its stages give the budget, unless conventional.epochs does."""
    yield True, "minimize", "tolerance target_loss", "it ends minimizations on subsets"
    for name in flatten(config.to_dict()):
        if name.startswith(OF_SUBSET_PRETRAINING):
            room, _, field = name.partition(".")
            is_idle = config.conventional.epochs is not None
            yield is_idle, room, field, "conventional.epochs gives the length of the run"


def _of_minimizing(config: Config) -> Iterator[Row]:
    recipe, optimizer = config.minimize, config.minimize.optimizer
    is_whole = recipe.loop is None and optimizer in WHOLE_SUBSET
    schedules = {recipe.schedule, config.trunk.schedule if config.trunk.epochs else recipe.schedule}
    is_flat = recipe.loop is None and schedules.isdisjoint(_WARMING_UP)
    num_workers = max(workers_of_stages(config, of_fine_tuning=config.fine_tuning.workers(auto=2)).values())
    averaging, skipping = recipe.averaging.kind, recipe.skipping.kind
    unused = " ".join(name for name in _OF_AVERAGING if name not in _USED_BY_AVERAGING[averaging].split())
    has_moments = recipe.loop is None and optimizer in ("adam", "adamw")
    yield is_whole, "minimize", "momentum weight_decay schedule warmup_fraction", f"{optimizer} has none"
    yield is_whole, "trunk", "schedule", f"{optimizer} has none"
    yield has_moments, "minimize", "momentum", f"{optimizer} has moments of its own"
    yield is_flat, "minimize", "warmup_fraction", f"it is for the schedules {' and '.join(_WARMING_UP)}"
    yield num_workers == 1, "minimize", "gradients", "each stage has one worker, which exchanges no gradients"
    has_none = recipe.extrapolation.kind == "none"
    yield has_none, "minimize.extrapolation", "rate accelerated stages", "minimize.extrapolation.kind is none"
    yield True, "minimize.averaging", unused, f"minimize.averaging.kind={averaging} does not use it"
    reason = f"minimize.skipping.kind={skipping} does not use it"
    yield skipping == "none", "minimize.skipping", "window threshold epochs drop decay stages", reason
    yield skipping == "wus", "minimize.skipping", "decay", reason


def _of_stages(config: Config) -> Iterator[Row]:
    tuning, task, method = config.fine_tuning, config.task, config.aggregation.method
    no_trunk, no_tuning = "there is no trunk (trunk.epochs is 0)", "there is no fine-tuning (fine_tuning.epochs is 0)"
    yield True, "conventional", "epochs num_workers", "it is for --method conventional"
    yield not config.trunk.epochs, "trunk", "learning_rate schedule num_workers", no_trunk
    names = "learning_rate start num_workers min_workers keep sync_batch_norm"
    yield not tuning.epochs, "fine_tuning", names, no_tuning
    reason = "fine-tuning has one worker, which shares its batches with no other"
    yield tuning.workers(auto=2) == 1, "fine_tuning", "sync_batch_norm", reason
    is_unperturbed = not tuning.epochs or tuning.start != "shrink_perturb"
    yield is_unperturbed, "fine_tuning", "shrink perturb", "it is for fine_tuning.start=shrink_perturb"
    no_softmax = task.name == "regression" or task.loss not in ("auto", "cross_entropy")
    reason = "it softens cross-entropy's probabilities, and this loss is another"
    yield no_softmax, "fine_tuning", "temperature", reason
    yield not tuning.distillation, "fine_tuning", "temperature", "fine_tuning.distillation is 0"
    names = "lengths optimizer_state evaluate_every send overlap"
    yield config.rounds.num == 1, "rounds", names, "there is one round (rounds.num)"
    used = {name for tried in methods_tried(config).values() for name in tried.settings} if ":" not in method else set()
    unused = {field.name for field in fields(AggregationConfig)} - used - {"method", "allow_independent"}
    yield ":" not in method, "aggregation", " ".join(sorted(unused)), f"aggregation.method={method} does not use it"
    yield config.subsets.start == "shared", "aggregation", "allow_independent", "all minima share their start"
    yield config.subsets.scheme != "dirichlet", "subsets", "alpha", "it is for subsets.scheme=dirichlet"
