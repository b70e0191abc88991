"""How plots are made: one drawing as SVG for the page, in the page's own ink so that it reads in light and dark, and
as PNG for elsewhere."""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Mid-tones that read on white and on near-black, apart for the colour-blind in this order (after Okabe and Ito)
COLOURS = ("#3b82c4", "#d9822b", "#2f9e6e", "#c2559d", "#8a6fd1", "#a8892a", "#3fa3b5", "#8d99a6")
GOOD, BAD = "#2f9e6e", "#d0524e"

_INK = "#16202b"  # text and axes; in the SVG the page's own colour
_STYLE: Any = {  # matplotlib spells the keys out in a type of its own
    "font.size": 10,
    "text.parse_math": False,  # a $ in a name is a $
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "raysubset",  # the same record gives the same file
}


@dataclass(frozen=True)
class Plot:
    """A drawing and what it shows."""

    name: str  # of its PNG, without the suffix
    caption: str  # a sentence or two; also read to those who cannot see it
    svg: str  # an <svg> element for an HTML page; black is currentColor
    png: bytes  # on white
    is_wide: bool = False  # wants the whole width of a page

    @property
    def path(self) -> str:
        """Of the PNG in a run directory."""
        return f"report/{self.name}.png"


def draw_plot(
    name: str, caption: str, draw: Callable[[Any], None], *, size: tuple[float, float] = (5.2, 3.5), wide: bool = False
) -> Plot:
    """Have a matplotlib Figure of that size, in inches, drawn upon, and keep it in both forms."""
    from matplotlib import rc_context  # half a second; not pyplot, which keeps state and wants a screen
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # laid out once: savefig would do it anew, and draw twice, for each file
        vector, raster = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(raster, format="png", dpi=150, facecolor="white")
    return Plot(name, caption, _inline(vector.getvalue(), name, caption), raster.getvalue(), wide)


def _inline(text: str, name: str, caption: str) -> str:
    """The <svg> element alone, without names that another in the page may have, and in the page's ink."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'id="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
    text = text.replace(_INK, "currentColor")
    width = re.search(r'width="([\d.]+)pt"', text)
    assert width
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    style = f"max-width: {4 / 3 * float(width[1]):.0f}px"
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="{style}"', 1)


def colour_of(names: Iterable[str]) -> dict[str, str]:
    """A colour a name, in their order; the ninth is the first's again."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(dict.fromkeys(names))}


def log_where_wide(axes: Any, which: str, values: Sequence[float]) -> None:
    """A log axis, with plain numbers on it, where positive values span more than a factor of five."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    values = [value for value in values if math.isfinite(value)]
    if not values or min(values) <= 0 or max(values) < 5 * min(values):
        return
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    decades = math.log10(max(values) / min(values))
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1.2 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_outside(figure: Any, axes: Any, *, columns: int = 4) -> None:
    """The legend below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))
