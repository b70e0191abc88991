"""Subsets: disjoint, stratified in every prefix, nested; Dirichlet's limits; Q by hand; one line for bad input."""

import sys
import time
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from raysubset.config import SubsetsConfig
from raysubset.events import Note
from raysubset.subsets import (
    Subset,
    advice,
    missing_class_warnings,
    overdetermination_ratio,
    resolve_cut,
    sizes_by_share,
    smallest_determined_size,
    split_into_subsets,
)

SCHEMES = ("stratified", "iid", "dirichlet")


def skewed_labels(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    num_classes = int(generator.integers(1, 12))
    shares = generator.dirichlet(np.full(num_classes, generator.choice([0.1, 1.0, 1000.0])))
    return generator.choice(num_classes, size=int(generator.integers(12, 300)), p=shares), num_classes


def class_counts(subset: Subset, labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels[subset.indices], minlength=num_classes)


def split(labels, seed: int = 0, *, num_classes: int = 10, attributes=None, **knobs) -> list[Subset]:
    return split_into_subsets(labels, SubsetsConfig(**knobs), seed, num_classes=num_classes, attributes=attributes)


@pytest.mark.parametrize(
    ("knobs", "num_examples", "expected"),
    [
        ({}, 1294, (4, 323)),
        ({"num": 3}, 10, (3, 3)),
        ({"size": 3}, 10, (3, 3)),
        ({"fraction": 0.29}, 100, (3, 29)),  # 0.29 * 100 is 28.999999999999996
        ({"fraction": 1 / 3}, 3000, (3, 1000)),
        ({"fraction": 1.0}, 7, (1, 7)),
        ({"num": 2, "size": 3}, 10, (2, 3)),
        ({"num": 4, "fraction": 0.25}, 11, (4, 2)),
    ],
)
def test_two_of_number_size_and_fraction_decide_the_cut(knobs, num_examples, expected):
    assert resolve_cut(SubsetsConfig(**knobs), num_examples) == expected


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num": 4, "size": 5000}, "4 subsets of 5000 need 20000 examples; the training set has 6000"),
        ({"num": 4, "size": 5000}, "lower subsets.num to 1 or the size to 1500"),
        ({"num": 4, "fraction": 0.5}, "4 subsets of 3000 need 12000 examples; the training set has 6000"),
        ({"num": 6001}, "6001 subsets need at least 6001 examples; the training set has 6000"),
        ({"size": 6001}, "subsets.size = 6001 exceeds the training set's 6000 examples"),
        ({"fraction": 1e-4}, "subsets.fraction = 0.0001 of 6000 examples is less than one example"),
    ],
)
def test_a_cut_beyond_the_set_is_refused_with_the_values(knobs, message):
    with pytest.raises(ValueError, match=message):
        resolve_cut(SubsetsConfig(**knobs), 6000)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_subsets_are_disjoint_and_as_large_as_asked_and_a_function_of_the_seed(scheme):
    for seed in range(30):
        labels, num_classes = skewed_labels(np.random.default_rng(seed))
        num = 1 + seed % 7
        subsets = split(labels, seed, num_classes=num_classes, num=num, scheme=scheme)
        joined = np.concatenate([subset.indices for subset in subsets])
        assert len(np.unique(joined)) == len(joined) == num * (len(labels) // num)
        assert 0 <= joined.min() <= joined.max() < len(labels)
        again = split(labels, seed, num_classes=num_classes, num=num, scheme=scheme)
        for i, subset in enumerate(subsets):
            assert subset.id == i
            assert subset.indices.dtype == np.int64
            assert (np.diff(subset.indices) > 0).all()
            assert np.array_equal(subset.indices, again[i].indices)
    assert not np.array_equal(split(np.zeros(99, int), 1)[0].indices, split(np.zeros(99, int), 2)[0].indices)


def test_splits_are_the_same_on_every_machine():
    labels = np.arange(40) % 4
    assert split(labels, 3, num=4, size=5)[1].indices.tolist() == [7, 9, 14, 34, 36]
    assert split(labels, 3, num=4, size=5, scheme="iid")[1].indices.tolist() == [0, 20, 22, 28, 34]


def test_stratified_subsets_hold_every_class_within_one_of_its_share_at_every_size():
    for seed in range(60):
        labels, num_classes = skewed_labels(np.random.default_rng(seed))
        num = 1 + seed % 6
        shares = np.bincount(labels, minlength=num_classes) / len(labels)
        for size in range(1, len(labels) // num + 1, 3):
            for subset in split(labels, seed, num_classes=num_classes, num=num, size=size):
                assert abs(class_counts(subset, labels, num_classes) - size * shares).max() <= 1 + 1e-9


def test_stratified_subsets_share_divisible_classes_exactly():
    labels = np.repeat(np.arange(10), 40)
    for subset in split(labels, num=4):
        assert class_counts(subset, labels, 10).tolist() == [10] * 10


def test_small_stratified_subsets_do_not_all_lack_the_same_classes():
    labels = np.repeat(np.arange(100), 50)
    seen = [set(labels[subset.indices].tolist()) for subset in split(labels, num_classes=100, num=10, size=50)]
    assert all(len(classes) == 50 for classes in seen)
    assert len(set.union(*seen)) > 95


@pytest.mark.parametrize("scheme", ["stratified", "iid"])
def test_smaller_subsets_lie_within_larger_ones_of_equal_seed_and_number(scheme):
    labels, num_classes = skewed_labels(np.random.default_rng(5))
    larger = split(labels, num_classes=num_classes, num=3, scheme=scheme)
    for size in (1, 2, 7, len(larger[0].indices) - 1):
        for small, large in zip(
            split(labels, num_classes=num_classes, num=3, size=size, scheme=scheme), larger, strict=True
        ):
            assert len(small.indices) == size
            assert set(small.indices) <= set(large.indices)


def chi_square(subsets: list[Subset], labels: np.ndarray) -> float:
    """p-value of the hypothesis that subsets and classes are independent."""
    from scipy import stats

    counts = [np.bincount(labels[subset.indices], minlength=3) for subset in subsets]
    return cast(Any, stats.chi2_contingency(counts)).pvalue


def test_iid_subsets_and_dirichlet_of_infinite_alpha_look_independent_of_the_label():
    from scipy import stats

    labels = np.random.default_rng(0).choice(3, size=20_000, p=[0.5, 0.3, 0.2])
    iid = [chi_square(split(labels, seed, num=5, size=400, scheme="iid"), labels) for seed in range(60)]
    even = [
        chi_square(split(labels, seed, num=5, size=400, scheme="dirichlet", alpha=1e9), labels) for seed in range(60)
    ]
    assert stats.kstest(iid, "uniform").pvalue > 1e-3
    assert stats.kstest(even, "uniform").pvalue > 1e-3
    skewed = [
        chi_square(split(labels, seed, num=5, size=400, scheme="dirichlet", alpha=1), labels) for seed in range(60)
    ]
    assert max(skewed) < 1e-6


def test_dirichlet_of_vanishing_alpha_gives_one_class_drawn_by_the_prior():
    from scipy import stats

    labels = np.repeat([0, 1, 2], [5000, 3000, 2000])
    classes = []
    for seed in range(300):
        (subset,) = split(labels, seed, num=1, size=50, scheme="dirichlet", alpha=1e-6)
        (drawn,) = np.unique(labels[subset.indices])
        classes.append(drawn)
    assert stats.chisquare(np.bincount(classes), [150, 90, 60]).pvalue > 1e-3


def test_dirichlet_shares_have_the_distributions_mean_and_variance():
    labels = np.repeat([0, 1], [6000, 4000])
    shares = [split(labels, seed, num=1, size=1000, scheme="dirichlet", alpha=4)[0].indices for seed in range(400)]
    first = np.array([np.mean(labels[indices] == 0) for indices in shares])
    # Beta(2.4, 1.6): mean 0.6, variance 0.6 * 0.4 / (4 + 1)
    assert abs(first.mean() - 0.6) < 4 * np.sqrt(0.048 / 400)
    assert 0.8 < first.var() / 0.048 < 1.2


def test_dirichlet_subsets_take_what_is_left_when_their_classes_run_out():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    for seed in range(20):
        subsets = split(labels, seed, num=4, scheme="dirichlet", alpha=1e-6)
        assert np.sum([class_counts(subset, labels, 3) for subset in subsets], axis=0).tolist() == [60, 30, 10]


def test_dirichlet_draws_without_replacement_from_a_class_as_from_a_shuffled_deck():
    from scipy import stats

    labels = np.repeat([0, 1], [6, 6])
    times = np.zeros(12)
    for seed in range(600):
        times[split(labels, seed, num=1, size=6, scheme="dirichlet", alpha=1e6)[0].indices] += 1
    assert stats.chisquare(times).pvalue > 1e-3


def test_a_columns_values_form_subsets_in_sorted_order_without_nulls():
    table = pa.table({"site": ["b", None, "a", "b", "c", "a"], "year": [1.5, float("nan"), 1.5, 2, 2, None]})
    labels = np.array([0, 1, 1, 0, 2, 1])
    subsets = split(labels, num_classes=3, scheme="column", column="site", attributes=table)
    assert [(s.id, s.name, s.indices.tolist()) for s in subsets] == [
        (0, "a", [2, 5]),
        (1, "b", [0, 3]),
        (2, "c", [4]),
    ]
    years = split(labels, num_classes=3, scheme="column", column="year", attributes=table)
    assert [(s.name, s.indices.tolist()) for s in years] == [("1.5", [0, 2]), ("2.0", [3, 4])]


def test_dictionary_and_chunked_columns_are_read_by_value():
    plain = pa.array(["z", "y", "z", "x"])
    chunked = pa.chunked_array([plain.dictionary_encode(), pa.array(["w", "z"]).dictionary_encode()])
    subsets = split(np.zeros(6, int), scheme="column", column="c", attributes=pa.table({"c": chunked}))
    assert [(s.name, s.indices.tolist()) for s in subsets] == [("w", [4]), ("x", [3]), ("y", [1]), ("z", [0, 2, 5])]


def test_a_size_cuts_larger_column_subsets_down_nested_and_stratified():
    labels = np.tile([0, 1], 60)
    table = pa.table({"site": np.repeat([7, 8], [100, 20])})
    cut = {size: split(labels, scheme="column", column="site", size=size, attributes=table) for size in (30, 60)}
    assert [len(subset.indices) for subset in cut[60]] == [60, 20]
    assert class_counts(cut[60][0], labels, 2).tolist() == [30, 30]
    for small, large in zip(cut[30], cut[60], strict=True):
        assert set(small.indices) <= set(large.indices)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "sites",
            "subsets.column = 'sites' is no column of the training table; did you mean site.; it has site, empty",
        ),
        ("empty", "subsets.column = 'empty' holds nulls only"),
        ("boxes", r"subsets.column = 'boxes' of type list<.*> has no values to sort by"),
    ],
)
def test_a_column_of_no_use_is_refused(column, message):
    table = pa.table({"site": [1, 2], "empty": pa.array([None, None], pa.int8()), "boxes": [[1], [2]]})
    with pytest.raises(ValueError, match=message):
        split(np.zeros(2, int), scheme="column", column=column, attributes=table)


def test_attributes_must_match_the_labels():
    with pytest.raises(ValueError, match="the training table has 2 rows for 3 labels"):
        split(np.zeros(3, int), scheme="column", column="a", attributes=pa.table({"a": [1, 2]}))
    with pytest.raises(ValueError, match="it has none that could name subsets: use iid"):
        split(np.zeros(3, int), scheme="column", column="a")


USERS_MODULE = """
import numpy as np

def odd_and_even(labels, num, seed):
    assert 0 <= seed < 2**32
    ids = np.arange(len(labels)) % num
    ids[:2] = -1
    labels[:] = 0
    return ids.tolist()

def short(labels, num, seed): return np.zeros(3, int)
def floats(labels, num, seed): return np.zeros(len(labels))
def beyond(labels, num, seed): return np.full(len(labels), num)
def first_only(labels, num, seed): return np.zeros(len(labels), int)
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_subsets.py").write_text(USERS_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "users_subsets"
    sys.modules.pop("users_subsets", None)


def test_a_users_function_names_each_examples_subset(users_module):
    labels = np.array([1, 1, 1, 0, 1, 0, 1, 1])
    knobs = {"scheme": "function", "function": f"{users_module}:odd_and_even", "num": 2}
    subsets = split(labels, **knobs)
    assert [(s.id, s.indices.tolist()) for s in subsets] == [(0, [2, 4, 6]), (1, [3, 5, 7])]
    assert [len(s.indices) for s in split(labels, **knobs, size=2)] == [2, 2]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "gave 3 subset ids for 8 examples"),
        ("floats", r"gave float64 \[8\]; it should give one integer subset id an example"),
        ("beyond", "gave ids from 4 to 4; 4 subsets are 0 to 3, -1 for none"),
        ("first_only", r"gave no examples to subsets 1, 2, 3 \(subsets.num = 4\)"),
        ("odd_and_evn", "has no function odd_and_evn; did you mean odd_and_even"),
    ],
)
def test_a_users_function_of_no_use_is_refused_with_what_it_gave(users_module, function, message):
    with pytest.raises(ValueError, match=message):
        split(np.zeros(8, int), scheme="function", function=f"{users_module}:{function}")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 2, 3]), "labels run from 0 to 3; 3 classes are 0 to 2"),
        (np.array([0, -1, 2, 1]), "labels run from -1 to 2"),
        (np.zeros(4), r"labels should be one integer an example, not float64 \[4\]"),
        (np.zeros((4, 1), int), r"not int64 \[4, 1\]"),
    ],
)
def test_labels_that_are_not_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        split(labels, num_classes=3)


def test_a_million_examples_in_a_thousand_subsets_take_seconds():
    labels = np.random.default_rng(0).integers(0, 1000, 1_200_000)
    start = time.process_time()
    subsets = split(labels, num_classes=1000, num=1000)
    assert len(subsets) == 1000
    assert time.process_time() - start < 10  # 0.8 s on an idle core


def test_q_is_outputs_over_parameters():
    assert overdetermination_ratio(50_000, 10, 11_173_962) == pytest.approx(0.0447, rel=1e-2)  # ResNet-18 on CIFAR-10
    assert overdetermination_ratio(45_000, 10, 24_346) == pytest.approx(18.48, rel=1e-3)


def test_q_reaches_one_at_the_smallest_determined_size():
    for num_outputs, num_parameters in ((10, 1442), (10, 1440), (3, 1), (100, 99_999)):
        size = smallest_determined_size(num_outputs, num_parameters)
        assert overdetermination_ratio(size, num_outputs, num_parameters) >= 1
        assert overdetermination_ratio(size - 1, num_outputs, num_parameters) < 1


def test_advice_shows_q_and_warns_only_under_one():
    assert list(map(str, advice(1294, [323] * 4, 10, 1442))) == [
        "Q of the full set: 8.97 = 1294 examples × 10 outputs / 1442 weights",
        "Q of 4 subsets of 323 examples: 2.24",
        "Q reaches 1 from 145 examples up",
        "2 of the full set's 1294 examples are in no subset",
    ]
    lines = list(map(str, advice(443, [100, 143, 200], 10, 1442)))
    assert lines[1] == "Q of 3 subsets of 100 to 200 examples: 0.693 to 1.39"
    assert lines[-1].startswith("warning: 2 of 3 subsets have Q < 1 (from 0.693)")
    assert "at least 145 examples" in lines[-1]
    warnings = [note.text for note in advice(50_000, [12_500] * 4, 10, 11_173_962) if note.is_warning]
    assert len(warnings) == 1
    assert "even the full set has Q = 0.0447 < 1" in warnings[0]


def test_missing_classes_are_named_in_a_warning_and_summarised_when_many():
    labels = np.array([0, 0, 1, 2, 2, 4, 4, 4])  # class 3 is in no subset as the full set lacks it
    table = pa.table({"site": ["a", "a", "a", "a", "b", "a", "a", "a"]})
    subsets = split(labels, num_classes=5, scheme="column", column="site", attributes=table)
    (note,) = missing_class_warnings(subsets, labels)
    assert note == Note("subset 1 (b) of 1 example lacks classes 0, 1, 4", is_warning=True)
    labels = np.arange(60) % 30
    lines = [note.text for note in missing_class_warnings(split(labels, num_classes=30, num=10, size=6), labels)]
    assert len(lines) == 5
    assert lines[0].startswith("subset 0 of 6 examples lacks classes ")
    assert lines[0].endswith(" and 14 more")
    assert lines[-1] == "10 of 10 subsets lack classes; subset 0 sees fewest, 6 of 30"
    assert missing_class_warnings(split(labels, num_classes=30, num=2), labels) == []


def test_sizes_by_share_are_rounded_by_the_largest_remainders():
    assert sizes_by_share([3, 1], 100) == [75, 25]
    assert sizes_by_share([1, 1, 1], 100) == [34, 33, 33]
    assert sizes_by_share([5, 3, 2], 9) == [4, 3, 2]  # exactly 4.5, 2.7 and 1.8
    generator = np.random.default_rng(0)
    for _ in range(50):
        shares: Any = generator.uniform(0.5, 4, size=int(generator.integers(1, 20)))
        total = int(generator.integers(200, 5000))
        sizes = sizes_by_share(shares, total)
        assert sum(sizes) == total
        assert np.abs(sizes - shares / shares.sum() * total).max() < 1


def test_a_share_of_less_than_one_example_is_refused():
    with pytest.raises(ValueError, match="subset 1 of share 1 in 101 would have none of 40 examples"):
        sizes_by_share([100, 1], 40)
    with pytest.raises(ValueError, match="subset 1 of share 1"):
        split_into_subsets(np.zeros(40, int), SubsetsConfig(num=2), 0, num_classes=1, shares=[100, 1])


@pytest.mark.parametrize("scheme", ["stratified", "iid"])
def test_subsets_by_share_are_disjoint_of_their_sizes_and_a_function_of_the_seed(scheme):
    for seed in range(40):
        generator = np.random.default_rng(seed)
        labels, num_classes = skewed_labels(generator)
        shares: Any = generator.uniform(1, 4, size=2 + seed % 3)
        mean = len(labels) // len(shares) - seed % 3
        config = SubsetsConfig(num=len(shares), size=mean, scheme=scheme)
        subsets = split_into_subsets(labels, config, seed, num_classes=num_classes, shares=shares)
        joined = np.concatenate([subset.indices for subset in subsets])
        assert len(np.unique(joined)) == len(joined) == len(shares) * mean
        assert [len(subset.indices) for subset in subsets] == sizes_by_share(shares, len(shares) * mean)
        again = split_into_subsets(labels, config, seed, num_classes=num_classes, shares=shares)
        assert all(np.array_equal(a.indices, b.indices) for a, b in zip(subsets, again, strict=True))
    labels, config = np.zeros(99, int), SubsetsConfig(num=2, scheme=scheme)
    first, other = (split_into_subsets(labels, config, seed, num_classes=1, shares=[3, 1]) for seed in (1, 2))
    assert not np.array_equal(first[0].indices, other[0].indices)


def test_stratified_subsets_by_share_hold_every_class_within_one_of_its_share():
    for seed in range(80):
        generator = np.random.default_rng(seed)
        labels, num_classes = skewed_labels(generator)
        fractions = np.bincount(labels, minlength=num_classes) / len(labels)
        shares: Any = generator.uniform(1, 4, size=1 + seed % 4)
        config = SubsetsConfig(num=len(shares), size=int(generator.integers(3, len(labels) // len(shares) + 1)))
        for subset in split_into_subsets(labels, config, seed, num_classes=num_classes, shares=shares):
            counts = class_counts(subset, labels, num_classes)
            assert abs(counts - len(subset.indices) * fractions).max() <= 1 + 1e-9


def test_rare_classes_go_to_some_subset_where_the_whole_set_is_dealt():
    labels = np.array([0] * 97 + [1, 2, 3])
    subsets = split_into_subsets(labels, SubsetsConfig(num=2), 0, num_classes=4, shares=[3, 1])
    assert [len(subset.indices) for subset in subsets] == [75, 25]
    assert len(np.unique(np.concatenate([subset.indices for subset in subsets]))) == 100
