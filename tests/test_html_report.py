import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from raysubset import work
from raysubset.cli import call
from raysubset.config import Config, MinimizeConfig
from raysubset.data import load_full_set
from raysubset.events import Note
from raysubset.models import build_model
from raysubset.report import (
    Beside,
    comparison_sections,
    find_beside,
    read_report,
    read_several,
    several_sections,
    write_files,
    write_several,
)
from raysubset.report.curves import arm_stages, run_stages
from raysubset.report.drawing import COLOURS, Chart, Plot
from raysubset.report.line import line_between_minima
from raysubset.report.parts import Page, Section, to_html
from raysubset.report.predictions import class_scores, confused_pairs, confusion, masks, outputs_of, worst_predictions
from raysubset.report.run_plots import gap_over_q, story
from raysubset.report.timeline import lanes, pauses, time_line, troubles
from raysubset.run_directory import (
    COMPARISON_PATH,
    CONFIG_PATH,
    FORMAT,
    MISTAKES_PATH,
    PREDICTIONS_PATH,
    REPORT_PATH,
    SAMPLES_PATH,
    RunDirectory,
    minimum_folder,
    weights_path,
)
from raysubset.run_directory.ledger import Ledger, Work
from raysubset.training import Cost, evaluate
from tests.test_report import BITS, R2, a_record, conventional_record, metrics, minimum, of_task, round_of
from tests.tiny import image_examples


class Read(HTMLParser):
    """What a page consists of: its addresses, ids, words, and the words of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.verdict: list[str] = []
        self.words = ""
        self.images: list[bytes] = []
        self._into: list[str] | None = None
        self._style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
        self.addresses += [v for k, value in attrs for v in re.findall(r"url\(([^)]*)\)", value or "")]
        if "id" in own:
            self.ids.append(own["id"] or "")
        self._style = tag == "style"
        self._into = self.cells if tag in ("td", "th") else self.verdict if own.get("class") == "verdict" else None
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self._style = False
        if tag in ("td", "th", "p"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._style:
            self.addresses += re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", data)
            return
        self.words += data
        if self._into is not None:
            self._into[-1] += data


def check_self_contained(page: str) -> Read:
    """Every address is data or an id of the page; ids are its own; nothing is fetched, and one own script is run."""
    read = Read(page)
    assert len(read.ids) == len(set(read.ids))
    for address in read.addresses:
        if address.startswith("data:image/png;base64,"):
            Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2], validate=True))).verify()
        else:
            assert address.startswith("#")
            assert address[1:] in read.ids
    assert not {"link", "iframe", "object", "embed"} & set(read.tags)
    assert read.tags.count("script") == page.count("<script>") == 1
    assert "http" not in page
    return read


def a_directory(folder: Path, record: dict[str, Any] | None = None, *, name: str = "a-run") -> RunDirectory:
    """A finished run's: two rounds, an attempt that was lost, four test examples of which two are wrong."""
    run = RunDirectory(str(folder), name)
    record = record or a_record()
    run.open(record["config"], {})
    run.write_json(REPORT_PATH, record | {"name": name, "uri": run.uri})
    ledger = Ledger(run)
    at: dict[str, Any] = {"node": "node-a", "device": "cpu"}
    ledger.write(
        Work("subsets", 0, 0, 0, **at, started_at=100.0, cost=Cost(device_s=2.0), outcome="lost", error="gone")
    )
    ledger.write(Work("subsets", 0, 0, 1, **at, started_at=104.0, ended_at=109.0, outcome="done", waited_s=1.0))
    ledger.write(Work("subsets", 0, 1, 0, **at, started_at=101.0, ended_at=105.0, outcome="done"))
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.5], [0.0, 0.25, 1.0], [4.0, 0.0, 1.0]])
    labels, rows = torch.tensor([0, 1, 1, 2]), pa.chunked_array([pa.array([7, 8, 9, 10])])
    images = torch.arange(4 * 6, dtype=torch.uint8).view(4, 2, 3, 1)
    examples = image_examples(images, labels)
    predictions = pa.table({"row": rows, **examples.task.tabulate(outputs, labels)})
    run.write_table(PREDICTIONS_PATH, predictions)
    run.write_table(MISTAKES_PATH, examples.task.mistakes(predictions, examples.rows, lambda chosen: outputs[chosen]))
    run.write_json("model.json", {"class_names": ["<b>bold</b>", "$x$ & y", "ok"], "image_shape": [2, 3, 1]})
    return run


# The page of a run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests that only read it, as drawing takes seconds."""
    warnings = [Note(text, is_warning=True) for text in ("subset 3 lacks class 7", "<script>alert(1)</script>")]
    record = a_record(advice=[note.to_dict() for note in warnings])
    return Path(write_files(a_directory(tmp_path_factory.mktemp("page"), record).uri))


def test_page_is_one_file_that_needs_nothing_else_with_the_result_on_top(page: Path):
    assert page.parts[-3:] == ("a-run", "report", "report.html")
    read = check_self_contained(page.read_text())
    assert read.verdict == [
        "Test accuracy 90.00% ± 3.00 (90 of 100), loss 0.1200, with cnn of 1,234 parameters, "
        "for 12.00 passes over the training set in total, 4.50 of them on the critical path."
    ]
    assert {file.name for file in page.parent.iterdir()} <= {"report.html", "line.json"}


def test_numbers_of_the_record_stand_in_the_page(page: Path):
    read = check_self_contained(page.read_text())
    assert "2.5 MB" in read.cells  # bytes sent
    assert "+0.1200" in read.cells  # the gap of subset 2: 0.22 - 0.1
    assert "4.50" in read.cells
    assert "2001-09-09 01:46 UTC" in read.words  # begun at 1e9
    assert "warning: subset 3 lacks class 7" in read.words
    assert "gone" in read.cells  # the lost attempt's error


def test_names_are_escaped_wherever_they_come_from(page: Path):
    text = page.read_text()
    read = check_self_contained(text)
    assert "warning: <script>alert(1)</script>" in read.words
    assert "ok, taken for <b>bold</b>" in read.words
    assert "<b>bold" not in text


def test_wrong_examples_are_shown_by_their_margin_with_their_own_pixels(page: Path):
    read = check_self_contained(page.read_text())
    assert "2 of 4 test examples are wrong" in read.words
    first, second = [a for a in read.addresses if a.startswith("data:")]
    # example 3 by 4.0 - 1.0, example 2 by 1.0 - 0.25
    for address, place in ((first, 3), (second, 2)):
        image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert np.asarray(image).tolist() == (np.arange(6).reshape(2, 3) + 6 * place).tolist()
    assert read.words.index("ok, taken for <b>bold</b>") < read.words.index("$x$ & y, taken for ok")


def test_a_run_without_predictions_rounds_or_ledger_has_a_page_too(tmp_path: Path):
    run = RunDirectory(str(tmp_path), "plain")
    run.write_json(REPORT_PATH, conventional_record())
    read = check_self_contained(Path(write_files(run.uri)).read_text())
    assert "Costs" in read.words
    assert "it gets wrong" not in read.words
    assert "Minima" not in read.words


def test_losses_that_are_not_finite_leave_a_page(tmp_path: Path):
    record = a_record()
    bad = {"loss_sum": None, "loss": None, "num_correct": 5, "num_examples": 50, "accuracy": 0.1}
    changes = {"validation": bad, "uniform_mean": bad, "barrier": None, "mean_member_loss": None}
    record["stages"]["rounds"] = [round_of([minimum(0, validation=bad), minimum(1)], **changes)]
    read = check_self_contained(Path(write_files(a_directory(tmp_path, record).uri)).read_text())
    assert "not finite" in read.words


def test_squared_error_draws_the_law_and_cross_entropy_says_there_is_none():
    squared = gap_over_q(a_record(Config().with_overrides({"task.loss": "squared_error"})))
    assert squared is not None
    assert "with fixed inputs: (Q+1)/(Q−1)" in squared.caption
    record = a_record(Config().with_overrides({"task.loss": "squared_error"}))
    bad = {"loss_sum": None, "loss": None, "num_correct": 5, "num_examples": 50, "accuracy": 0.1}
    record["stages"]["rounds"] = [round_of([minimum(0, validation=bad), minimum(1), minimum(2)])]
    drawn = gap_over_q(record)
    assert drawn is not None
    assert (*drawn.legend, drawn.caption[:41]) == (*squared.legend, "Validation loss of each of 2 minima over ")
    record = a_record()
    assert gap_over_q(record) is None  # all of one Q
    record["stages"]["rounds"] = [round_of([minimum(0), minimum(1, overdetermination_ratio=2.0)])]
    drawn = gap_over_q(record)
    assert drawn is not None
    assert "For cross-entropy there is no law to draw" in drawn.caption


def test_a_run_is_held_against_the_conventional_run_and_the_comparison_that_lie_beside_it(tmp_path: Path):
    run = a_directory(tmp_path)
    before = read_report(run.uri)
    del before["config"]["data"]["window"]  # of a version without the field
    run.write_json(REPORT_PATH, before)
    record = read_report(run.uri)
    assert find_beside(record) == Beside()
    told = "There is no conventional run of these data and this network beside it."
    assert told in Read(Path(write_files(run.uri)).read_text()).words
    cost = a_record()["cost"]
    for name, passes, changes in (
        ("other-data", 12.0, {"data.name": "mnist"}),
        ("far", 40.0, {}),
        ("near", 16.0, {}),
        ("another-seed", 12.0, {"seed": 1}),
    ):
        config = Config(method="conventional").with_overrides(changes)
        other = conventional_record() | {"config": config.to_dict(), "test": metrics(0.5, 79, 100)}
        other["cost"] = cost | {"passes": passes, "critical_path_passes": 9.0}
        a_directory(tmp_path, other, name=name)
    (tmp_path / "no-run").mkdir()
    found = find_beside(record)
    assert found.run is not None
    assert (found.run["name"], found.comparison) == ("near", None)
    a_comparison(tmp_path)
    read = check_self_contained(Path(write_files(run.uri)).read_text())
    assert read.verdict[1:] == [
        "Against the conventional run near (79.00% ± 4.07 for 16.00 passes): accuracy +11.00 points ± 5.06 (better), "
        "for 0.75 times its passes in total and 0.50 times those on its critical path.",
        "Does a tenth of the cost do? The comparison a-comparison (3 seeds, a smoke test) says: confirmed on both "
        "clocks.",
    ]
    assert "conventional run, 16 passes" in read.words  # the line in the story
    assert told not in read.words
    assert f"raysubset report {run.uri} {tmp_path / 'near'}" in read.words


def test_the_time_line_shows_what_ray_takes_to_start_and_end():
    works = [
        Work("trunk", 0, None, 0, "a", "cpu", start, ended_at=start + 2, outcome="done") for start in (110.0, 116.5)
    ]
    gaps = pauses(works, [{"started_at": 100.0, "startup_s": 6.0, "wall_s": 20.0}])
    assert [(gap.begun, gap.ended, gap.is_start) for gap in gaps] == [
        *((100.0, 106.0, True), (106.0, 110.0, False), (112.0, 116.5, False), (118.5, 120.0, False))
    ]
    drawn = time_line(works, gaps)
    assert list(drawn.legend) == ["start of Python, data and Ray", "Ray's processes start and end", "trunk"]
    assert pauses(works, [{"started_at": 110.0, "startup_s": 0.1, "wall_s": 2.5}]) == []


def test_the_same_record_gives_the_same_bytes(page: Path):
    first = {file.name: file.read_bytes() for file in page.parent.iterdir()}
    write_files(str(page.parent.parent))
    assert {file.name: file.read_bytes() for file in page.parent.iterdir()} == first


def test_columns_of_numbers_alone_are_flush_right():
    rows = (("a", "1.50", "3 of the least", "–"), ("b", "-2,000", "4", "+0.1 ± 0.2"), ("c", "not finite", "", ""))
    assert Section("", ("", "", "", ""), rows).numeric == {1, 3}


def test_a_plot_has_the_values_of_its_points_beside_their_places():
    chart = Chart("passes", "loss <x>", log="y", size=(400, 250))
    chart.line([(0, 1.0), (1, math.nan), (2, 0.01)], COLOURS[0], 'a "name"', marker="o", names=["|", "-", "end"])
    svg = chart.svg("a caption")
    assert 'data-k="a &quot;name&quot;" data-x="/|end" data-y="1|0.01"' in svg
    assert 'data-y="loss &lt;x&gt;"' in svg
    (line,) = re.findall(r'stroke-width="2" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    left, top, right, bottom = map(float, line)
    assert (left, top) < (right, bottom)  # 1 above 0.01
    half = [float(y) for y, text in re.findall(r'class="end" x="[\d.]+" y="([\d.]+)">([\d.]+)<', svg) if text == "0.1"]
    assert half == [pytest.approx((top + bottom) / 2 + 4, abs=0.2)]  # a logarithmic axis, words four pixels lower
    page = Page("t", ("v",), (Section("s", lines=("l",), plots=(Plot("a <caption>", (chart, chart)),)),))
    read = check_self_contained(to_html(page))
    assert "a <caption>" in read.words


def test_labels_of_axes_fit_into_the_chart():
    short, long = "loss", "validation loss, squared error of standardised targets"
    for x, y in ((short, short), (long, short), (short, long)):
        chart = Chart(x, y, size=(300, 220))
        chart.line([(0, 1.0), (1, 2.0)], COLOURS[0], "a", marker="o")
        sizes = re.findall(r'class="in" [^>]*style="font-size:([\d.]+)px">([^<]*)<', chart.svg("a caption"))
        assert [label for _, label in sizes] == [label for label in (x, y) if label == long]
        assert all(float(size) * 0.56 * len(label) < (300 if label == x else 220) for size, label in sizes)


def test_a_section_between_wide_ones_takes_the_whole_width():
    wide = Section("wide", ("a" * 30,) * 4, (("b" * 30,) * 4,))
    narrow = Section("narrow", ("a",), (("b",),))
    html = to_html(Page("t", (), (narrow, wide, narrow, narrow, wide, narrow)))
    is_wide = ['class="wide"' in tag for tag in re.findall("<section[^>]*>", html)]
    assert is_wide == [True, True, False, False, True, True]


def test_a_plot_of_one_point_is_left_out():
    record = conventional_record()
    assert story(record) is None
    record["stages"]["conventional"]["history"][0]["validation"] = metrics(0.5, 20, 50)
    drawn = story(record, a_record())
    assert drawn is not None
    assert list(drawn.legend) == ["conventional", "subset pretraining run, 12 passes"]


# What is behind it


def test_predictions_and_metrics_are_those_of_one_evaluation():
    full_set = load_full_set(Config().data)
    config = Config()
    model = build_model(config.model, full_set.spec, seed=1)
    placed = work.placed_model(full_set, 0, config)
    metrics, cost, tables = work.test_weights(full_set, placed, config, model.state_dict())
    expected = evaluate(model, full_set.examples("test"), config.minimize)
    assert metrics.sums == expected.sums
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)
    assert cost.num_forward == len(full_set.test)
    table = tables[PREDICTIONS_PATH]
    assert table.column("row").to_pylist() == full_set.test.table.column("row").to_pylist()
    num = len(full_set.task.class_names)
    counts = confusion(table, num)
    assert counts.trace() == expected.sums["num_correct"]
    assert counts.sum(axis=1).tolist() == np.bincount(full_set.test.arrays()["label"], minlength=num).tolist()
    wrong = [row["margin"] for row in table.to_pylist() if row["label"] != row["predicted"]]
    assert tables[MISTAKES_PATH].column("margin").to_pylist() == sorted(wrong, reverse=True)[:24]


def test_the_page_of_a_regression_has_its_residuals_and_the_ten_worst_examples(tmp_path: Path):
    run = a_directory(tmp_path, of_task(a_record(), "regression", R2))
    run.delete(MISTAKES_PATH)
    truth = np.arange(12.0)
    errors = np.array([0, 1, -2, 3, -4, 5, -6, 7, -8, 9, -10, np.nan])
    columns = {"row": np.arange(12) + 100, "target": truth, "prediction": truth + errors}
    run.write_table(PREDICTIONS_PATH, pa.table(columns))
    path = Path(write_files(run.uri))
    read = check_self_contained(path.read_text())
    assert "Predictions of the final model over the truth, 12 of 12 test examples." in read.words
    assert "Confusion" not in read.words
    first = read.cells.index("111")  # what is not finite is the worst
    assert read.cells[first + 4 : first + 12] == ["110", "10", "0", "-10", "109", "9", "18", "+9"]
    assert "The 10 of 12 test examples with the largest errors, by their row" in read.words
    assert "101" not in read.cells
    assert "it gets wrong" not in read.words


def test_errors_of_several_outputs_are_compared_by_each_outputs_spread():
    targets = {"target_0": [0.0, 1.0], "target_1": [0.0, 100.0]}  # standard deviations 0.5 and 50
    table = pa.table({"row": [7, 8], **targets, "prediction_0": [0.5, 1.0], "prediction_1": [0.0, 120.0]})
    outputs = outputs_of(table)
    assert outputs == ["_0", "_1"]
    section = worst_predictions(table, outputs)
    assert section.columns == ("row", "output", "truth", "prediction", "error")
    assert section.rows == (("7", "0", "0", "0.5", "+0.5"), ("8", "1", "100", "120", "+20"))
    assert outputs_of(pa.table({"row": [1], "label": [0], "predicted": [1]})) == []


def test_masks_are_drawn_beside_their_image_and_the_truth(tmp_path: Path):
    run = a_directory(tmp_path, of_task(a_record(), "segmentation", R2))
    image, mask = np.arange(12).reshape(2, 2, 3), np.array([[0, 1], [255, 2]])

    def flat(values: np.ndarray) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), pa.uint8()), values.size)

    parts = {"image": flat(image), "mask": flat(mask), "predicted": flat(np.ones((2, 2), int))}
    run.write_table(MISTAKES_PATH, pa.table(parts))
    run.write_json("model.json", {"task": {"name": "segmentation", "inputs": {"image_shape": [2, 2, 3]}}})
    run.delete(PREDICTIONS_PATH)
    (picture,) = masks(run.read_table(MISTAKES_PATH), (2, 2, 3))
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)))
    blue, orange = [0x3B, 0x82, 0xC4], [0xD9, 0x82, 0x2B]  # of the first class after the background, and the second
    assert pixels.shape == (2, 8, 3)
    assert pixels[:, :2].tolist() == image.tolist()
    assert pixels[:, 3:5].tolist() == [[[0, 0, 0], blue], [[128] * 3, orange]]
    assert pixels[:, 6:].tolist() == [[blue, blue], [blue, blue]]
    assert picture.text == "75.0% of its pixels differ"
    read = check_self_contained(Path(write_files(run.uri)).read_text())
    assert "Masks it gets wrong" in read.words


def test_texts_that_the_model_writes_are_shown_as_they_stand(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = a_directory(tmp_path, of_task(a_record(), "next_token", BITS))
    run.write_json(SAMPLES_PATH, [{"prompt": "def f(", "text": "x):\n    return <b>x</b>"}])
    page = Path(write_files(run.uri)).read_text()
    assert "<pre>def f(│x):\n    return &lt;b&gt;x&lt;/b&gt;</pre>" in page
    run.write_json(SAMPLES_PATH, [{"prompt": None, "text": ""}])
    assert "What it writes" not in Path(write_files(run.uri)).read_text()
    assert "prompt = None should be a text; continuing without it" in caplog.text


def test_many_classes_give_the_pairs_most_often_confused():
    counts = np.diag([5, 5, 5])
    counts[0, 2], counts[1, 0] = 4, 2
    pairs = confused_pairs(counts, ["a", "b", "c"])
    assert pairs.rows == (("a", "c", "4", "9"), ("b", "a", "2", "7"))
    scores = class_scores(counts, ["a", "b", "c"])
    assert scores.rows[0] == ("a", "9", "55.6", "71.4", "62.5")  # 5 of 9, 5 of 7, 10 of 16


def test_attempts_that_overlap_are_in_lanes_of_their_own():
    def work(subset: int, node: str, start: float, end: float, waited_s: float = 0.0) -> Work:
        return Work("subsets", 0, subset, 0, node, "cpu", start, ended_at=end, outcome="done", waited_s=waited_s)

    works = [work(0, "a", 0, 4), work(1, "a", 1, 3, 1.0), work(2, "a", 3, 6, 2.5), work(3, "b", 2, 3)]
    found = [(lane[0].node, [one.subset for one in lane]) for lane in lanes(works)]
    assert found == [("a", [0]), ("a", [1, 2]), ("b", [3])]
    assert troubles({"": works}) is None


def test_a_lost_attempt_is_told_with_how_its_work_ended(tmp_path: Path):
    works = Ledger(a_directory(tmp_path)).read()
    section = troubles({"": works})
    assert section is not None
    row = ("subsets", "0", "1", "1", "node-a", "lost", "2.0", "done", "gone")
    assert section.rows == (row,)
    section = troubles({"a-leg": works[:1], "another": works[1:]})  # whose attempts did not take its place
    assert section is not None
    assert section.rows == (("a-leg", *row[:7], "lost", "gone"),)


def test_the_ends_of_the_line_are_the_two_minima_and_it_is_measured_once(tmp_path: Path):
    config = Config().with_overrides({"model.name": "mlp"})  # without batch norm, whose statistics are recomputed
    full_set = load_full_set(config.data)
    record = a_record(config)
    run = a_directory(tmp_path, record)
    expected = []
    for subset in (0, 1):
        model = build_model(config.model, full_set.spec, seed=subset)
        path = weights_path(minimum_folder(0, subset))
        seal = run.write_weights(path, model.state_dict())
        record["stages"]["rounds"][-1]["minima"][subset]["files"] = {path: seal}
        expected.append(evaluate(model, full_set.examples("validation"), MinimizeConfig()).loss)
    line = line_between_minima(run, record)
    assert [point["share"] for point in line] == pytest.approx([n / 10 for n in range(11)])
    assert [line[0]["loss"], line[-1]["loss"]] == pytest.approx(expected)
    run.delete(weights_path(minimum_folder(0, 0)))
    assert line_between_minima(run, record) == line


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "weights are not in the run directory"),
        ({"model": {"name": "cnn", "num_parameters": 10**7}}, "up to 1,000,000 parameters"),
        ({"config": Config().with_overrides({"data.name": "photos.parquet"})}, "data that load quickly"),
    ],
)
def test_a_line_that_cannot_be_measured_says_why(tmp_path: Path, changes: dict[str, Any], why: str):
    record = a_record(**changes)
    with pytest.raises(ValueError, match=why):
        line_between_minima(a_directory(tmp_path, record), record)


def test_the_page_says_why_no_line_was_measured(page: Path):
    why = "the minima's weights are not in the run directory."
    assert f"The straight line between two minima was not measured: {why}" in Read(page.read_text()).words


# A comparison


def a_comparison(folder: Path) -> RunDirectory:
    interval = {"estimate": 0.9, "low": 0.85, "high": 0.95, "coverage": 0.95, "num": 3}

    def point(budget: float, accuracy: float) -> dict[str, Any]:
        mean = {"passes": budget, "critical_path_passes": budget / 2, "device_s": 1.0, "num_seeds": 3}
        mean["critical_path_s"] = 1.0
        mean |= {"test_accuracy": accuracy, "test_accuracy_interval": interval, "validation_loss": 0.5}
        return {"budget": budget, "mean": mean, "runs": [], "difference": interval, "is_non_inferior": True}

    settings = {"learning_rate": 0.1, "batch_size": 64}
    titles = {"B": ("conventional", "baseline"), "G": ("aggregate <of> minima", "candidate")}
    arms = [
        {"key": key, "title": title, "role": role, "settings": settings, "points": [point(1, 0.8), point(8, 0.9)]}
        for key, (title, role) in titles.items()
    ]
    arms[0]["points"][0]["mean"]["validation_loss"] = None  # JSON has no NaN
    arms[1]["points"].append({"budget": 16, "mean": None, "runs": [], "difference": None, "is_non_inferior": None})
    ups = {"G": {"interval": interval | {"estimate": 12.5, "low": 10.0, "high": None}}}
    network_rows = [
        {"arm": "B", "budget": 8, "num_bytes": 0, "num_exchanges": 0, "test_accuracy": 0.9, "wall_s": {"1": 7.25}},
    ]
    verdict = {"word": "confirmed", "text": "G's speed-up is 12.50.", "is_smoke_test": True}
    run = RunDirectory(str(folder), "a-comparison")
    run.open(Config().to_dict() | {"kind": "comparison"}, {})
    record = {
        "kind": "comparison",
        "name": "a-comparison",
        "uri": run.uri,
        "config": Config().to_dict(),
        "data": {"name": "digits", "num_train": 100, "num_test": 100},
        "model": {"num_parameters": 1234, "num_bytes": 5000, "forward_share": 0.35},
        "environment": None,
        "regime": {
            "overdetermination_ratio": {"full_set": 12.0, "subsets": [3.0]},
            "num_parameters": 1234,
            "num_subsets": 4,
            "num_workers": 2,
            "gbit_per_s": 0.25,
        },
        "seeds": [0, 1, 2],
        "margin": 0.005,
        "arms": arms,
        "conventional": {"budget": 8, "test_accuracy": 0.9, "target_accuracy": 0.895},
        "speed_ups": {"total": ups, "critical_path": ups},
        "verdicts": {"total": verdict, "critical_path": verdict},
        "tuning": {"tried": [], "passes": 0.0},
        "network": {
            "bandwidths": [1.0],
            "rows": network_rows,
            "s_per_pass": 0.5,
            "data_parallel_bytes_a_step": 10,
        },
        "failed": {"G-16": "died"},
        "legs": {},
        "seconds": {"startup": 1.0, "wall": 60.0, "num_sessions": 2},
    }
    run.write_json(COMPARISON_PATH, record)
    return run


def test_a_rate_at_the_edge_of_the_grid_is_told_once(tmp_path: Path):
    run = a_comparison(tmp_path)
    record = run.read_json(COMPARISON_PATH)
    rates = {"B": (0.03, 0.1, 0.3), "G": (0.01, 0.03, 0.1)}
    record["tuning"]["tried"] = [
        {"arm": arm, "learning_rate": rate, "batch_size": 64, "validation_loss": 0.5, "budget": 1.0, "leg": "x"}
        for arm, tried in rates.items()
        for rate in tried
    ]
    record["tuning"]["at_edge"] = ["G"]
    run.write_json(COMPARISON_PATH, record)
    read = check_self_contained(Path(write_files(run.uri)).read_text())
    assert "conventional (B of --arms): conventional; tuned: learning rate 0.1, batch 64" in read.words
    edge = "at the edge of the grid: a rate beyond it may do better (--learning-rates)"
    assert read.words.count("at the edge of the grid") == 1
    assert f"warning: the learning rate of aggregate is {edge}" in read.words
    tuning = next(part for part in comparison_sections(record) if part.title == "Tuning")
    assert [row[-1] for row in tuning.rows] == ["", "chosen", "", "", "", "chosen"]
    assert "--learning-rates 0.01 0.03 0.1 0.3 --margin" in read.words
    record["tuning"]["goes_beyond"] = True  # the default grid, which grows by itself: the command leaves it out
    run.write_json(COMPARISON_PATH, record)
    assert "--learning-rates 0.01" not in check_self_contained(Path(write_files(run.uri)).read_text()).words


def test_the_command_of_a_comparison_names_grids_of_one_and_its_exact_numbers(tmp_path: Path):
    record = a_comparison(tmp_path).read_json(COMPARISON_PATH)
    record["tuning"] |= {"goes_beyond": False}  # as of --learning-rates 0.1, which is not run, as a grid of one
    settings = {"learning_rate": 0.1, "batch_size": 32}
    record["arms"] = [arm | {"settings": settings} for arm in record["arms"]]
    record["arms"][1]["points"][1]["budget"] = 4 / 3
    record |= {"seeds": [3, 5, 9], "margin": 0.0012345678}
    *_, about_seeds, command = next(
        part for part in comparison_sections(record) if part.title == "What it rests on"
    ).lines
    assert "--budgets 1 1.3333333333333333 8 16 --learning-rates 0.1 --batch-sizes 32 --margin 0.0012345678" in str(
        command
    )
    assert str(about_seeds).endswith("in Python: compare(…, seeds=[3, 5, 9]).")


def test_an_arm_that_costs_much_more_than_its_budget_is_named(tmp_path: Path):
    record = a_comparison(tmp_path).read_json(COMPARISON_PATH)

    def named() -> list[str]:
        basis = next(part for part in comparison_sections(record) if part.title == "What it rests on")
        return [str(line) for line in basis.lines if "times their budget" in str(line)]

    for point, passes in zip(record["arms"][1]["points"], (1.2, 9.0), strict=False):
        point["mean"]["passes"] = passes
    assert not named()
    record["arms"][1]["points"][0]["mean"]["passes"] = 1.25  # a whole step of Gauss-Newton
    (line,) = named()
    assert "some arms cost more than 1.2 times their budget of training: aggregate 1.25 passes for 1. " in line


def test_budgets_of_equal_cost_have_a_page_too(tmp_path: Path):
    run = a_comparison(tmp_path)  # as where both stop early, at the same step
    record = run.read_json(COMPARISON_PATH)
    for arm in record["arms"]:
        for point in filter(itemgetter("mean"), arm["points"]):
            point["mean"] |= {"passes": 3.0, "critical_path_passes": 2.0}
    run.write_json(COMPARISON_PATH, record)
    check_self_contained(Path(write_files(run.uri)).read_text())


def test_a_comparison_has_its_verdicts_on_top_then_curves_speed_ups_and_what_failed(tmp_path: Path):
    path = Path(write_files(a_comparison(tmp_path).uri))
    read = check_self_contained(path.read_text())
    assert [line.partition(". ")[0] for line in read.verdict] == [
        "A tenth of the cost, counting passes in total: confirmed",
        "A tenth of the cost, counting passes on the critical path: confirmed",
    ]
    assert "12.50 [10.00, …] 95%" in read.cells
    assert "7.25" in read.cells
    assert "died" in read.cells
    assert "not finite" in read.cells
    assert "aggregate (G of --arms): aggregate <of> minima; tuned: learning rate 0.1, batch 64" in read.words
    assert "confirmed. aggregate's speed-up is 12.50." in read.words
    assert "raysubset compare --seeds 3 --arms B G --budgets 1 8 16 --margin 0.005 --bandwidth 0.25" in read.words
    assert "Test accuracy over passes in total" in read.words
    few: dict[str, Any] = read_report(str(path.parents[1])) | {"seeds": [0, 1]}
    few["arms"].append({"key": "I:minimize.accumulation=2", "title": "", "role": "control", "points": []})
    few["arms"][-1] |= {"settings": few["arms"][0]["settings"], "trained": {"learning_rate": 0.4, "batch_size": 256}}
    few["arms"][0] |= {"trained": few["arms"][0]["settings"]}
    lines = [str(line) for part in comparison_sections(few) for line in part.lines]
    assert "conventional (B of --arms): conventional; learning rate 0.1, batch 64" in lines
    told = "learning rate 0.4, batch 256 of all workers together (tuned: learning rate 0.1, batch 64)"
    assert any(line.endswith(told) for line in lines)
    assert any("--num-workers 2 --bandwidth" in str(line) for line in comparison_sections(few)[1].lines)
    few["verdicts"]["total"]["text"] = "G's speed-up is 1.01 (50% interval 0.95 to any)."
    assert str(comparison_sections(few)[0].lines[0]).endswith("confirmed. aggregate's speed-up is 1.01.")
    assert "60.0 s in 2 sessions" in read.words


LEGS: dict[str, dict[str, Any]] = {
    "b": {"kind": "minimize", "stage": "conventional", "subset": None, "inputs": []},
    "m0": {"kind": "minimize", "stage": "subsets", "subset": 0, "inputs": []},
    "m1": {"kind": "minimize", "stage": "subsets", "subset": 1, "inputs": []},
    "a": {"kind": "aggregate", "stage": "subsets", "subset": None, "inputs": ["m0", "m1"]},
    "f": {"kind": "minimize", "stage": "fine_tuning", "subset": None, "inputs": ["a"]},
}


def legs_of(*seeds: int) -> dict[str, Any]:
    """LEGS once a seed, named like m0-3."""
    return {
        f"{key}-{seed}": leg
        | {"round": 0, "num_workers": 1, "inputs": [f"{before}-{seed}" for before in leg["inputs"]]}
        for seed in seeds
        for key, leg in LEGS.items()
    }


def made_of(key: str, leg: dict[str, Any]) -> dict[str, Any]:
    """What a leg came to: two epochs, on half of a hundred examples if on a subset; losses by subset and seed."""
    loss = 1.0 + (leg["subset"] or 0) + 10 * int(key[-1])
    validation = metrics(loss / 10, 5, 10)
    if leg["kind"] == "aggregate":
        return {"round": 0, "aggregation": round_of([minimum(0)])["aggregation"] | {"validation": validation}}
    history = [{"epoch": n, "loss": loss / n, "learning_rate": 0.1, "num_steps": n} for n in (1, 2)]
    num = 100 if leg["subset"] is None else 50
    return minimum(0, num_examples=num, history=history, validation=validation)


def test_curves_of_an_arm_are_means_of_members_and_then_of_seeds_one_stage_after_the_other():
    legs = legs_of(0, 2)
    found = {key: made_of(key, leg) for key, leg in legs.items()}
    runs = [{"leg": "f-0"}, {"leg": "f-2"}]
    members, mean, tuning = arm_stages(runs, legs, found, num_train=100)
    assert [stage.name for stage in (members, mean, tuning)] == ["subsets", "aggregation", "fine_tuning"]
    assert members.training == ((0.5, 11.5, 1.5, 21.5), (1.0, 5.75, 0.75, 10.75))  # members of 1 and 2, of 21 and 22
    assert members.validation == (pytest.approx((1.0, 1.15, 0.15, 2.15)),)
    assert ([point[0] for point in mean.validation], mean.training) == ([1.0], ())
    assert [point[0] for point in tuning.training] == [2.0, 3.0]
    del found["m1-2"]
    (members, *_) = arm_stages(runs, legs, found, num_train=100)
    assert members.training[0] == (0.5, 1.5, 1.0, 2.0)  # of one seed, whose members differ


def test_curves_go_on_with_the_members_that_still_train():
    record = a_record()
    short, long = record["stages"]["rounds"][0]["minima"][:2]
    record["stages"]["rounds"][0]["minima"] = [short | {"history": short["history"][:2]}, long]
    members, mean, tuning = run_stages([record])
    assert members.training[1:3] == ((0.5, 0.5, 0.5, 0.5), pytest.approx((0.75, 1 / 3, 1 / 3, 1 / 3)))
    assert members.validation == (pytest.approx((1.25, 0.205, 0.2, 0.21)),)  # at the ends of both: 0.5 and 2 passes
    assert [stage.validation[0][0] for stage in (mean, tuning)] == [2.0, 2.5]


def test_curves_of_whole_runs_are_those_of_their_stages_one_after_the_other():
    higher = a_record()
    for one in higher["stages"]["rounds"][0]["minima"]:
        one["history"] = [epoch | {"loss": 3 * epoch["loss"]} for epoch in one["history"]]
    members, mean, tuning = run_stages([a_record(), higher])  # of four times 25 of 100 examples, then by two workers
    assert [stage.name for stage in (members, mean, tuning)] == ["subsets", "aggregation", "fine_tuning"]
    assert members.training[:2] == ((0.25, 2.0, 1.0, 3.0), (0.5, 1.0, 0.5, 1.5))
    assert members.validation == (pytest.approx((2.0, 0.215, 0.215, 0.215)),)
    assert (mean.training, mean.validation) == ((), (pytest.approx((2.0, 0.18, 0.18, 0.18)),))
    assert tuning.validation == (pytest.approx((2.5, 0.2, 0.2, 0.2)), pytest.approx((3.0, 0.1, 0.1, 0.1)))
    shorter = a_record()
    shorter["stages"]["rounds"] = []
    assert [stage.name for stage in run_stages([a_record(), shorter])] == ["fine_tuning"]


def test_a_comparison_has_its_training_curves_and_the_time_line_of_its_legs(tmp_path: Path):
    run, legs = a_comparison(tmp_path), legs_of(0, 1, 2)
    record = run.read_json(COMPARISON_PATH)
    for arm, last in zip(record["arms"], "bf", strict=True):
        for point in arm["points"]:
            is_done = point["mean"] is not None
            point["runs"] = [{"leg": f"{last}-{n}", "error": None if is_done else "died"} for n in range(3)]
    run.write_json(COMPARISON_PATH, record | {"legs": legs})
    for key, leg in legs.items():
        own = RunDirectory(run.below("legs"), key)
        name = {"aggregate": "rounds/0000/aggregate.json", "minimize": f"{leg['stage']}/minimum.json"}[leg["kind"]]
        if leg["subset"] is not None:
            name = f"rounds/0000/minima/{leg['subset']:04d}/minimum.json"
        own.write_json(name, made_of(key, leg))
        work = Work(leg["stage"], 0, leg["subset"], 0, "node-a", "cpu", 100.0, waited_s=2.0, cost=Cost(device_s=1.5))
        is_closed = key != "b-1"  # whose driver died
        Ledger(own).write(replace(work, outcome="done", ended_at=104.0) if is_closed else replace(work, error="gone"))
    read = check_self_contained(Path(write_files(run.uri)).read_text())
    assert "Time line of the ledger" in read.words
    assert "averaged over a round's members and over n = 3 seeds" in read.words
    assert "15 legs in 15 attempts, 1 of them lost or failed, on 1 node, took 22 device-seconds" in read.words
    assert "An attempt waited 2.0 s for room" in read.words
    assert [cell for cell in read.cells if cell in ("b-1", "gone")] == ["b-1", "gone"]


def test_a_time_line_of_hundreds_of_legs_has_a_row_a_slot_and_stays_small():
    def work(number: int) -> Work:
        start = 30.0 * (number // 4)
        node = f"node-{number % 2}"
        return Work(
            "subsets", 0, number % 9, 0, node, "cpu", start, ended_at=start + 29, outcome="done", waited_s=start
        )

    works = [work(number) for number in range(600)]
    assert len(lanes(works)) == 4
    assert len(time_line(works).charts[0].svg("")) < 2**19


# Several runs


def test_several_runs_are_laid_side_by_side_with_what_differs(tmp_path: Path):
    other = Config(name="b").with_overrides({"trunk.epochs": 0.0, "minimize.learning_rate": 0.25})
    runs = [
        a_directory(tmp_path, name="a"),
        a_directory(tmp_path, a_record(other, test=metrics(0.5, 80, 100)), name="b"),
    ]
    table, settings = several_sections(read_several([run.uri for run in runs]))
    assert table.columns == ("", "a", "b")
    assert ("test accuracy, %", "90.00 ± 3.00", "80.00 ± 4.00") in table.rows
    assert ("minimize.learning_rate", "–", "0.25") in settings.rows
    assert "seed" not in [row[0] for row in settings.rows]
    path = write_several(read_several([run.uri for run in runs]), str(tmp_path / "out/both.html"))
    assert "90.00 ± 3.00" in check_self_contained(Path(path).read_text()).cells


def test_several_runs_of_another_task_have_its_quality_and_runs_of_two_tasks_are_refused(tmp_path: Path):
    runs = [
        a_directory(
            tmp_path, of_task(a_record(cost=cost, test=metrics(0.5, right, 100)), "next_token", BITS), name=name
        )
        for name, right in (("a", 80), ("b", 90))
        for cost in [a_record()["cost"] | {"passes": 20.0 - right / 10}]
    ]
    table, _ = several_sections(read_several([run.uri for run in runs]))
    assert ("test bits a token", "1.4", "1.2") in table.rows
    with pytest.raises(ValueError, match=r"learn different things \(accuracy, bits a token\)"):
        read_several([runs[0].uri, a_directory(tmp_path, name="c").uri])


def test_runs_of_one_name_are_told_apart_and_different_data_warned_of(tmp_path: Path):
    data = a_record()["data"] | {"name": "mnist"}
    runs = [a_directory(tmp_path / "x"), a_directory(tmp_path / "y", a_record(data=data))]
    table, _ = several_sections(read_several([run.uri for run in runs]))
    assert table.columns[1:] == (str(tmp_path / "x/a-run"), str(tmp_path / "y/a-run"))
    assert str(table.lines[0]).startswith("warning: the runs are on different data")


def test_a_comparison_or_the_same_run_twice_among_several_is_refused(tmp_path: Path):
    directories = [a_directory(tmp_path).uri, a_comparison(tmp_path).uri]
    with pytest.raises(ValueError, match="of 3 directories only 2 are different: give each run once"):
        read_several([directories[0], *directories])
    with pytest.raises(ValueError, match="a-comparison is a comparison: only runs can be laid side by side"):
        read_several(directories)


# The command


def test_report_as_html_prints_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = RunDirectory(str(tmp_path), "a").uri, RunDirectory(str(tmp_path), "b").uri
    for name in ("a", "b"):
        run = RunDirectory(str(tmp_path), name)
        run.write_json(REPORT_PATH, conventional_record() | {"name": name, "uri": run.uri})
    assert call(["report", one, "--format", "html"]) == 0
    assert capsys.readouterr().out.strip() == f"{one}/report/report.html"
    assert call(["report", one, two, "--format", "html", "--to", str(tmp_path / "ab.html")]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!doctype html>")
    assert call(["report", one, two]) == 0
    assert "Runs side by side" in capsys.readouterr().out
    assert call(["report", one, two, "--format", "json"]) == 0
    assert [record["name"] for record in json.loads(capsys.readouterr().out)] == ["a", "b"]


def test_mistakes_in_asking_for_a_report_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = a_directory(tmp_path)
    newer = {"format": FORMAT + 1, "config": {}}
    for arguments, told in (
        ([], "report needs a directory"),
        ([one.uri, "--format", "html", "--to", "x.html"], "--to x.html is for --format html of several runs"),
    ):
        assert call(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    one.write_json(CONFIG_PATH, newer)
    with pytest.raises(ValueError, match=f"is of format {FORMAT + 1}; this version of raysubset reads {FORMAT}: "):
        read_report(one.uri)


def test_a_page_of_many_minima_stays_below_a_megabyte(tmp_path: Path):
    record = a_record()
    record["stages"]["rounds"] = [round_of([minimum(n) for n in range(200)])]
    path = Path(write_files(a_directory(tmp_path, record).uri))
    assert "mean of 200" in path.read_text()
    assert "Members: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 188 more (200 of 200)" in path.read_text()
    assert path.stat().st_size < 2**20
