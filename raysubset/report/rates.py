"""Report a learning rate range test: a suggestion, how much it is worth, and a small curve."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raysubset.errors import counted
from raysubset.events import Note
from raysubset.quality import Quality
from raysubset.report.commands import comparison_beside, margin_in_words
from raysubset.report.drawing import COLOURS, GOOD, Chart, Plot
from raysubset.report.parts import Command, Line, Page, Section, write_file

if TYPE_CHECKING:
    from raysubset.training import RateRange  # loads torch

_WIDTH = 40  # characters of the first loss's bar
_HARDLY = 0.05  # share of the first loss: if the loss falls by less, no rate has worked
_AROUND = (1 / 3, 1.0, 3.0)  # times the suggestion: the rates that a comparison chooses from


def rate_sections(
    rate_range: "RateRange", config: Mapping[str, Any], *, passes: float, num_examples: int, loss: str, quality: Quality
) -> list[Section]:
    """Return the sections of the suggestion and of the curve of a range test, which cost `passes` on so many examples.

    Args:
        config: what Config.to_dict() returns.
        loss: name of the loss, with its unit.
        quality: what a comparison goes by.
    """
    rates, losses, suggested = rate_range.rates, rate_range.losses, rate_range.suggested
    least_at, ended_at = rate_range.least_at, rate_range.ended_at
    end = "; the loss was still falling at the highest rate tried" if least_at == rates[-1] else ""
    if ended_at is not None:
        end = f"; at {ended_at:.3g} it was far above that, or not finite"
    suggestion: Line = (
        f"--minimize.learning-rate {suggested:g} is midway, by factors, between {rate_range.fastest_at:.3g}, where the "
        f"loss fell fastest, and {least_at:.3g}, where it was least{end}."
    )
    if _hardly_fell(rate_range):
        text = "The loss hardly fell at any rate, so there is no suggestion: check data and model"
        suggestion = Note(text, is_warning=True)
    worth = (
        f"A rule of thumb (range test, arXiv:1506.01186): {counted(rate_range.steps_a_rate, 'step')} at each of "
        f"{len(rates)} rates, one after the other, on {num_examples:,} examples from the start weights. It used no "
        "validation data, no schedule and no later epoch, and another seed changes it. It cost "
        f"{passes:.2f} passes over the training set, which no report counts. To choose by validation data"
        f"{margin_in_words(quality)}:"
    )
    candidates = [f"{factor * suggested:.2g}" for factor in _AROUND]
    beside = Command(comparison_beside(config, "--learning-rates", *candidates, quality=quality))
    columns, plot = ("learning rate", loss, ""), _plot(rate_range, loss)
    curve = Section("Loss while training", columns, _curve(rates, losses), plots=(plot,))
    return [Section("A learning rate to begin with", lines=(suggestion, worth, beside)), curve]


def write_rates(parts: Sequence[Section], path: str, config: Mapping[str, Any]) -> str:
    """Write the page of rate_sections() to a local file; return its path."""
    suggestion, curve = parts
    facts = tuple((name, str(config[name]["name"])) for name in ("data", "model"))
    return write_file(Page(suggestion.title, suggestion.lines, (curve,), facts=facts), path)


def _plot(rate_range: "RateRange", loss: str) -> Plot:
    """Draw the losses over the rates, with the suggestion if the loss fell."""
    chart = Chart("learning rate", loss, log="xy")
    chart.line(zip(rate_range.rates, rate_range.losses, strict=True), COLOURS[0], "while training", marker="o")
    if not _hardly_fell(rate_range):
        ends = [(rate_range.suggested, end(rate_range.losses)) for end in (min, max)]
        chart.line(ends, GOOD, f"suggested: {rate_range.suggested:g}", dash="2 4")
    caption = f"Mean loss over {counted(rate_range.steps_a_rate, 'step')} at each rate, one rate after another."
    return Plot(caption, (chart,))


def _hardly_fell(rate_range: "RateRange") -> bool:
    first = rate_range.losses[0]
    return first - min(rate_range.losses) < _HARDLY * abs(first)


def _curve(rates: Sequence[float], losses: Sequence[float]) -> tuple[tuple[str, ...], ...]:
    """Return a row for each rate, with a bar that begins a little below the least loss."""
    lowest = 1.1 * min(losses) - 0.1 * losses[0]
    scale = _WIDTH / ((losses[0] - lowest) or 1.0)
    bars = ("█" * min(_WIDTH + 1, max(1, round(scale * (loss - lowest)))) for loss in losses)
    return tuple((f"{rate:.3g}", f"{loss:.4f}", bar) for rate, loss, bar in zip(rates, losses, bars, strict=True))
