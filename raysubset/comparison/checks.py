"""What a comparison may be asked for: arms that fit the config, numbers in range, and a margin of non-inferiority."""

from collections.abc import Sequence

from raysubset.comparison.arms import ALL_ARMS, Arm, Settings, arm_config, parse_arm
from raysubset.config import OF_SUBSET_PRETRAINING, Config, check_number
from raysubset.events import Note
from raysubset.planning.soundness import refuse_fresh_weights
from raysubset.quality import ACCURACY, Quality

MARGINS = {"mnist": 0.001, "fashion_mnist": 0.001, "cifar10": 0.005, "cifar100": 0.01}
MARGIN = 0.005  # of non-inferiority, in accuracy, for other data; for other qualities the task has a margin, or none

COMMON = ("name", "storage_path", "seed", "method", "data", "task", "model", "cluster", "tracking")  # same for all arms
OF_SUBSETS = "DEFGH"  # arms with a stage of subsets


def checked_arms(
    config: Config, seeds: Sequence[int], budgets: Sequence[float], arms: Sequence[str], learning_rates: Sequence[float]
) -> list[Arm]:
    """Return the arms that `arms` names.

    Raises:
        ValueError: if the arguments give no comparison.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"--seeds: {len(set(seeds))} cannot tell a difference from noise: give at least 2, better 5")
    parsed = [parse_arm(key) for key in dict.fromkeys(arms)]
    if "B" not in {arm.key for arm in parsed}:
        raise ValueError("everything is measured against conventional training: add B to --arms")
    if not any(arm.role == "candidate" for arm in parsed):
        raise ValueError("there is no arm of subset pretraining to judge: add D, E, G or H to --arms")
    if config.method != "subset_pretraining":
        raise ValueError(f"a comparison has arms of both methods: leave out --method {config.method}")
    for budget in budgets:
        check_number("--budgets", budget, "(-∞, ∞)")
    if (least := min(budgets, default=0.0)) < 1:
        text = f"--budgets: {least:g} passes is too small for one epoch of conventional training"
        raise ValueError(f"{text}: give at least 1")
    for rate in learning_rates:
        check_number("--learning-rates", rate, "(0, ∞)")
        config.with_overrides({"minimize.learning_rate": rate})  # refuses a rate that the optimizer cannot use
    for arm in parsed:
        _refuse_unfit(arm, config, learning_rates)
    return parsed


def takes(arm: Arm, config: Config, settings: Settings) -> bool:
    """Return True if the arm's optimizer can use the rate."""
    try:
        arm_config(arm, config, settings, seed=config.seed, num_workers=1)
    except ValueError:
        return False
    return True


def usual_arms(config: Config, rate: float) -> tuple[list[str], list[Note]]:
    """Return the arms that the config allows, and a note on each control and arm in rounds that it does not."""
    arms, notes = list(ALL_ARMS), list[Note]()
    for key in ("C", "I", "H:rounds.num=4"):
        try:
            _refuse_unfit(parse_arm(key), config, [rate])
        except ValueError as error:
            arms.remove(key)
            notes.append(Note(f"left out of the comparison: {error}"))
    return arms, notes


def rates_set_aside(config: Config) -> list[Note]:
    """Return a warning for each stage's own learning rate: arm_config() gives all stages of an arm the tuned one."""
    rates = {"trunk": config.trunk.learning_rate, "fine_tuning": config.fine_tuning.learning_rate}
    reason = "a comparison tunes one rate for all stages of an arm; an arm of its own may have it, as"
    return [
        Note(
            f"{stage}.learning_rate = {rate:g} has no effect: {reason} H:{stage}.learning_rate={rate:g}",
            is_warning=True,
        )
        for stage, rate in rates.items()
        if rate is not None
    ]


def unparted_arms(arms: Sequence[Arm], task_name: str, *, are_usual: bool) -> tuple[list[Arm], list[Note]]:
    """Return the arms without I, whose workers part the batches in which a task compares examples, and a note on it.

    Raises:
        ValueError: if the user named it.
    """
    if not (parted := [arm for arm in arms if arm.letter == "I"]):
        return list(arms), []
    text = f"arm {parted[0].key}: its workers part batches, and {task_name} compares the examples of a batch"
    if not are_usual:
        raise ValueError(f"{text}: leave it out of --arms")
    return [arm for arm in arms if arm not in parted], [Note(f"left out of the comparison: {text}")]


def _refuse_unfit(arm: Arm, config: Config, learning_rates: Sequence[float]) -> None:
    """Refuse an arm that could not be repeated, would ignore settings, or whose own settings contradict the config's.

    Raises:
        ValueError: with the arm.
    """
    try:
        settings = config.with_overrides(dict(arm.overrides))
        refuse_fresh_weights(settings.with_overrides({"fine_tuning.start": arm.start}))
        for name in arm.overrides:
            if name.partition(".")[0] in COMMON:
                raise ValueError(f"{name} is the same for all arms: set it for the whole comparison")
            if why := _without_effect(arm.letter, name):
                raise ValueError(f"{name} has no effect in it: {why}")
        loop = settings.minimize.whole_loop
        if loop and arm.letter == "I":
            text = f"it is shared by several workers, and {loop} takes all examples in one process"
            raise ValueError(f"{text}: leave it out of --arms, or use sgd, adam or adamw")
        if loop and settings.data.streamed and arm.letter not in OF_SUBSETS:
            raise ValueError(
                f"{loop} needs all examples in memory, and data.streamed holds none: use sgd, adam or adamw"
            )
        if arm.letter in OF_SUBSETS and settings.subsets.shares != "equal":
            raise ValueError("no other run repeats sizes of subsets by the nodes there: leave out subsets.shares")
        if arm.letter in OF_SUBSETS and settings.actors.quorum is not None:
            raise ValueError("no other run repeats which minima come first: leave out actors.quorum")
        for rate in learning_rates:
            arm_config(arm, config, Settings(rate, config.minimize.batch_size), seed=config.seed, num_workers=1)
    except ValueError as error:
        raise ValueError(f"arm {arm.key}: {error}") from error


def _without_effect(letter: str, name: str) -> str:
    """Return why an arm would ignore an override, as final_leg() and arm_config() draw it; "" if it does not."""
    if name.startswith("conventional."):
        return "its budget gives its length"
    if letter in OF_SUBSETS:
        if name.startswith("trunk.") and letter != "H":
            return "it has no trunk, which H has"
        return "it has one subset and one round" if name.startswith("rounds.") and letter in "DEF" else ""
    is_of_workers = letter == "I" and name == "fine_tuning.sync_batch_norm"  # of any Ray Train job
    return "" if is_of_workers or not name.startswith(OF_SUBSET_PRETRAINING) else "it has no stage of subsets"


def checked_margin(margin: float | None, quality: Quality, data_name: str) -> float:
    """Return the margin of non-inferiority, in the quality's units.

    Raises:
        ValueError: if it is out of range, or neither given nor known for the quality.
    """
    if margin is not None:
        check_number("--margin", margin, "[0, 1)" if quality.is_share else "[0, ∞)")
        return margin
    if quality.name == ACCURACY.name and data_name in MARGINS:
        return MARGINS[data_name]
    if quality.needs_margin:
        raise ValueError(
            f"how much worse in {quality.label} may a model be and still count as good? No margin of non-inferiority "
            "is known for it: give --margin"
        )
    return MARGIN if quality.margin is None else quality.margin
