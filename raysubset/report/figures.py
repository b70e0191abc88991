"""Compute figures from a run's record: training passes, standard errors, differences and their noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from raysubset.costs import taught_passes, works_of
from raysubset.quality import Quality

Record = Mapping[str, Any]

NOISE_ERRORS = 2.0  # a difference of fewer standard errors than this is called noise


def finite(value: float | None) -> float:
    """Return the number, or NaN for None: records have null for it, as JSON has no NaN."""
    return math.nan if value is None else value


def formatted(value: float | None, form: str = ".4f", *, none: str = "not finite") -> str:
    """Return the formatted number, or `none` for None and for what is not finite."""
    return none if value is None or not math.isfinite(value) else format(value, form)


def standard_error(metrics: Record, quality: Quality) -> float | None:
    """Return the quality's standard error over the sampling of examples, or None if it is not known.

    It is the metrics' own error, such as accuracy_error. A share of counted examples, as accuracy is of the correct
    ones, has the binomial error; if none or all are counted, one is taken as the opposite.
    """
    if (error := metrics.get(f"{quality.name}_error")) is not None:
        return error
    num, count = metrics["num_examples"], metrics.get(_count_of(metrics, quality))
    value = finite(metrics[quality.name])
    if count is None or not quality.is_share or not math.isclose(value, count / num, rel_tol=1e-9, abs_tol=1e-9):
        return None
    share = min(max(count, 1), max(num - 1, 1)) / num
    return math.sqrt(share * (1 - share) / num)


def _count_of(metrics: Record, quality: Quality) -> str:
    """Return the key of the counted examples whose share of all is the quality, if it is such a share."""
    return "num_correct" if quality.name == "accuracy" and "num_correct" in metrics else f"num_{quality.name}"


def with_error(metrics: Record, quality: Quality, show: Callable[[float | None], str]) -> str:
    """Return the quality as `show` writes it, and its error if known: '90.00% ± 3.00', '1.834 ± 0.012'."""
    error = standard_error(metrics, quality)
    return show(metrics[quality.name]) + ("" if error is None else quality.error(error))


def change_in_words(new: Record, old: Record, quality: Quality, better: str, worse: str) -> str:
    """Return new against old quality: 'accuracy +2.40 points ± 0.80 (it helped)'; `better` and `worse` need an error.

    The error assumes independent samples: on the same examples it may be smaller.
    """
    errors = [error for metrics in (new, old) if (error := standard_error(metrics, quality)) is not None]
    error = math.hypot(*errors) if len(errors) == 2 else None
    now, before = finite(new[quality.name]), finite(old[quality.name])
    value = 0.0 if math.isclose(now, before) else now - before  # not what rounding leaves
    shown = quality.change(value)
    if not math.isfinite(value):
        verdict = "not finite"
    elif error is not None and abs(value) < NOISE_ERRORS * error:
        verdict = "within the noise"
    elif shown == quality.change(0.0):
        verdict = "no difference"
    else:
        better, worse = ("better", "worse") if error is None else (better, worse)
        verdict = better if quality.gain(value) > 0 else worse
    return f"{shown}{'' if error is None else quality.error(error)} ({verdict})"


def mean_metrics(parts: Sequence[Record], quality: Quality) -> Record:
    """Average several models' losses, qualities and errors, all measured on the same number of examples."""
    keys = ("loss", quality.name, f"{quality.name}_error", _count_of(parts[0], quality))
    means = {key: fmean(finite(part[key]) for part in parts) for key in keys if key in parts[0]}
    return {"num_examples": parts[0]["num_examples"], **means}


def loss_name(record: Record) -> str:
    """Return the minimized loss in words, by the record's task; "loss" for records of earlier versions without it."""
    return (record.get("task") or {}).get("loss", "loss")


def compares_examples(record: Record) -> bool:
    """Return True if the loss depends on how many examples a batch has, so that sets of other sizes differ by that."""
    return bool((record.get("task") or {}).get("compares_examples"))


def is_least_squares(record: Record) -> bool:
    return loss_name(record).startswith("squared error")


def trained_passes(record: Record) -> float:
    """Return the passes of the training that led to the result, without evaluation and without lost work.

    As in planned_passes, the forward passes of the minima that teach fine-tuning are part of it.
    """
    num_train, taught = record["data"]["num_train"], 0.0
    if record["config"]["fine_tuning"].get("distillation") and (tuning := record["stages"].get("fine_tuning")):
        teachers, passes = record["stages"]["rounds"][-1]["minima"], sum(passes_by_epoch(tuning, num_train)[-1:])
        taught = taught_passes(passes, len(teachers), record["model"]["forward_share"])
    return taught + sum(sum(passes_by_epoch(work, num_train)[-1:]) for *_, work in works_of(record["stages"]))


def passes_by_epoch(work: Record, num_train: int) -> list[float]:
    """Return the passes over the full set that a training had done at the end of each of its epochs."""
    share = work.get("num_examples", num_train) / num_train
    return [epoch["epoch"] * share for epoch in work.get("history", ())]
