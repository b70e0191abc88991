"""Write a report as one HTML file that needs no network."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raysubset.events import Note
from raysubset.report.parts import Line, Preformatted, Section

PAGE_PATH = "report/report.html"


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    verdict: tuple[Line, ...]  # the result in a sentence or two, on top
    sections: Sequence[Section]
    story: Section | None = None  # beside the verdict: the findings and the most important plot
    facts: tuple[tuple[str, str], ...] = ()  # names and values: method, data, time, versions


def write_file(page: Page, path: str) -> str:
    """Write a page to a local file; return its path."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(to_html(page), encoding="utf-8")
    return str(target)


def to_html(page: Page) -> str:
    """Return the page as HTML, with its style, plots and pictures inside and every text escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.tests["preformatted"] = lambda line: isinstance(line, Preformatted)
    environment.tests["warning"] = lambda line: isinstance(line, Note) and line.is_warning
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("page.html").render(page=page)
