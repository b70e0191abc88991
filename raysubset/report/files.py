"""Write a report's files into the directory: progress.csv and TensorBoard events for existing tools, and the page."""

import csv
import io
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from raysubset.costs import works_of
from raysubset.quality import quality_of
from raysubset.report.figures import Record, passes_by_epoch
from raysubset.report.pages import write_page
from raysubset.report.reading import read_report
from raysubset.run_directory import RunDirectory

PROGRESS_PATH = "progress.csv"


def write_files(path: str) -> str:
    """Write the page into a finished directory, and for a run also the files of other tools; replace older ones.

    If this process dies, each file is whole, old or new; `raysubset report DIR --format html` writes them again.

    Returns:
        The page's path or URI.

    Raises:
        ValueError: for the reasons of read_report().
    """
    directory, record = RunDirectory.at(path), read_report(path)
    if "kind" in record:
        return write_page(directory, record)
    quality = quality_of(record).name
    rows = list(_rows(record, quality))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    directory.write_bytes(PROGRESS_PATH, text.getvalue().encode())
    started_at = (record["environment"] or {}).get("started_at", 0.0)
    # The name is the same at every call; TensorBoard reads any name that begins like this
    name = f"events.out.tfevents.{int(started_at)}.raysubset"
    directory.write_bytes(name, _events(record, rows, started_at, quality))
    return write_page(directory, record)


def _rows(record: Record, quality: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each epoch of each training."""
    num_train = record["data"]["num_train"]
    for stage, round, subset, work in works_of(record["stages"]):
        trained = passes_by_epoch(work, num_train)
        for number, (epoch, passes) in enumerate(zip(work.get("history", ()), trained, strict=True), 1):
            # The minimum was measured at the end of the last epoch, unless an earlier one was restored
            at_end = number == len(trained) and work["outcome"] != "diverged"
            validation = epoch.get("validation") or (work["validation"] if at_end else None) or {}
            yield {
                "stage": stage,
                "round": round,
                "subset": subset,
                "epoch": epoch["epoch"],  # of the examples trained on
                "training_iteration": number,  # rows of this stage, round and subset so far
                "num_steps": epoch["num_steps"],  # optimizer steps of this stage, round and subset so far
                "loss": epoch["loss"],  # mean over the epoch while training
                "learning_rate": epoch["learning_rate"],
                "validation_loss": validation.get("loss"),  # an actor's work has it at its end only
                f"validation_{quality}": validation.get(quality),
                "passes": passes,  # of training so far in this stage, round and subset, over the full set
            }


def _events(record: Record, rows: list[dict[str, Any]], started_at: float, quality: str) -> bytes:
    """Return a TensorBoard event file: curves over optimizer steps, aggregates over rounds, the result at step 0."""
    from tensorboardX import SummaryWriter  # loads torch, which takes seconds

    metrics = tuple(dict.fromkeys(("loss", quality)))
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:

            def add(tag: str, value: float | None, step: int) -> None:
                if value is not None:
                    writer.add_scalar(tag, value, step, walltime=started_at)

            earlier_steps = Counter[str]()  # of earlier rounds
            for (stage, _, subset), epochs in groupby(rows, key=itemgetter("stage", "round", "subset")):
                kind, step = {"subsets": "subset", "subsamples": "subsample"}.get(stage), 0
                name = f"{kind}_{subset:04d}" if kind else stage
                for row in epochs:
                    step = earlier_steps[name] + row["num_steps"]
                    for key in ("loss", "learning_rate", *(f"validation_{key}" for key in metrics)):
                        add(f"{name}/{key}", row[key], step)
                earlier_steps[name] = step
            for round in record["stages"].get("rounds", ()):
                aggregation = round["aggregation"]
                for key in metrics if aggregation["validation"] else ():
                    add(f"aggregate/validation_{key}", aggregation["validation"][key], round["round"] + 1)
                add("aggregate/barrier", aggregation["barrier"], round["round"] + 1)
            for split in ("validation", "test"):
                for key in metrics:
                    add(f"result/{split}_{key}", record[split][key], 0)
        (path,) = Path(folder).glob("events.out.tfevents.*")
        return path.read_bytes()
