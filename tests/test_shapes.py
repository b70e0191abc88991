"""Values of records that a stranger, an editor or a disk has changed are named before anything is made of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysubset.cli import call
from raysubset.report import comparison_sections, sections, sweep_sections
from raysubset.run_directory import (
    COMPARISON_PATH,
    REPORT_PATH,
    SWEEP_PATH,
    CorruptFile,
    RunDirectory,
    minimum_folder,
    minimum_path,
)
from raysubset.run_directory.shapes import refuse_other_values
from tests.test_html_report import a_comparison
from tests.test_report import a_record, conventional_record, minimum, round_of
from tests.test_sweeping import a_sweep


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key) of every value in a tree, of lists that of the first item."""
    for key in value if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("path", [REPORT_PATH, "conventional", SWEEP_PATH, COMPARISON_PATH])
def test_a_value_of_another_type_is_refused_by_its_name_or_no_report_reads_it(path: str, tmp_path: Path):
    record, draw = {
        REPORT_PATH: lambda: (a_record(), sections),
        "conventional": lambda: (conventional_record(), sections),
        SWEEP_PATH: lambda: (RunDirectory.at(a_sweep(tmp_path)).read_json(SWEEP_PATH), sweep_sections),
        COMPARISON_PATH: lambda: (a_comparison(tmp_path).read_json(COMPARISON_PATH), comparison_sections),
    }[path]()
    path = REPORT_PATH if path == "conventional" else path
    refuse_other_values(path, record)
    refused = []
    for owner, key in list(places(record)):
        if isinstance(sound := owner[key], list):
            continue
        owner[key] = []
        try:
            refuse_other_values(path, record)
        except ValueError as error:
            refused.append((str(error), key))
        else:
            draw(record)
        owner[key] = sound
    assert len(refused) > 30
    assert all(f"{key} = [] should be " in told or f"[{key}] = [] should be " in told for told, key in refused)


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (lambda record: record["test"].update(num_examples=0), "test.num_examples = 0 should be 1 or more"),
        (lambda record: record["cost"].update(passes=float("inf")), "cost.passes = inf should be a number"),
        (lambda record: record["cost"].update(passes=10**400), "cost.passes = 1000.* should be a number"),
        (lambda record: record["stages"]["rounds"][0]["minima"][1].pop("history"), r"minima\[1\].history is missing"),
        (lambda record: record.update(data="digits"), "data = 'digits' should be an object"),
    ],
)
def test_a_record_with_such_a_value_is_damaged(change: Callable[[Any], None], flaw: str):
    record = a_record()
    change(record)
    with pytest.raises(ValueError, match=flaw):
        refuse_other_values(REPORT_PATH, record)


def test_records_of_stages_are_checked_by_their_place_and_others_are_not(tmp_path: Path):
    run, folder = RunDirectory(str(tmp_path), "r"), minimum_folder(0, 1)
    sound = minimum(1)
    run.write_json(minimum_path(folder), sound)
    assert run.read_json(minimum_path(folder)) == sound
    run.write_json(minimum_path(folder), sound | {"start_id": None})
    with pytest.raises(CorruptFile, match=rf"{folder}/minimum.json in .* is damaged: start_id = None should be a text"):
        run.read_json(minimum_path(folder))
    run.write_json(minimum_path("trunk"), sound | {"start_id": None})  # which Ray Train's stages have none of
    run.read_json(minimum_path("trunk"))
    run.write_json("rounds/0000/aggregate.json", round_of([minimum(0)]))
    run.write_json("own.json", {"anything": [None]})
    assert run.read_json("own.json") == {"anything": [None]}
    assert run.read_record(minimum_path(folder)) is None


@pytest.mark.parametrize("path", ["../r2/report.json", "/etc/passwd", "trials/../../x", ".."])
def test_no_path_of_a_record_leads_out_of_its_directory(path: str, tmp_path: Path):
    run = RunDirectory(str(tmp_path), "r")
    for touch in (
        run.read_bytes,
        run.exists,
        lambda path: run.write_bytes(path, b""),
        lambda path: run.check_lengths({path: ""}),
    ):
        with pytest.raises(CorruptFile, match="it would lie outside"):
            touch(path)
    with pytest.raises(ValueError, match="no plain name of a folder"):
        RunDirectory(str(tmp_path), path)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_whose_trial_is_named_by_a_path_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    directory = RunDirectory.at(a_sweep(tmp_path))
    record = directory.read_json(SWEEP_PATH)
    record["trials"][0]["name"] = "../../outside"
    directory.write_json(SWEEP_PATH, record)
    RunDirectory(str(tmp_path), "outside").write_json(REPORT_PATH, a_record())
    assert call(["report", directory.uri, "--format", "html"]) == 2
    err = capsys.readouterr().err
    assert f"raysubset: {directory.uri} is damaged" in err
    assert "'../../outside' in" in err
    assert "Traceback" not in err
