"""State a run's findings in words, each difference with its error, and the commands to try next."""

import math
import shlex
from collections.abc import Iterator

from raysubset.events import Note
from raysubset.quality import Quality, quality_of
from raysubset.report.beside import Beside
from raysubset.report.commands import comparison_beside, conventional_beside, margin_in_words, subset_pretraining_beside
from raysubset.report.figures import (
    NOISE_ERRORS,
    Record,
    change_in_words,
    compares_examples,
    finite,
    mean_metrics,
    standard_error,
)
from raysubset.report.parts import Command


def findings(record: Record) -> Iterator[str | Note]:
    """Yield the findings, one or two sentences each; differences within the noise are called so."""
    stages, rounds, quality = record["stages"], record["stages"].get("rounds") or [], quality_of(record)
    yield from (Note(**note) for note in record["advice"] if note["is_warning"])
    if rounds:
        yield from _of_minima(record, rounds[-1]["minima"])
        yield from _of_aggregation(rounds[-1], quality)
        if fine_tuning := stages.get("fine_tuning"):
            aggregate = rounds[-1]["aggregation"]["validation"]
            yield _compared("Fine-tuning", fine_tuning["validation"], aggregate, "the aggregate", quality)
            if record["config"]["fine_tuning"]["start"] == "reinit":
                yield "Fine-tuning started from fresh weights: the subset stage did not go into the final model."
    num = record["validation"]["num_examples"]
    if standard_error(record["validation"], quality) is None:
        yield "This quality has no known error, and this is one run: small differences may be noise."
    else:
        yield (
            f"Errors are of sampling {num:,} validation examples, which are taken as independent, so they are rather "
            f"too large; less than {NOISE_ERRORS:g} errors is called noise. They do not show what another seed would "
            "give: this is one run."
        )


def _of_minima(record: Record, minima: list[Record]) -> Iterator[str | Note]:
    ratios = [minimum["overdetermination_ratio"] for minimum in minima]
    gap = sum(finite(m["validation"]["loss"]) - finite(m["training"]["loss"]) for m in minima) / len(minima)
    q = f"{min(ratios):.3g}" if max(ratios) - min(ratios) < 0.01 else f"{min(ratios):.3g} to {max(ratios):.3g}"
    side = "above" if gap >= 0 else "below"
    text = f"a minimum's validation loss is {abs(gap):.4f} {side} that on its own subset"
    if compares_examples(record):
        text = "losses on them and on validation data do not compare, as their batches differ in size"
    yield f"Subsets of Q = {q}: {text}{', which does not determine the network (Q < 1).' if min(ratios) < 1 else '.'}"
    cut = len(record["overdetermination_ratio"]["subsets"])
    if cut > len(minima):
        text = f"{cut - len(minima)} of {cut} subsets failed for good; they are not in the result."
        yield Note(text, is_warning=True)
    if diverged := sum(minimum["outcome"] == "diverged" for minimum in minima):
        text = f"{diverged} of {len(minima)} minima diverged and were set back to their best epoch: lower "
        yield Note(f"{text}--minimize.learning-rate.", is_warning=True)


def _of_aggregation(last: Record, quality: Quality) -> Iterator[str | Note]:
    aggregation, minima = last["aggregation"], last["minima"]
    if len(minima) == 1:
        return
    member = mean_metrics([minimum["validation"] for minimum in minima], quality)
    yield _compared("Aggregation", aggregation["validation"], member, "the mean member", quality)
    text = _compared("Aggregation", aggregation["validation"], aggregation["best_member"], "the best member", quality)
    yield f"{text} The best was picked on the same examples, which flatters it."
    if candidates := aggregation["candidates"]:
        yield (
            f"auto took {aggregation['method']} of {len(candidates)} candidates scored on these examples: the more "
            "candidates, the more its validation loss is flattered; the test split was not read for it."
        )
    barrier = aggregation["barrier"]
    if barrier is None or not math.isfinite(barrier):
        yield Note("the plain mean has no finite loss: the minima lie too far apart to be averaged.", is_warning=True)
    elif barrier > 0:
        yield (
            f"The plain mean's loss is {barrier:.4f} above the mean member's: the minima lie too far apart. Try more "
            "--trunk.epochs, fewer --minimize.epochs a round, or --aggregation.method select_best."
        )


def _compared(what: str, new: Record, old: Record, than: str, quality: Quality) -> str:
    """Compare the quality and loss of new with old in a sentence, on the same validation examples."""
    change = change_in_words(new, old, quality, "it helped", "it did harm")
    return f"{what}, against {than}: {change}, loss {finite(new['loss']) - finite(old['loss']):+.4f}."


def next_commands(record: Record, beside: Beside) -> Iterator[str | Command]:
    """Yield the commands that would show whether this paid, if their results are not beside the run."""
    if record["method"] == "conventional" and beside.run is None:
        yield "Compare with subset pretraining on the same data:"
        yield Command(subset_pretraining_beside(record))
    elif beside.run is None:
        yield "There is no conventional run of these data and this network beside it. Those of the same total cost:"
        for key, words, suffix in (
            ("passes", "in total", "conventional"),
            ("critical_path_passes", "on the critical path", "conventional-critical"),
        ):
            yield f"{record['cost'][key]:.2f} passes {words}:"
            yield Command(conventional_beside(record, record["cost"][key], suffix))
    if beside.comparison is None:
        quality = quality_of(record)
        margin = margin_in_words(quality)
        yield f"Only a comparison over budgets and seeds shows whether this pays (--quick: a smoke test{margin}):"
        yield Command(comparison_beside(record["config"], quality=quality))
    yield "All numbers, and the page again: raysubset report DIR --format json or html. Runs side by side:"
    other = "DIR" if beside.run is None else beside.run["uri"]
    yield Command(f"raysubset report {shlex.quote(record['uri'])} {shlex.quote(other)}")
