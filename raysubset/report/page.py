"""A report as one HTML file that needs no network: what a Page holds, and how it is written down."""

import base64
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
    sections: tuple[Section, ...]
    story: Section | None = None  # what stands beside the verdict: findings, and the one plot that tells most
    facts: tuple[tuple[str, str], ...] = ()  # what was run, on what, when, by which version


def write_file(page: Page, path: str) -> str:
    """Write a page to a file of this machine; the file."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(to_html(page), encoding="utf-8")
    return str(target)


def to_html(page: Page) -> str:
    """One file: style, plots and pictures inside; every text escaped."""
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
