"""Report several finished runs side by side: their results, their costs and the settings in which they differ."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from raysubset.config import flatten
from raysubset.events import Note
from raysubset.quality import quality_of
from raysubset.report.curves import run_stages, training_plot
from raysubset.report.figures import Record, finite, loss_name, with_error
from raysubset.report.parts import Line, Page, Section, drawn, write_file
from raysubset.report.reading import read_report

_OF_THE_PLACE = ("name", "storage_path")  # settings that the runs' names already show

_ROWS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("method", lambda r: r["method"].replace("_", " ")),
    ("data", lambda r: r["data"]["name"]),
    ("model", lambda r: r["model"]["name"]),
    ("parameters", lambda r: f"{r['model']['num_parameters']:,}"),
    ("subsets", lambda r: f"{len(r['overdetermination_ratio']['subsets'])}" if r["stages"].get("rounds") else "–"),
    ("Q, least", lambda r: f"{min(r['overdetermination_ratio']['subsets'], default=0):.3g}" if _rounds(r) else "–"),
    ("rounds", lambda r: f"{_rounds(r)}" if _rounds(r) else "–"),
    ("aggregate", lambda r: r["stages"]["rounds"][-1]["aggregation"]["method"] if _rounds(r) else "–"),
    ("test {}", lambda r: _reached(r)),
    ("test loss", lambda r: f"{finite(r['test']['loss']):.4f}"),
    ("validation loss", lambda r: f"{finite(r['validation']['loss']):.4f}"),
    ("passes in total", lambda r: f"{r['cost']['passes']:.2f}"),
    ("passes on the critical path", lambda r: f"{r['cost']['critical_path_passes']:.2f}"),
    ("device-seconds", lambda r: f"{r['cost']['device_s']:.1f}"),
    ("wall seconds", lambda r: f"{r['seconds']['wall']:.1f}"),
)


def _rounds(record: Record) -> int:
    return len(record["stages"].get("rounds") or ())


def _reached(record: Record) -> str:
    """Return the test quality with its error, in the unit of its label."""
    quality = quality_of(record)
    return with_error(record["test"], quality, quality.number)


def read_several(directories: Sequence[str]) -> list[dict[str, Any]]:
    """Read the records of several finished runs.

    Raises:
        ValueError: for the reasons of read_report(), for a run given twice, for the directory of a sweep or comparison,
            and for runs that learn different things.
    """
    records = [read_report(directory) for directory in directories]
    if len(uris := {record["uri"] for record in records}) < len(records):
        raise ValueError(f"of {len(records)} directories only {len(uris)} are different: give each run once")
    for directory, record in zip(directories, records, strict=True):
        if kind := record.get("kind"):
            raise ValueError(f"{directory} is a {kind}: only runs can be laid side by side; report it alone")
    if len(names := {(quality := quality_of(record)).unit or quality.name for record in records}) > 1:
        words = ", ".join(sorted(names))
        raise ValueError(f"the runs learn different things ({words}) and cannot be compared: give runs of one task")
    return records


def several_sections(records: Sequence[Record]) -> list[Section]:
    """Return the sections of several runs, with a column for each."""
    names, quality = _names(records), quality_of(records[0])
    rows = tuple((title.format(quality.label), *(cell(record) for record in records)) for title, cell in _ROWS)
    lines: list[Line] = [
        "Each is one run, and other seeds give other results: raysubset compare tells whether a difference holds. "
        "±, if known: standard error of sampling the test examples."
    ]
    if len({(r["data"]["name"], r["data"]["num_train"], r["data"]["num_test"]) for r in records}) > 1:
        text = f"the runs are on different data, so neither {quality.name} nor passes can be compared."
        lines.insert(0, Note(text, is_warning=True))
    if len({loss_name(record) for record in records}) > 1:
        text = f"the runs minimize different losses, which cannot be compared; {quality.name} can."
        lines.insert(0, Note(text, is_warning=True))
    configs = [flatten(record["config"]) for record in records]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _OF_THE_PLACE)
    different = tuple(
        (key, *cells) for key in keys if len(set(cells := [_value(config, key) for config in configs])) > 1
    )
    panels = [(name, run_stages([record])) for name, record in zip(names, records, strict=True)]
    curves = training_plot("of each run", panels, loss="loss")
    runs = Section("Runs side by side", ("", *names), rows, tuple(lines), drawn(curves))
    if different:
        return [runs, Section("Settings that differ", ("", *names), different)]
    return [runs, Section("Settings that differ", lines=("None but name and place.",))]


def _value(config: Record, key: str) -> str:
    value = config.get(key)
    return "–" if value is None else str(value)


def _names(records: Sequence[Record]) -> list[str]:
    """Return the runs' names; runs with the same name are called by their URI."""
    count = Counter(record["name"] for record in records)
    return [record["uri"] if count[record["name"]] > 1 else record["name"] for record in records]


def write_several(records: Sequence[Record], path: str) -> str:
    """Write one HTML page of several runs, which read_several() has read, to a local file; return its path."""
    facts = tuple(zip(_names(records), (record["uri"] for record in records), strict=True))
    page = Page("Comparison of runs", (), several_sections(records), facts=facts)
    return write_file(page, path)
