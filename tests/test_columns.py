"""A table's columns as features and targets: against scikit-learn's encoders, and numbers checked by hand."""

import dataclasses
import datetime
import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raysubset.config import from_tree
from raysubset.data.targets import number_classes
from raysubset.tasks.columns import TableInputs, fit_columns, scales_of_targets, target_numbers


def test_numbers_are_standardised_as_scikit_learn_does():
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(0)
    training, further = (generator.normal(5, 3, (num, 3)) for num in (40, 7))
    names = ["a", "b", "c"]
    inputs, notes = fit_columns(pa.table(dict(zip(names, training.T, strict=True))), names, missing="refuse")
    found, more = inputs.encode(pa.table(dict(zip(names, further.T, strict=True))))
    assert (notes, more) == ((), ())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, StandardScaler().fit(training).transform(further), rtol=1e-6)  # pyright: ignore


def test_texts_become_one_feature_a_value_as_scikit_learn_does():
    from sklearn.preprocessing import OneHotEncoder

    colours, sizes = ["red", "blue", "red", "green"] * 3, ["s", "m", "m", "s"] * 3
    table = pa.table({"colour": pa.array(colours).dictionary_encode(), "size": pa.array(sizes, pa.large_string())})
    inputs, _ = fit_columns(table, ["size", "colour"], missing="refuse")
    reference = OneHotEncoder(sparse_output=False).fit(np.array([sizes, colours]).T)
    assert inputs.feature_names == ("size=m", "size=s", "colour=blue", "colour=green", "colour=red")
    np.testing.assert_array_equal(inputs.encode(table)[0], reference.transform(np.array([sizes, colours]).T))


def test_every_kind_of_number_and_time_is_read():
    day = datetime.date(1970, 1, 2)
    columns: dict[str, Any] = {
        "small": pa.array([1, 3], pa.uint8()),
        "half": pa.array([1, 3], pa.float16()),
        "truth": [False, True],
        "money": [Decimal("1.50"), Decimal("2.50")],
        "day": [day, day + datetime.timedelta(days=2)],
        "milli": pa.array([86_400_000, 86_400_000 * 3], pa.date64()),
        "moment": pa.array([10**9, 3 * 10**9], pa.timestamp("ns", "Europe/Paris")),
        "clock": pa.array([1000, 3000], pa.time32("ms")),
        "span": pa.array([1, 3], pa.duration("s")),
    }
    inputs, notes = fit_columns(pa.table(columns), list(columns), missing="refuse")
    np.testing.assert_allclose(inputs.encode(pa.table(columns))[0], [[-1] * 9, [1] * 9])
    means = {column.name: column.mean for column in inputs.columns}
    assert means == {
        **{"small": 2, "half": 2, "truth": 0.5, "money": 2, "day": 2 * 86400, "milli": 2 * 86400},
        **{"moment": 2, "clock": 2, "span": 2},
    }
    assert [str(note) for note in notes] == [
        "dates and times are read as numbers of seconds: day, milli, moment, clock, span"
    ]


def test_a_column_that_does_not_vary_is_left_out_with_a_note():
    table = pa.table({"a": [1.0, 2.0], "same": [0.3, 0.1 + 0.2], "text": ["x", "x"], "none": pa.nulls(2)})
    inputs, notes = fit_columns(table, table.column_names, missing="mean")
    assert inputs.feature_names == ("a",)
    assert "left out: same, text, none" in str(notes[0])
    assert inputs.encode(pa.table({"a": [3.0]}))[0].tolist() == [[3.0]]  # the others need not be there
    with pytest.raises(ValueError, match=r"no column of the table differs between rows \(same, text\)"):
        fit_columns(table, ["same", "text"], missing="refuse")


def test_missing_values_are_refused_with_row_and_way_out():
    for absent in (None, float("nan")):
        table = pa.table({"age": pa.array([1.0, 2.0, absent, 3.0, absent])})
        with pytest.raises(
            ValueError, match=r"column age has no value in row 12 of people, and in 1 more rows: --data.missing mean"
        ):
            fit_columns(table, ["age"], missing="refuse", where="people", rows=np.arange(10, 15))
    inputs, _ = fit_columns(pa.table({"age": [1, 2], "sex": ["f", "m"]}).take([0, 1, 1]), ["age"], missing="refuse")
    with pytest.raises(ValueError, match=r"column age has no value in row 1 of the table: --data.missing mean"):
        inputs.encode(pa.table({"age": [1, None]}))


def test_missing_values_are_filled_as_asked():
    table = pa.table({"age": [1.0, 3.0, None, float("nan")], "sex": ["f", None, "m", "f"]})
    inputs, notes = fit_columns(table, ["age", "sex"], missing="mean")
    found, more = inputs.encode(table)
    assert found.tolist() == [[-1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert [str(note) for note in notes] == [
        "missing values of the table filled with the training mean: age (2)",
        "missing texts of training rows are a category of their own: sex (1)",
    ]
    assert str(more[0]).endswith("filled with the training mean: age (2)")
    whole, _ = fit_columns(pa.table({"sex": ["f", "m", "f"]}), ["sex"], missing="mean")
    found, more = whole.encode(pa.table({"sex": [None, "m"]}))
    assert found.tolist() == [[0, 0], [0, 1]]
    assert "sex (1, such as a missing one)" in str(more[0])


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda each: pa.list_(each, 3)])
@pytest.mark.parametrize("number", [pa.float16(), pa.float64(), pa.int8()])
def test_lists_are_the_features_that_their_numbers_in_columns_would_be(kind: Callable[..., Any], number: pa.DataType):
    lists, age = [[1, 5, 7], [2, None, 7], None, [4, 9, 7]], [3, 1, 2, 8]
    seen = pa.array([each and [None if n is None else number.to_pandas_dtype()(n) for n in each] for each in lists])
    table = pa.table({"seen": seen.cast(kind(number)), "age": age})
    inputs, notes = fit_columns(table, ["seen", "age"], missing="mean")
    assert inputs.feature_names == ("seen[0]", "seen[1]", "seen[2]", "age")
    assert [str(note) for note in notes] == [
        "missing values of the table filled with the training mean: seen[0] (1), seen[1] (2)",
        "each number of a list is a feature: seen (3)",
    ]
    apart = pa.table({f"seen[{k}]": [each and each[k] for each in lists] for k in (0, 1)} | {"age": age})
    oracle, _ = fit_columns(apart, apart.column_names, missing="mean")
    features, _ = inputs.encode(table)
    np.testing.assert_array_equal(features[:, [0, 1, 3]], oracle.encode(apart)[0])
    assert features[:, 2].tolist() == [0, 0, 0, 0]  # the same in all rows
    shift, scale = inputs.scaling()
    assert (shift[2], scale[2]) == (7, 1)
    again = from_tree(TableInputs, json.loads(json.dumps(dataclasses.asdict(inputs))))
    np.testing.assert_array_equal(again.encode(table.slice(1))[0], features[1:])
    assert inputs.encode(table.slice(4))[0].shape == (0, 4)
    with pytest.raises(ValueError, match=r"column seen of new\.csv has lists of 2 numbers; in training they had 3"):
        inputs.encode(pa.table({"seen": [[1, 2]], "age": [1]}), where="new.csv")
    with pytest.raises(ValueError, match="column seen of the table holds int64, such as 1; in training it was lists"):
        inputs.encode(pa.table({"seen": [1], "age": [1]}))


def test_missing_lists_and_numbers_in_them_are_refused_with_the_row():
    for column, name in (([[1.0], None, [2.0]], "x"), ([[1.0], [None], [2.0]], r"x\[0\]")):
        with pytest.raises(ValueError, match=f"column {name} has no value in row 1 of the table"):
            fit_columns(pa.table({"x": column}), ["x"], missing="refuse")


def test_lists_are_the_targets_that_their_numbers_in_columns_would_be():
    table = pa.table({"box": [[1, 2], [3, 4]], "a": [5.0, 6.0]})
    names, numbers = target_numbers(table, ["box", "a"])
    assert (names, numbers.tolist()) == (("box[0]", "box[1]", "a"), [[1, 2, 5], [3, 4, 6]])
    with pytest.raises(ValueError, match="the test split has 3 targets, and training 2: give lists of one length"):
        target_numbers(table, ["box", "a"], where="the test split", num=2)
    with pytest.raises(ValueError, match="the lists of box of the table are empty"):
        target_numbers(pa.table({"box": [[], []]}), ["box"])


def test_a_category_that_training_lacks_is_none_with_a_warning():
    inputs, _ = fit_columns(pa.table({"c": ["a", "b", "a"]}), ["c"], missing="refuse")
    found, (note,) = inputs.encode(pa.table({"c": ["z", "b", "z"]}), where="test.csv")
    assert found.tolist() == [[0, 0], [0, 1], [0, 0]]
    assert str(note) == "warning: values of test.csv that no training row has count as no category: c (2, such as 'z')"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1.0, float("inf"), 2.0], r"column x is inf in row 1 of the table"),
        (["a", "b", "c"], r"column x of the table has another text in each row \(such as 'a'\).*--data.columns"),
        (["1", "2", "?"], r"\('\?' in row 2 of the table stands among numbers\); .*: correct it"),
        ([[[1]], [[2]]], r"column x of the table holds list<.*list<.*, which is no number.*each number of the lists"),
        (
            pa.array([b"\xff", b"\xfe"]).dictionary_encode(),
            "column x of the table holds dictionary<values=binary.*, which is no",
        ),
        ([["a"], ["b"]], r"column x of the table holds list<.*string>, which is no number.*each number of the lists"),
        ([[1], None, [2, 3]], r"column x has a list of 2 in row 2 of the table, not 1: give all rows one length"),
        ([[1, 0.5], [1, math.inf]], r"column x\[1\] is inf in row 1 of the table"),
        ([[1.0], [1.0], None], r"no column of the table differs between rows \(x\)"),
        ([b"a", b"b", b"a"], r"column x of the table holds binary"),
        (
            [1e308, -1e308, 1e308],
            r"runs from -1e\+308 to 1e\+308, which 64-bit floats cannot standardise: .* leave it out",
        ),
    ],
)
def test_a_column_that_can_be_no_feature_is_refused_in_a_line(column: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        fit_columns(pa.table({"x": column}), ["x"], missing="mean")
    assert "\n" not in str(caught.value)


def test_a_text_among_numbers_is_said():
    column = ["3", "4", "?", "3", "4", "3"]
    inputs, (note,) = fit_columns(pa.table({"x": column}), ["x"], missing="refuse")
    assert inputs.feature_names == ("x=3", "x=4", "x=?")
    assert str(note) == (
        "warning: column x is read as 3 categories, not as numbers: '?' in row 2 of the table stands among numbers"
    )
    assert fit_columns(pa.table({"x": ["3", "4", "3", "4"]}), ["x"], missing="refuse")[1] == ()


@pytest.mark.parametrize(
    ("texts", "is_told"),
    [
        (["1,5", "2,0", "0,25"], True),
        (["1.5", "2.0", "0.25"], True),
        (["12%", "3 %", "7%"], True),
        (["1/2/2026", "31/12/2026", "none"], True),
        (["a1", "b2", "1,5"], False),
        (["10-19", "20-29", "30+"], False),  # ranges are categories
        ([str(code) for code in range(20)], False),
        ([str(number) for number in range(21)], True),
    ],
)
def test_numbers_and_dates_that_are_read_as_categories_are_told_unless_a_dictionary_means_them(texts, is_told):
    column = pa.array(texts * 2)
    _, notes = fit_columns(pa.table({"x": column}), ["x"], missing="refuse")
    expected = f"warning: column x is read as {len(texts)} categories, not as numbers: such as "
    assert [str(note).startswith(expected) for note in notes] == [True] * is_told
    assert fit_columns(pa.table({"x": column.dictionary_encode()}), ["x"], missing="refuse")[1] == ()


def test_values_and_classes_that_differ_in_white_space_or_case_alone_are_told():
    _, (note,) = fit_columns(pa.table({"x": ["red", "blue", "red ", "blue"]}), ["x"], missing="refuse")
    assert str(note) == "warning: values of column x differ in white space or case alone: 'red' and 'red '"
    names, (note,) = number_classes({"train": pa.chunked_array([["dog", " cat", "Cat", "dog"]])})[1:]
    assert names == (" cat", "Cat", "dog")
    assert str(note).startswith("warning: classes ' cat' and 'Cat' differ in white space or case alone")
    assert number_classes({"train": pa.chunked_array([["a", "b"]])})[2] == ()


def test_a_text_of_more_values_than_a_hundred_is_refused():
    hundred = [str(number % 100) + "x" for number in range(300)]
    assert fit_columns(pa.table({"x": hundred}), ["x"], missing="refuse")[0].shape == (100,)
    with pytest.raises(ValueError, match="has 101 different texts"):
        fit_columns(pa.table({"x": [*hundred, "more"]}), ["x"], missing="refuse")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"agee": [1]}, "rows should have a column age, and has agee; did you mean agee"),
        ({"age": pa.array(["x"], pa.string_view()), "sex": ["f"]}, "column age of rows holds string_view, such as 'x'"),
        ({"age": ["x"], "sex": ["f"]}, "column age of rows holds string, such as 'x'; in training it was numbers"),
        ({"age": [1], "sex": [1]}, "column sex of rows holds int64, such as 1; in training it was text"),
        ({"age": [datetime.date.today()], "sex": ["f"]}, "column age of rows holds date32.* it was numbers"),
        ({"age": [1e200], "sex": ["f"]}, r"column age in row 0 of rows is 1e\+200, too far from the training rows'"),
    ],
)
def test_a_table_that_does_not_fit_the_training_rows_is_refused(table: Any, message: str):
    inputs, _ = fit_columns(pa.table({"age": [1, 2, 3], "sex": ["f", "m", "f"]}), ["age", "sex"], missing="refuse")
    with pytest.raises(ValueError, match=message):
        inputs.encode(pa.table(table), where="rows")


def test_an_encoder_read_back_from_json_encodes_alike():
    table = pa.table({"age": [0.1, 2.7, None], "sex": ["f", None, "f"], "day": pa.array([1, 2, 3], pa.date32())})
    inputs, _ = fit_columns(table, table.column_names, missing="mean")
    again = from_tree(TableInputs, json.loads(json.dumps(dataclasses.asdict(inputs))))
    assert again == inputs
    np.testing.assert_array_equal(again.encode(table)[0], inputs.encode(table)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deviation": 0.0}, "deviation of 0"),
        ({"deviation": "1"}, r"inputs.columns\[0\].deviation = '1' should be float"),
        ({"mean": float("nan")}, "is no finite number"),
        ({"kind": "nummer"}, "'nummer' is not one of number, time, category, list; did you mean number"),
        ({"kind": "category", "values": ["b", "a"]}, "no list of distinct, sorted values"),
        ({"kind": "category"}, "no list of distinct, sorted values"),
        ({"kind": "list"}, "no mean and deviation for each number"),
        ({"kind": "list", "mean": [], "deviation": []}, "no mean and deviation for each number"),
        ({"kind": "list", "mean": [0, 1], "deviation": [1]}, "no mean and deviation for each number"),
        ({"kind": "list", "mean": [0], "deviation": [-1]}, "deviation of -1"),
        ({"mean": [0.0], "deviation": [1.0]}, "no mean and deviation for each number"),
        ({"strange": 1}, r"there is no field inputs.columns\[0\].strange"),
    ],
)
def test_a_strangers_encoder_is_refused_in_a_line(changes: dict[str, Any], message: str):
    tree = {"columns": [{"name": "a", "kind": "number", "mean": 0.0, "deviation": 1.0, **changes}], "missing": "mean"}
    with pytest.raises(ValueError, match=message):
        from_tree(TableInputs, tree, "inputs.", noun="field")
    with pytest.raises(ValueError, match="different names"):
        from_tree(TableInputs, {"columns": [], "missing": "mean"})


def test_targets_are_numbers_as_they_stand():
    table = pa.table({"a": [1, 2], "b": [0.5, -0.5], "truth": [True, False]})
    assert target_numbers(table, ["b", "a", "truth"])[1].tolist() == [[0.5, 1, 1], [-0.5, 2, 0]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", "b"], "target x of prices is text, such as 'a': regression needs numbers, .*--task classification"),
        ([1.0, None], "column x has no value in row 1 of prices: leave such rows out, a target cannot be filled in"),
        ([float("nan"), 1.0], "column x has no value in row 0 of prices"),
        ([1.0, float("-inf")], "column x is -inf in row 1 of prices"),
        ([[[1]], [[2]]], "target x of prices holds list"),
        ([[1.0], [None]], r"column x\[0\] has no value in row 1 of prices: leave such rows out, a target"),
    ],
)
def test_a_target_that_is_no_number_is_refused(column: Any, message: str):
    with pytest.raises(ValueError, match=message):
        target_numbers(pa.table({"x": column}), ["x"], where="prices")


def test_a_constant_target_is_refused():
    means, deviations = scales_of_targets(np.array([[1.0, 2.0], [1.5, 4.0]]), ["a", "b"])
    assert (means.tolist(), deviations.tolist()) == ([1.25, 3.0], [0.25, 1.0])
    with pytest.raises(ValueError, match="the target b is 2 in all 2 training examples: there is nothing to learn"):
        scales_of_targets(np.array([[1.0, 2.0], [3.0, 2.0]]), ["a", "b"])
    with pytest.raises(ValueError, match=r"the target a is 0\.3 in all 2 training examples"):
        scales_of_targets(np.array([[0.1 + 0.2], [0.3]]), ["a"])  # unequal by rounding
    with pytest.raises(ValueError, match="should have a column pric, and has price; did you mean price"):
        target_numbers(pa.table({"price": [1]}), ["pric"])


@pytest.mark.parametrize("large", [np.finfo(np.float64).max, 1e200])
def test_a_target_that_no_float_can_standardise_is_refused(large: float):
    """Its deviation would be infinite, and all standardised targets 0."""
    with pytest.raises(ValueError, match=r"the target b runs from 1 to .*, which 64-bit floats cannot standardise"):
        scales_of_targets(np.array([[1.0, 1.0], [2.0, large], [3.0, 2.0]]), ["a", "b"])


@pytest.mark.parametrize(("step", "rows", "is_told"), [(1, [0, 2, 5], True), (2, [0, 2, 5], False), (1, None, False)])
def test_a_column_that_counts_the_rows_is_told(step: int, rows: list[int] | None, is_told: bool):
    """The numbers of a table that is sorted by its classes give them away."""
    table = pa.table({"Id": [7 + step * row for row in (0, 2, 5)], "x": [0.0, 2.0, 5.0]})
    _, notes = fit_columns(table, ["Id", "x"], missing="refuse", rows=None if rows is None else np.array(rows))
    told = [note.text for note in notes if note.is_warning]
    assert [text.startswith("columns that count the rows") and text.endswith(": Id") for text in told] == [
        True
    ] * is_told


def test_values_in_another_unit_than_in_training_are_told():
    training = pa.table({"t": [1000.0, 1001.0, 1002.0, 1003.0], "x": [0.0, 1.0, 2.0, 3.0]})
    inputs, _ = fit_columns(training, ["t", "x"], missing="refuse")
    _, notes = inputs.encode(pa.table({"t": [1001.0, 2000.0], "x": [1.0, -900.0]}))
    assert not notes
    _, (note,) = inputs.encode(pa.table({"t": [1001.0, 1001e3, 1002e3], "x": [1.0, 2.0, 3.0]}), where="the test split")
    assert note.is_warning
    assert note.text.startswith("values of the test split lie over 1000 deviations from the training mean")
    assert note.text.endswith(": t (2, such as 1.001e+06)")
