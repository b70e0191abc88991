"""What the final model gets wrong on the test split: the confusion matrix, some images and masks, from the run
directory."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raysubset.report.page import Section
from raysubset.report.plots import BAD, COLOURS, GOOD, Plot, draw_plot

MOST_CLASSES = 20  # of a matrix that can be read
_MOST_PAIRS = 12
_LEAST_SIDE = 56  # pixels of an example on the page, by whole multiples of its own


@dataclass(frozen=True)
class Picture:
    """An image with a line below it."""

    png: bytes
    width: int  # pixels on the page
    text: str


def confusion(predictions: pa.Table, num_classes: int) -> np.ndarray:
    """int64 [num_classes, num_classes]: test examples by label (rows) and predicted class (columns)."""
    labels, predicted = (predictions.column(name).to_numpy() for name in ("label", "predicted"))
    counts = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def confusion_plot(counts: np.ndarray, class_names: Sequence[str]) -> Plot:
    """The matrix with its numbers; the right ones green, the wrong ones red, darker where there are more."""
    num, is_wide = len(counts), len(counts) > 10

    def draw(figure: Any) -> None:
        from matplotlib.colors import to_rgba

        axes = figure.subplots()
        right = counts.diagonal().max(initial=1)
        wrong = max(1, int((counts - np.diag(counts.diagonal())).max(initial=1)))
        for row in range(num):
            for column in range(num):
                if n := int(counts[row, column]):
                    base, most = (GOOD, right) if row == column else (BAD, wrong)
                    face = to_rgba(base, 0.15 + 0.6 * (n / most) ** 0.5)
                    axes.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, color=face, linewidth=0)
                    axes.text(column, row, str(n), ha="center", va="center", fontsize=9)
        names = [name if len(name) <= 16 else f"{name[:15]}…" for name in class_names]
        is_long = max(map(len, names)) > 2
        axes.set_xticks(range(num), names, rotation=90 if is_long else 0)
        axes.set_yticks(range(num), names)
        axes.set_xlim(-0.5, num - 0.5)
        axes.set_ylim(num - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")

    caption = f"Confusion matrix of the final model on {int(counts.sum()):,} test examples."
    size = (10.0, 9.0) if is_wide else (5.2, 5.0)
    return draw_plot("confusion", caption, draw, size=size, wide=is_wide)


def confused_pairs(counts: np.ndarray, class_names: Sequence[str]) -> Section:
    """The classes most often taken for one another, where there are too many for a matrix."""
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    cells = [(int(cell) // len(counts), int(cell) % len(counts)) for cell in order]
    rows = tuple(
        (class_names[label], class_names[predicted], f"{wrong[label, predicted]}", f"{counts[label].sum()}")
        for label, predicted in cells
        if wrong[label, predicted]
    )
    lines = (f"The most frequent mistakes among {len(counts)} classes on the test split.",)
    return Section("Confused classes", ("label", "predicted", "times", "of"), rows, lines)


def pictures(mistakes: pa.Table, image_shape: Sequence[int], class_names: Sequence[str]) -> list[Picture]:
    """The examples of a classifier's test_mistakes.parquet."""
    found = []
    for row in mistakes.to_pylist():
        pixels = np.frombuffer(row["image"], dtype=np.uint8).reshape(*image_shape)
        found.append(_picture(pixels, f"{class_names[row['label']]}, taken for {class_names[row['predicted']]}"))
    return found


def masks(mistakes: pa.Table, image_shape: Sequence[int]) -> list[Picture]:
    """The examples of a segmenter's test_mistakes.parquet: the image, its mask and the predicted one, side by side.

    Args:
        mistakes: columns image, mask and predicted, lists of the values in the order of rows and columns.
        image_shape: (H, W, C).
    """
    found = []
    for row in mistakes.to_pylist():
        own = _in_colour(np.array(row["image"], dtype=np.uint8).reshape(*image_shape))
        mask, predicted = (np.array(row[name]).reshape(*image_shape[:2]) for name in ("mask", "predicted"))
        gap = np.full((len(mask), max(1, mask.shape[1] // 16), 3), 255, dtype=np.uint8)
        truth, guess = (_MASK_COLOURS[classes % 256] for classes in (mask, predicted))
        pixels = np.concatenate([own, gap, truth, gap, guess], axis=1)
        found.append(_picture(pixels, f"{np.mean(mask != predicted):.1%} of its pixels differ", of=3))
    return found


def _mask_colours() -> np.ndarray:
    """uint8 [256, 3]: black of class 0, a colour of each after it, grey of what is ignored: -1, -100, 255."""
    colours = np.array([[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in COLOURS], np.uint8)
    found = np.concatenate([np.zeros((1, 3), np.uint8), np.resize(colours, (255, 3))])
    found[[255, 256 - 100]] = 128
    return found


_MASK_COLOURS = _mask_colours()


def _in_colour(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of an image; of one that is not RGB, the first channel in grey."""
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels[:, :, :1], 3, axis=2)


def _picture(pixels: np.ndarray, text: str, *, of: int = 1) -> Picture:
    """A PNG of uint8 [H, W, C], at least as wide on the page as can be seen for each of its `of` parts."""
    from PIL import Image

    channels, width = pixels.shape[2], pixels.shape[1]
    image = Image.fromarray(pixels if channels == 3 else np.ascontiguousarray(pixels[:, :, 0]))
    file = io.BytesIO()
    image.save(file, format="png")
    return Picture(file.getvalue(), width * max(1, round(of * _LEAST_SIDE / width)), text)
