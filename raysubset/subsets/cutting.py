"""Which examples form a subset: labels and seeds in, integers out."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysubset.config import NUM_SUBSETS, SubsetsConfig, derive_seed, nearest
from raysubset.errors import listed
from raysubset.user_code.functions import call_function


@dataclass(frozen=True, eq=False)
class Subset:
    """The examples one actor minimizes on."""

    id: int
    indices: np.ndarray  # int64 [size], ascending positions in the training split
    name: str | None = None  # for the column scheme: the column's value


def resolve_cut(config: SubsetsConfig, num_examples: int) -> tuple[int, int]:
    """Return (num, size) of the subsets: as many as fit if only a size is given, else as large as fit.

    Raises:
        ValueError: if the training set has too few examples.
    """
    size = _size_limit(config, num_examples)
    num = config.num or (num_examples // size if size else NUM_SUBSETS)
    if num > num_examples:
        raise ValueError(f"{num} subsets need at least {num} examples; the training set has {num_examples}")
    size = size or num_examples // num
    if num * size > num_examples:
        raise ValueError(
            f"{num} subsets of {size} need {num * size} examples; the training set has {num_examples}: "
            f"lower subsets.num to {num_examples // size} or the size to {num_examples // num}"
        )
    return num, size


def split_into_subsets(
    labels: np.ndarray,
    config: SubsetsConfig,
    seed: int,
    *,
    num_classes: int,
    attributes: pa.Table | None = None,
    shares: Sequence[float] | None = None,
) -> list[Subset]:
    """Deal the training set into disjoint subsets, the same on every machine for one seed.

    - stratified: every class count of every subset is within one example of its share.
    - iid: at random.
    - dirichlet: class shares drawn for each subset from Dir(alpha · shares of the full set) (Hsu et al. 2019,
      arXiv:1909.06335), without replacement: the shares of exhausted classes go to the others. Flower's
      DirichletPartitioner takes an alpha per class: this one divided by the number of classes.
    - column: the distinct values of a column of `attributes`, in ascending order; nulls are in no subset.
    - function: subset ids from the user's function(labels, num, seed), with a 32-bit seed; -1 is no subset.

    The last two keep all examples of a subset unless a size is given; larger subsets are then cut down, stratified. For
    equal seed and number, subsets of a smaller size lie within those of a larger one (except dirichlet, and with
    shares). With shares, stratified and iid subsets are of unequal sizes, and the requested size is their mean.

    Args:
        labels: integers [N] from 0 to num_classes - 1, the full set's classes.
        attributes: the training table's other columns, N rows; only the column scheme reads them.
        shares: relative sizes by subset id, for stratified and iid alone. By default all are equal.

    Raises:
        ValueError: for more examples than there are, labels that are not classes, a missing column or function, invalid
            ids from a function, or a share of less than one example.
    """
    labels = _checked_labels(labels, num_classes)
    generator = np.random.default_rng(derive_seed(seed, "subsets", config.scheme))
    limit = _size_limit(config, len(labels))
    names: list[str] | None = None
    if config.scheme == "column":
        dealt, names = _by_column(config, attributes, len(labels))
    else:
        num, size = resolve_cut(config, len(labels))
        if config.scheme == "function":
            dealt = _by_function(config, labels, num, seed)
        elif shares is not None:
            assert len(shares) == num, f"{len(shares)} shares for {num} subsets"
            sizes = sizes_by_share(shares, num * size)
            if config.scheme == "iid":
                dealt = np.split(generator.permutation(len(labels)), np.cumsum(sizes))[:-1]
            else:
                dealt = _stratified_by_size(labels, sizes, generator)
        elif config.scheme == "iid":
            shuffled = generator.permutation(len(labels))
            dealt = list(shuffled[: len(labels) // num * num].reshape(num, -1)[:, :size])
        elif config.scheme == "dirichlet":
            dealt = _dirichlet(labels, num, size, config.alpha, generator)
        else:
            dealt = _stratified(labels, num, size, generator)
    if config.scheme in ("column", "function") and limit is not None:
        dealt = [group[_stratified(labels[group], 1, min(limit, len(group)), generator)[0]] for group in dealt]
    dealt = [np.sort(indices).astype(np.int64) for indices in dealt]
    return [Subset(i, indices, names[i] if names else None) for i, indices in enumerate(dealt)]


def sizes_by_share(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers that sum to the total, in proportion to the shares, rounded by largest remainders.

    Raises:
        ValueError: if the smallest share comes to less than one example.
    """
    exact = np.asarray(shares, dtype=np.float64) * (total / math.fsum(shares))
    sizes = np.floor(exact + 1e-9).astype(np.int64)  # 3 * (100 / 4) may be 74.99999999999999
    largest_first = np.argsort(sizes - exact, kind="stable")
    sizes[largest_first[: total - sizes.sum()]] += 1
    smallest = int(sizes.argmin())
    if not sizes[smallest]:
        raise ValueError(
            f"subset {smallest} of share {shares[smallest]:g} in {math.fsum(shares):g} would have none of {total} "
            "examples: make subsets.shares less unequal, or the subsets larger"
        )
    return sizes.tolist()


def _checked_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels should be one integer an example, not {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}; {num_classes} classes are 0 to {num_classes - 1}"
        )
    return labels.astype(np.int64, copy=False)


def _size_limit(config: SubsetsConfig, num_examples: int) -> int | None:
    """Return the number of examples per subset if the user gave one."""
    if config.fraction is not None:
        size = math.floor(config.fraction * num_examples + 1e-6)  # 0.29 * 100 is 28.999999999999996
        if not size:
            raise ValueError(
                f"subsets.fraction = {config.fraction} of {num_examples} examples is less than one example"
            )
        return size
    if config.size is not None and config.size > num_examples:
        raise ValueError(f"subsets.size = {config.size} exceeds the training set's {num_examples} examples")
    return config.size


def _stratified(labels: np.ndarray, num: int, size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Deal `num` orders whose every prefix holds each class within one example of its share.

    In a subset, the i-th example of a class with share p is like a job of one slot. It may not come before slot (i -
    1)/p, or the class would be ahead by more than one. It must come by slot i/p, or the class would fall behind by
    more. Of the released jobs, the one with the earliest deadline is next: that meets all deadlines that can be met (as
    in Tijdeman's chairman assignment, Discrete Mathematics 32, 1980). All can be met: a class gives each subset the
    same whole number of examples, which suffices for never falling behind, and its few spare ones are dealt in order of
    release, so that no subset ever waits for one. Classes with an expectation below one in a prefix come late in it.
    """
    num_examples = len(labels)
    shuffled = generator.permutation(num_examples)
    ties = generator.permutation(num_examples)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    class_of = labels[by_class]
    count = np.bincount(labels)[class_of]
    turn = (np.arange(num_examples) - np.searchsorted(class_of, class_of)) // num  # i - 1 within a subset
    release = -(-turn * num_examples // count)
    deadline = -(-(turn + 1) * num_examples // count)
    spare = turn == count // num
    dealt = np.argsort(np.where(spare, release, -1), kind="stable")[: num_examples // num * num].reshape(-1, num)
    orders = []
    for jobs in dealt.T:
        jobs = jobs[np.lexsort((ties[jobs], deadline[jobs]))]
        orders.append(by_class[jobs[_earliest_deadline_first(release[jobs], size)]])
    return orders


def _stratified_by_size(labels: np.ndarray, sizes: Sequence[int], generator: np.random.Generator) -> list[np.ndarray]:
    """Deal one subset of each size, with each class of each subset within one example of its share.

    Every subset gets the whole part of its share of every class. The examples that it then lacks come from different
    classes, one of each. The subsets that lack most choose first, from the classes with most left of their own share of
    the whole, rounded up. If any such choice fills all subsets this one does (Gale 1957, Ryser 1957), and the shares'
    fractional parts show that one exists.
    """
    num_examples, total = len(labels), sum(sizes)
    shuffled = generator.permutation(num_examples)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = np.bincount(labels)
    num_dealt = np.outer(sizes, count) // num_examples  # [subset, class]
    num_spare = -(-total * count // num_examples) - num_dealt.sum(0)
    lacking = np.asarray(sizes) - num_dealt.sum(1)
    for subset in np.argsort(-lacking, kind="stable"):
        ties = generator.permutation(len(count))
        classes = ties[np.argsort(-num_spare[ties], kind="stable")][: lacking[subset]]
        num_dealt[subset, classes] += 1
        num_spare[classes] -= 1
    assert (num_spare >= 0).all()
    starts = np.cumsum(count) - count  # of each class
    ends = starts + np.cumsum(num_dealt, axis=0)
    return [
        np.concatenate([by_class[end - num : end] for end, num in zip(ends[i], num_dealt[i], strict=True)])
        for i in range(len(sizes))
    ]


def _earliest_deadline_first(release: np.ndarray, num_slots: int) -> list[int]:
    """Return the jobs of slots 1, 2, …: of those released, always the lowest number. Jobs are numbered by deadline."""
    arrivals = np.argsort(release, kind="stable")
    times = release[arrivals].tolist()
    arriving = arrivals.tolist()
    num_arrived = 0
    ready: list[int] = []
    order: list[int] = []
    for slot in range(1, num_slots + 1):
        while num_arrived < len(times) and times[num_arrived] <= slot:
            heapq.heappush(ready, arriving[num_arrived])
            num_arrived += 1
        order.append(heapq.heappop(ready))
    return order


def _dirichlet(
    labels: np.ndarray, num: int, size: int, alpha: float, generator: np.random.Generator
) -> list[np.ndarray]:
    """Deal `num` subsets one after the other, each with its own class shares; the last ones get what is left."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    ends = np.cumsum(counts)
    remaining = counts.copy()
    dealt = []
    for _ in range(num):
        shares = generator.dirichlet(alpha * counts / len(labels))
        num_dealt = np.zeros_like(remaining)
        # Draws of an exhausted class are repeated among the others, as if one example were drawn at a time
        while lacking := size - num_dealt.sum():
            available = remaining - num_dealt
            open_shares = np.where(available > 0, shares, 0)
            if open_shares.sum() > 0:
                draws = generator.multinomial(lacking, open_shares / open_shares.sum())
            else:
                draws = generator.multivariate_hypergeometric(available, lacking)
            num_dealt += np.minimum(draws, available)
        starts = ends - remaining
        dealt.append(by_class[np.arange(size) + np.repeat(starts - np.cumsum(num_dealt) + num_dealt, num_dealt)])
        remaining -= num_dealt
    return dealt


def _by_column(
    config: SubsetsConfig, attributes: pa.Table | None, num_examples: int
) -> tuple[list[np.ndarray], list[str]]:
    """Return the examples of each distinct value of the column, and the values as text."""
    name = config.column
    assert name is not None
    if attributes is None or name not in attributes.column_names:
        fields = [] if attributes is None else attributes.schema
        choices = [field.name for field in fields if field.name != "row" and not pa.types.is_nested(field.type)]
        hint = f"it has {', '.join(choices)}: choose one" if choices else "it has none that could name subsets: use iid"
        raise ValueError(
            f"subsets.column = {name!r} is no column of the training table{nearest(name, choices)}; {hint}"
        )
    if attributes.num_rows != num_examples:
        raise ValueError(f"the training table has {attributes.num_rows} rows for {num_examples} labels")
    column = attributes[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_present = ~column.is_null(nan_is_null=True).to_numpy()
    positions = np.flatnonzero(is_present)
    if not len(positions):
        raise ValueError(f"subsets.column = {name!r} holds nulls only: there is no value to form a subset of")
    try:
        values = column.filter(pa.array(is_present)).combine_chunks().dictionary_encode()
        order = pc.call_function("array_sort_indices", [values.dictionary]).to_numpy()
    except pa.ArrowNotImplementedError as error:
        raise ValueError(f"subsets.column = {name!r} of type {column.type} has no values to sort by") from error
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ids = rank[values.indices.to_numpy()]
    names = [str(value) for value in values.dictionary.take(order).to_pylist()]
    return [positions[group] for group in _grouped(ids, len(names))], names


def _by_function(config: SubsetsConfig, labels: np.ndarray, num: int, seed: int) -> list[np.ndarray]:
    """Return the examples of each id that the user's function returns."""
    name = config.function
    assert name is not None
    seed = derive_seed(seed, "subsets", "function") % 2**32
    ids = np.asarray(call_function("subsets.function", name, labels.copy(), num, seed))
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} gave {ids.dtype} {list(ids.shape)}; it should give one integer subset id an example")
    if len(ids) != len(labels):
        raise ValueError(f"{name} gave {len(ids)} subset ids for {len(labels)} examples; it should give one each")
    if not -1 <= ids.min() <= ids.max() < num:
        raise ValueError(
            f"{name} gave ids from {ids.min()} to {ids.max()}; {num} subsets are 0 to {num - 1}, -1 for none"
        )
    groups = _grouped(ids, num)
    if empty := [str(i) for i, group in enumerate(groups) if not len(group)]:
        noun = "subset" if len(empty) == 1 else "subsets"
        raise ValueError(f"{name} gave no examples to {noun} {listed(empty)} (subsets.num = {num})")
    return groups


def _grouped(ids: np.ndarray, num: int) -> list[np.ndarray]:
    """Return the positions of each of the ids 0 … num - 1."""
    order = np.argsort(ids, kind="stable")
    return np.split(order, np.searchsorted(ids[order], np.arange(num + 1)))[1:-1]
