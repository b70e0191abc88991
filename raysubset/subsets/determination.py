"""Whether subsets determine the network: the overdetermination ratio Q, the classes they have, and advice on both."""

from collections.abc import Sequence

import numpy as np

from raysubset.errors import counted, listed
from raysubset.events import Note
from raysubset.subsets.cutting import Subset

_MOST_WARNED = 4  # subsets with their own line
_MOST_LISTED = 10  # classes named in a line


def overdetermination_ratio(num_examples: int, num_outputs: int, num_parameters: int) -> float:
    """Return Q = K·M/P, the number of given outputs per parameter (arXiv:2410.16523)."""
    return num_examples * num_outputs / num_parameters


def smallest_determined_size(num_outputs: int, num_parameters: int) -> int:
    """Return the smallest number of examples with Q ≥ 1."""
    return -(-num_parameters // num_outputs)


def advice(num_examples: int, sizes: Sequence[int], num_outputs: int, num_parameters: int) -> list[Note]:
    """Return notes for the user on the Q of the full set and of subsets of these sizes; Q < 1 is a warning."""
    full = overdetermination_ratio(num_examples, num_outputs, num_parameters)
    ratios = [overdetermination_ratio(size, num_outputs, num_parameters) for size in sizes]
    needed = smallest_determined_size(num_outputs, num_parameters)
    lines = [
        f"Q of the full set: {full:.3g} = {num_examples} examples × {num_outputs} outputs / {num_parameters} weights",
        f"Q of {counted(len(sizes), 'subset')} of {_span(sizes, 'd')} examples: {_span(ratios, '.3g')}",
        f"Q reaches 1 from {needed} examples up",
    ]
    if unused := num_examples - sum(sizes):
        lines.append(f"{unused} of the full set's {num_examples} examples are in no subset")
    warnings, num_below = [], sum(ratio < 1 for ratio in ratios)
    if full < 1:
        warnings.append(
            f"even the full set has Q = {full:.3g} < 1: it does not determine the {num_parameters} weights, "
            f"subsets do so even less, and their minima need not be near the full set's; a smaller model would help"
        )
    elif num_below:
        warnings.append(
            f"{num_below} of {counted(len(sizes), 'subset')} have Q < 1 (from {min(ratios):.3g}): their minima "
            f"need not be near the full set's; give subsets at least {needed} examples, or take a smaller model"
        )
    return [*map(Note, lines), *(Note(text, is_warning=True) for text in warnings)]


def missing_class_warnings(subsets: Sequence[Subset], labels: np.ndarray) -> list[Note]:
    """Return warnings about subsets that lack classes of the full set, with these classes."""
    present = np.unique(labels)
    absent = [(subset, np.setdiff1d(present, labels[subset.indices])) for subset in subsets]
    lacking = [(subset, missing) for subset, missing in absent if len(missing)]
    lines = []
    for subset, missing in lacking[:_MOST_WARNED]:
        size, noun = counted(len(subset.indices), "example"), "class" if len(missing) == 1 else "classes"
        lines.append(f"{_title(subset)} of {size} lacks {noun} {listed([*map(str, missing)], most=_MOST_LISTED)}")
    if len(lacking) > _MOST_WARNED:
        fewest, missing = max(lacking, key=lambda pair: len(pair[1]))
        num_seen = len(present) - len(missing)
        text = f"{_title(fewest)} sees fewest, {num_seen} of {len(present)}"
        lines.append(f"{len(lacking)} of {len(subsets)} subsets lack classes; {text}")
    return [Note(line, is_warning=True) for line in lines]


def _title(subset: Subset) -> str:
    return f"subset {subset.id}" if subset.name is None else f"subset {subset.id} ({subset.name})"


def _span(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"
