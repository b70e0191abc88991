"""Report the final model's predictions on the test split, from the run's files: scores by class and the confusion
matrix, some wrong images and masks, residuals of a regression, and texts."""

import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from raysubset.report.drawing import BAD, COLOURS, GOOD, Axis, Chart, Plot
from raysubset.report.figures import formatted
from raysubset.report.parts import Picture, Preformatted, Section, table
from raysubset.run_directory import MISTAKES_PATH, MODEL_RECORD_PATH, PREDICTIONS_PATH, SAMPLES_PATH, RunDirectory

MOST_CLASSES = 20  # in a matrix that can still be read
_MOST_PAIRS = 12
_LEAST_SIDE = 56  # pixels of an example on the page, which enlarges it by a whole number
_MOST_OUTPUTS = 6  # of a regression that are drawn
_MOST_POINTS = 1000  # for each of them
_MOST_WORST = 10
_RGB = [[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in COLOURS]
# uint8 [256, 3]: black for class 0, a colour for each other, grey for ignored values (-1, -100, 255)
_MASK_COLOURS = np.concatenate([np.zeros((1, 3), np.uint8), np.resize(np.array(_RGB, np.uint8), (255, 3))])
_MASK_COLOURS[[255, 256 - 100]] = 128


def prediction_sections(directory: RunDirectory) -> Iterator[Section]:
    """Yield the sections for which the run's task wrote predictions, mistakes or samples."""
    predictions, mistakes = (
        directory.read_table(path) if directory.exists(path) else pa.table({})
        for path in (PREDICTIONS_PATH, MISTAKES_PATH)
    )
    model = directory.read_json(MODEL_RECORD_PATH) if directory.exists(MODEL_RECORD_PATH) else {}
    names = model.get("class_names") or model.get("task", {}).get("class_names")
    if names and {"label", "predicted"}.issubset(predictions.column_names):
        yield from _mistaken_classes(names, model.get("image_shape"), predictions, mistakes)
    if (outputs := outputs_of(predictions)) and len(predictions):
        yield worst_predictions(predictions, outputs)
    if "mask" in mistakes.column_names and len(mistakes) and model:
        lines = ("The image, its mask and the predicted one; grey is not counted.",)
        images = masks(mistakes, model["task"]["inputs"]["image_shape"])
        yield Section("Masks it gets wrong", lines=lines, pictures=tuple(images))
    if samples := directory.read_json_or_none(SAMPLES_PATH):
        texts = (Preformatted(f"{sample['prompt']}│{sample['text']}") for sample in samples)
        yield Section("What it writes", lines=("The final model continues the text before │.", *texts))


def _mistaken_classes(
    names: Sequence[str], image_shape: Sequence[int] | None, predictions: pa.Table, mistakes: pa.Table
) -> Iterator[Section]:
    counts = confusion(predictions, len(names))
    wrong = int(counts.sum() - counts.trace())
    yield class_scores(counts, names)
    line = f"{wrong:,} of {int(counts.sum()):,} test examples are wrong."
    if len(names) <= MOST_CLASSES:
        yield Section("What it gets wrong", lines=(line,), plots=(confusion_plot(counts, names),))
    elif wrong:
        yield confused_pairs(counts, names)
    if image_shape and "image" in mistakes.column_names and len(mistakes):
        pictures = []
        for row in mistakes.to_pylist():
            pixels = np.frombuffer(row["image"], dtype=np.uint8).reshape(*image_shape)
            pictures.append(_picture(pixels, f"{names[row['label']]}, taken for {names[row['predicted']]}"))
        line = f"{len(pictures)} of {wrong:,}: those whose output for the predicted class exceeds the label's by most."
        yield Section("Examples it gets wrong", lines=(f"{line} Some labels may be wrong.",), pictures=tuple(pictures))


def class_scores(counts: np.ndarray, class_names: Sequence[str]) -> Section:
    """Show recall, precision and F1 of each class by confusion()'s counts; of many classes those with the least F1."""
    of_label, of_prediction = counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a class without examples or predictions is NaN
        recall, precision = (counts.diagonal() / totals for totals in (of_label, of_prediction))
        f1 = 2 * counts.diagonal() / (of_label + of_prediction)
    with_examples = np.flatnonzero(of_label)
    shown = with_examples
    if len(counts) > MOST_CLASSES:
        shown = with_examples[np.argsort(f1[with_examples], kind="stable")[:_MOST_PAIRS]]
    columns = (
        ("class", lambda number: f"{class_names[number]}"),
        ("test examples", lambda number: f"{of_label[number]:,}"),
        *(
            (f"{name}, %", lambda number, values=values: formatted(100 * values[number], ".1f", none="–"))
            for name, values in (("recall", recall), ("precision", precision), ("F1", f1))
        ),
    )
    means = f"recall {100 * np.nanmean(recall):.1f} %, F1 {100 * np.mean(f1[with_examples]):.1f} %"
    lines = [f"Mean over {len(with_examples)} classes: {means}."]
    if len(shown) < len(with_examples):
        lines.append(f"The {len(shown)} with the least F1.")
    return table("Classes", shown, columns, lines)


def confusion(predictions: pa.Table, num_classes: int) -> np.ndarray:
    """Count test examples by label (rows) and predicted class (columns): int64 [num_classes, num_classes]."""
    labels, predicted = (predictions.column(name).to_numpy() for name in ("label", "predicted"))
    counts = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def confusion_plot(counts: np.ndarray, class_names: Sequence[str]) -> Plot:
    """Draw the matrix with its numbers, right ones green and wrong ones red, darker for larger numbers."""
    num, names = len(counts), [name if len(name) <= 16 else f"{name[:15]}…" for name in class_names]
    side = 400 if num <= 10 else 640
    chart = Chart("predicted", "", size=(side, side * 0.92))
    right, wrong = counts.diagonal().max(initial=1), (counts - np.diag(counts.diagonal())).max(initial=1)
    for row, column in zip(*map(np.ndarray.tolist, counts.nonzero()), strict=True):
        n = int(counts[row, column])
        colour, most = (GOOD, right) if row == column else (BAD, wrong)
        alpha = 0.15 + 0.6 * (n / most) ** 0.5
        tip = f"{n} of {class_names[row]}\npredicted {class_names[column]}"
        chart.bar(row, column - 0.5, column + 0.5, colour, height=0.97, alpha=alpha, text=str(n), tip=tip)
    chart.name_rows(names)
    chart.y.label = "label"
    chart.x = Axis("predicted", ticks=chart.y.ticks, low=-0.5, high=num - 0.5)
    caption = f"Confusion matrix of the final model on {int(counts.sum()):,} test examples."
    return Plot(caption, (chart,))


def confused_pairs(counts: np.ndarray, class_names: Sequence[str]) -> Section:
    """Return the classes most often taken for one another, if there are too many for a matrix."""
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [pair for pair in zip(*np.unravel_index(order, counts.shape), strict=True) if wrong[pair]]
    columns = (
        ("label", lambda pair: f"{class_names[pair[0]]}"),
        ("predicted", lambda pair: f"{class_names[pair[1]]}"),
        ("times", lambda pair: f"{wrong[pair]}"),
        ("of", lambda pair: f"{counts[pair[0]].sum()}"),
    )
    lines = (f"The most frequent mistakes among {len(counts)} classes on the test split.",)
    return table("Confused classes", pairs, columns, lines)


def masks(mistakes: pa.Table, image_shape: Sequence[int]) -> list[Picture]:
    """Return pictures of a segmenter's test_mistakes.parquet: the image, its mask and the predicted one, side by side.

    Args:
        mistakes: columns image, mask and predicted, lists of the values in the order of rows and columns.
        image_shape: (H, W, C).
    """
    mistaken = []
    for row in mistakes.to_pylist():
        image = np.array(row["image"], dtype=np.uint8).reshape(*image_shape)
        if image.shape[2] != 3:
            image = np.repeat(image[:, :, :1], 3, axis=2)
        mask, predicted = (np.array(row[name]).reshape(*image_shape[:2]) for name in ("mask", "predicted"))
        gap = np.full((len(mask), max(1, mask.shape[1] // 16), 3), 255, dtype=np.uint8)
        truth, guess = (_MASK_COLOURS[classes % 256] for classes in (mask, predicted))
        pixels = np.concatenate([image, gap, truth, gap, guess], axis=1)
        mistaken.append(_picture(pixels, f"{np.mean(mask != predicted):.1%} of its pixels differ", num_parts=3))
    return mistaken


def _picture(pixels: np.ndarray, text: str, *, num_parts: int = 1) -> Picture:
    """Write uint8 [H, W, C] as a PNG, wide enough on the page for each of its parts to be seen."""
    from PIL import Image

    channels, width = pixels.shape[2], pixels.shape[1]
    image = Image.fromarray(pixels if channels == 3 else np.ascontiguousarray(pixels[:, :, 0]))
    file = io.BytesIO()
    image.save(file, format="png")
    return Picture(file.getvalue(), width * max(1, round(num_parts * _LEAST_SIDE / width)), text)


def outputs_of(predictions: pa.Table) -> list[str]:
    """Return the suffixes of the columns target… and prediction…: [""] for one output, ["_0", "_1"] for two, or []."""
    names = predictions.column_names
    suffixes = [name.removeprefix("target") for name in names if name.startswith("target")]
    return [suffix for suffix in suffixes if f"prediction{suffix}" in names]


def residuals_plot(predictions: pa.Table, outputs: Sequence[str]) -> Plot:
    """Draw predictions over the truth, a chart for each output, with the line on which both are equal."""
    drawn = outputs[:_MOST_OUTPUTS]
    shown = np.linspace(0, len(predictions) - 1, min(len(predictions), _MOST_POINTS)).astype(int)
    charts = []
    for suffix in drawn:
        chart = Chart(f"truth{suffix.replace('_', ' ')}", "prediction", size=(400, 300))
        target, prediction = (values[shown].tolist() for values in _pair(predictions, suffix))
        ends = [value for value in target if math.isfinite(value)]
        equal = [(end(ends), end(ends)) for end in (min, max) if ends]
        chart.line(equal, BAD, "where both are equal", dash="2 4", width=1.5)
        points = zip(target, prediction, strict=True)
        chart.line(points, COLOURS[0], "test example", marker=".", width=0, alpha=0.7)
        charts.append(chart)
    left_out = len(outputs) - len(drawn)
    caption = (
        f"Predictions of the final model over the truth, {len(shown):,} of {len(predictions):,} test examples."
        f"{f' {left_out} more outputs are left out.' if left_out else ''}"
    )
    return Plot(caption, tuple(charts))


def worst_predictions(predictions: pa.Table, outputs: Sequence[str]) -> Section:
    """Return the test examples with the largest errors; several outputs count in their targets' standard deviations."""
    pairs = [_pair(predictions, suffix) for suffix in outputs]
    errors = np.stack([prediction - target for target, prediction in pairs], axis=1)
    spreads = np.array([np.nanstd(target) or 1.0 for target, _ in pairs]) if len(outputs) > 1 else 1.0
    sizes = np.where(np.isfinite(errors), np.abs(errors) / spreads, np.inf)
    worst = np.argsort(-sizes.max(axis=1), kind="stable")[:_MOST_WORST].tolist()
    output_of = sizes.argmax(axis=1)  # the worst output of each example
    columns = [
        ("row", lambda place: f"{predictions.column('row')[place]}"),
        ("output", lambda place: f"{outputs[output_of[place]]}".removeprefix("_")),
        ("truth", lambda place: f"{pairs[output_of[place]][0][place]:.6g}"),
        ("prediction", lambda place: f"{pairs[output_of[place]][1][place]:.6g}"),
        ("error", lambda place: f"{errors[place, output_of[place]]:+.4g}"),
    ]
    if len(outputs) == 1:
        del columns[1]
    unit = ", in units of each output's spread" if len(outputs) > 1 else ""
    lines = (
        f"The {len(worst)} of {len(predictions):,} test examples with the largest errors{unit}, by their row in the "
        "source. Some of the truth may be wrong.",
    )
    return table("Where it is furthest off", worst, columns, lines, [residuals_plot(predictions, outputs)])


def _pair(predictions: pa.Table, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    target, prediction = (predictions.column(f"{name}{suffix}").to_numpy() for name in ("target", "prediction"))
    return target.astype(float), prediction.astype(float)
