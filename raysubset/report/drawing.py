"""Draw plots as small SVGs in the page's own colours; a reader can point at a mark to see its values.

chart = Chart("passes", "loss", log="y")
chart.line([(1, 0.9), (2, 0.5), (3, 0.4)], COLOURS[0], "trunk", marker="o")
Plot("Loss while training.", (chart,))                        # the page draws plot.charts and plot.legend

They are written by hand, as matplotlib takes seconds to import and to draw, and every run ends with a page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

# Mid-tones for white and near-black grounds; the colour-blind can tell them apart in this order (after Okabe and Ito)
COLOURS = ("#3b82c4", "#d9822b", "#2f9e6e", "#c2559d", "#8a6fd1", "#a8892a", "#3fa3b5", "#8d99a6")
GOOD, BAD, GREY = "#2f9e6e", "#d0524e", "#8d99a6"

_FONT = 12  # pixels, of a chart 400 wide
_CHARACTER = 0.56 * _FONT  # mean width of a character
_MARKS = {  # around a point, in pixels; strokes of no length with caps make dots and squares of few characters
    "o": ('stroke-width="7" stroke-linecap="round"', "h0"),
    ".": ('stroke-width="4" stroke-linecap="round"', "h0"),
    "s": ('stroke-width="6" stroke-linecap="square"', "h0"),
    "D": ('stroke-width="1"', "m0-4.5l4.5 4.5-4.5 4.5-4.5-4.5z"),
    "x": ('stroke-width="2.2"', "m-4-4l8 8m0-8l-8 8"),
}


@dataclass
class Axis:
    """One of a chart's two axes: its settings, and all values drawn along it."""

    label: str
    is_log: bool = False  # if positive values span more than a factor of five; settled() finds out
    ticks: Sequence[tuple[float, str]] = ()  # none: chosen automatically
    low: float = -math.inf  # infinite: the least value, with a margin
    high: float = math.inf
    values: list[float] = field(default_factory=list)
    start: float = 0.0  # pixels at which it starts and ends
    end: float = 0.0

    def settled(self) -> "Axis":
        """Return the axis with ends and ticks that suit the values."""
        values = [value for value in self.values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(values), max(values)
        is_log = self.is_log and low > 0 and high >= 5 * low
        if is_log:
            margin = (high / low) ** 0.05
            low, high = max(self.low, low / margin), high * margin if math.isinf(self.high) else self.high
        else:
            margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
            low = low - margin if math.isinf(self.low) else self.low
            high = high + margin if math.isinf(self.high) else self.high
        ticks = self.ticks or (_log_ticks(low, high) if is_log else _ticks(low, high))
        return replace(self, low=low, high=high, is_log=is_log, ticks=ticks)

    def pixel(self, value: float) -> float:
        """Return the pixel of a value on the settled axis; values beyond an end lie there."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low / 2))
        return self.start + (self.end - self.start) * min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))

    def at(self, value: float) -> str:
        return _number(self.pixel(value))


Draw = Callable[[Axis, Axis], str]  # returns the SVG of a mark, given the x and the y axis


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return about five round numbers between the ends, with their texts."""
    rough = (high - low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.9 * rough)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(number * step, f"{number * step:.10g}") for number in numbers]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    decades = math.log10(high / low)
    factors = (1, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 2.5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = [factor * 10.0**power for power in powers[:: 1 + len(powers) // 8] for factor in factors]
    return [(number, f"{number:g}") for number in numbers if low <= number <= high]


class Chart:
    """A pair of axes. Marks are kept in order, and placed at the end, when all values are known."""

    def __init__(
        self, x_label: str, y_label: str, *, title: str = "", log: str = "", size: tuple[float, float] = (400, 250)
    ) -> None:
        """
        Args:
            log: "x", "y" or "xy": axes that are logarithmic if their values span much.
            size: width and height in pixels; the page scales all, letters too.
        """
        self.x, self.y, self.title, self.size = Axis(x_label, "x" in log), Axis(y_label, "y" in log), title, size
        self.legend: dict[str, str] = {}  # an SVG for each label
        self._marks: list[Draw] = []

    def line(
        self,
        points: Iterable[tuple[float, float]],
        colour: str,
        label: str = "",
        *,
        marker: str = "",
        dash: str = "",
        width: float = 2,
        alpha: float = 1,
        bars: Sequence[tuple[float, float]] = (),
        names: Sequence[str] = (),
    ) -> None:
        """Draw a line through points. A y that is not finite is left out; an infinite x lies at the edge.

        Args:
            marker: one of o . s D x, drawn at each point.
            dash: "", or an SVG dash array such as "2 4".
            width: of the line in pixels; 0: points only.
            bars: the two ends of an error bar at each point.
            names: the text shown for each point, in place of its x.
        """
        drawn = [
            (x, y, *(bars[n] if bars else (y, y)), names[n] if names else f"{x:.5g}")
            for n, (x, y) in enumerate(points)
            if math.isfinite(y) and not math.isnan(x)
        ]
        if not drawn:
            return
        self.x.values += [x for x, *_ in drawn]
        self.y.values += [end for _, *ends, _ in drawn for end in ends]
        stroke = f'stroke="{colour}"' + (f' opacity="{alpha}"' if alpha < 1 else "")
        line_style = f'{stroke} stroke-width="{width}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        texts = [f"{y:.5g}" + (f" ({low:.4g} to {high:.4g})" if bars else "") for _, y, low, high, _ in drawn]
        values = f'data-k="{escape(label)}" data-x="{_joined(name for *_, name in drawn)}" data-y="{_joined(texts)}"'

        def draw(x_axis: Axis, y_axis: Axis) -> str:
            places, svg = [f"{x_axis.at(x)} {y_axis.at(y)}" for x, y, *_ in drawn], ""
            if bars:
                ends = (f"M{x_axis.at(x)} {y_axis.at(low)}V{y_axis.at(high)}" for x, _, low, high, _ in drawn)
                svg += f'<path {stroke} stroke-opacity=".6" d="{"".join(ends)}"/>'
            if width:
                svg += f'<path {line_style}{"" if marker else f" {values}"} d="M{"L".join(places)}"/>'
            if marker:
                svg += f"<path {stroke} {_marks(marker, colour, places)} {values}/>"
            return svg

        self._marks.append(draw)
        key = f'<path {line_style} d="M0 6H22"/>' if width else ""
        if marker:
            key += f"<path {stroke} {_marks(marker, colour, ['11 6'])}/>"
        self._name(label, key)

    def bar(
        self,
        y: float,
        start: float,
        end: float,
        colour: str,
        label: str = "",
        *,
        height: float = 0.7,
        alpha: float = 1,
        text: str = "",
        tip: str = "",
    ) -> None:
        """Draw a box along x, `height` of y's units high, with the text if it fits.

        Args:
            tip: the text shown when a reader points at the box.
        """
        self.x.values += [start, end]
        self.y.values += [y - height / 2, y + height / 2]

        def draw(x_axis: Axis, y_axis: Axis) -> str:
            left, right = sorted(map(x_axis.pixel, (start, end)))
            top, bottom = sorted(map(y_axis.pixel, (y - height / 2, y + height / 2)))
            wide, opacity = max(0.8, right - left - 0.6), f' fill-opacity="{alpha:.2g}"' if alpha < 1 else ""
            about = f' data-t="{escape(tip)}"' if tip else ""
            box = f'x="{_number(left)}" y="{_number(top)}" width="{_number(wide)}" height="{_number(bottom - top)}"'
            svg = f'<rect fill="{colour}"{opacity}{about} {box}/>'
            if text and len(text) * _CHARACTER * 0.9 < wide and bottom - top > 9:
                svg += _text((left + right) / 2, (top + bottom) / 2 + 4, text, "on" if alpha == 1 else "in")
            return svg

        self._marks.append(draw)
        self._name(label, f'<rect fill="{colour}" fill-opacity="{alpha}" x="4" y="1" width="14" height="10"/>')

    def across(self, y: float, colour: str = GREY, label: str = "", *, dash: str = "2 4", width: float = 1.5) -> None:
        """Draw a horizontal line from edge to edge at y."""
        self.line([(-math.inf, y), (math.inf, y)], colour, label, dash=dash, width=width, names=("", ""))

    def name_rows(self, names: Sequence[str]) -> None:
        """Give the y axis a row for each name, the first at y = 0 on top."""
        self.y = Axis("", ticks=list(enumerate(names)), low=len(names) - 0.5, high=-0.5)

    def _name(self, label: str, key: str) -> None:
        if label:
            self.legend.setdefault(label, f'<svg class="key" viewBox="0 0 22 12">{key}</svg>')

    def svg(self, caption: str) -> str:
        """Return the <svg> element; screen readers read the caption."""
        x, y = self.x.settled(), self.y.settled()
        width, height = self.size
        longest_y = max((len(text) for _, text in y.ticks), default=0)
        lengths = [len(text) for _, text in x.ticks] or [0]
        left = 10 + _CHARACTER * longest_y + (16 if self.y.label else 0)
        right = width - max(8.0, 4 + _CHARACTER * lengths[-1] / 2)
        is_tilted = _CHARACTER * sum(length + 1.5 for length in lengths) > right - left
        room = 20 + (0.7 * _CHARACTER * max(lengths) if is_tilted else 0)
        top, bottom = 22.0 if self.title else 8.0, height - room - (16 if self.x.label else 0)
        x, y = replace(x, start=left, end=right), replace(y, start=bottom, end=top)
        grid = "".join(f"M{x.at(value)} {_number(top)}V{_number(bottom)}" for value, _ in x.ticks)
        grid += "".join(f"M{_number(left)} {y.at(value)}H{_number(right)}" for value, _ in y.ticks)
        if is_tilted:
            words = [_text(x.pixel(value) + 4, bottom + 12, text, "end", turn=-45) for value, text in x.ticks]
        else:
            words = [_text(x.pixel(value), bottom + 15, text, "in") for value, text in x.ticks]
        words += [_text(left - 6, y.pixel(value) + 4, text, "end") for value, text in y.ticks]
        centre = (left + right) / 2
        room = 2 * min(centre, width - centre)
        words.append(_text(centre, height - 5, self.x.label, "in", room=room))
        words.append(_text(11, (top + bottom) / 2, self.y.label, "in", turn=-90, room=height))
        words.append(_text(centre, 13, self.title[: int(width / _CHARACTER)], "in title"))
        marks = "".join(draw(x, y) for draw in self._marks)
        axes = f'data-x="{escape(self.x.label)}" data-y="{escape(self.y.label)}"'
        return (
            f'<svg class="plot" role="img" aria-label="{escape(caption)}" viewBox="0 0 {width:g} {height:g}" {axes}>'
            f'<path class="grid" d="{grid}"/><path class="axes" d="M{_number(left)} {_number(top)}V{_number(bottom)}'
            f'H{_number(right)}"/>{marks}{"".join(words)}<circle class="here" r="6"/></svg>'
        )


def _text(x: float, y: float, text: str, kind: str, *, turn: int = 0, room: float = math.inf) -> str:
    """Return a text, in letters small enough to fit into `room` pixels; "" for none.

    Args:
        kind: its class in the page's style, which says how it lies around the point.
        turn: by how many degrees it is turned.
    """
    place = (
        f'transform="translate({_number(x)} {_number(y)})rotate({turn})"'
        if turn
        else f'x="{_number(x)}" y="{_number(y)}"'
    )
    size = _FONT * min(1.0, room / (_CHARACTER * 1.05 * max(1, len(text))))
    style = f' style="font-size:{_number(size)}px"' if size < _FONT else ""
    return f'<text class="{kind}" {place}{style}>{escape(text)}</text>' if text else ""


def _marks(marker: str, colour: str, places: Iterable[str]) -> str:
    """Return the attributes of a path that has a marker at each place."""
    style, shape = _MARKS[marker]
    fill = f'fill="{colour}" ' if marker == "D" else ""
    return f'{fill}{style} d="{"".join(f"M{place}{shape}" for place in places)}"'


def _number(pixels: float) -> str:
    """Write pixels to one decimal, in few characters."""
    return f"{pixels:.1f}".removesuffix(".0")


def _joined(texts: Iterable[str]) -> str:
    return escape("|".join(text.replace("|", "/") for text in texts))


@dataclass(frozen=True)
class Plot:
    """Charts that belong together, with a caption."""

    caption: str  # a sentence or two; screen readers read it too
    charts: tuple[Chart, ...]

    @property
    def is_wide(self) -> bool:
        """Return True if it takes the whole width of a page."""
        return len(self.charts) > 1 or any(chart.size[0] > 440 for chart in self.charts)

    @property
    def legend(self) -> dict[str, str]:
        """Return an SVG for each label of all charts."""
        return {label: key for chart in self.charts for label, key in chart.legend.items()}
