"""CSV files: what they hold comes back, and what is damaged is refused with its line."""

import datetime

import pyarrow as pa
import pytest

from raysubset.data.csv_files import read_csv


def test_every_kind_of_value_is_read():
    text = 'n,x,t,day,said\n1,0.5,true,2020-01-02,"a, b"\n\n2,,false,2020-01-03,"two\nlines"\n3,NA,,,\n'
    table = read_csv(text.encode(), "set.csv")
    assert table.to_pydict() == {
        "n": [1, 2, 3],
        "x": [0.5, None, None],
        "t": [True, False, None],
        "day": [datetime.date(2020, 1, 2), datetime.date(2020, 1, 3), None],
        "said": ["a, b", "two\nlines", None],
    }
    assert read_csv(b"a\tb\n1,5\tx\n", "set.TSV").to_pydict() == {"a": ["1,5"], "b": ["x"]}
    assert read_csv(b"\xef\xbb\xbfa\r\n1\r\n", "set.csv").to_pydict() == {"a": [1]}


def test_a_type_is_decided_by_all_of_the_file():
    rows = "1,\n" * 2**20 + "0.5,late\n"  # two blocks of a megabyte, were the file not one
    table = read_csv(f"a,b\n{rows}".encode(), "set.csv")
    assert [column.type for column in table.columns] == [pa.float64(), pa.string()]


def test_columns_of_texts_stay_texts():
    texts = {"zip": pa.string(), "other": pa.string()}
    assert read_csv(b"zip,n\n007,1\n", "set.csv", types=texts).to_pydict() == {"zip": ["007"], "n": [1]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'a,b\n"x\ny",2\n\n3\n4,5\n', r"line 5 of x.csv has 1 value where the header has 2 \('3'\)"),
        (b"a,b\n1,2\n1,2,3\n", r"line 3 of x.csv has 3 values where the header has 2 \('1,2,3'\)"),
        (b'a,b\n1,2\n3,"x\n4,5\n6,7\n', "a quote that line 3 of x.csv opens is not closed"),
        (b"a,b\n1,caf\xc3\xa9\n2,caf\xe9\n", "column b of x.csv is not UTF-8 in row 1: write it as UTF-8"),
        (b"a,caf\xe9\n1,2\n", "the first line of x.csv is not UTF-8"),
        (
            b"5.1,3.5,setosa\n4.9,3.0,setosa\n",
            r"first line of x.csv should name the columns, and holds 5.1, 3.5, setosa",
        ),
        (
            b"a" * 200_000 + b"\n1\n",
            r"first line of x.csv should name the columns \(field larger than .*: write a header",
        ),
        (b"1,2\n3,4\n", "first line of x.csv should name the columns, and holds 1, 2"),
        (b"a;b\n1,5;2\n", "x.csv has one column, 'a;b', with semicolons in it"),
        (b"a;b\n1;2\n", "x.csv has one column, 'a;b', with semicolons in it: values are separated by commas in .csv"),
    ],
)
def test_a_damaged_file_is_refused_in_a_line(data: bytes, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(data, "x.csv")
    assert "\n" not in str(caught.value)


def test_a_name_may_be_a_year_and_a_quote_may_stand_inside_of_a_value():
    assert read_csv(b"country,2020\nx,1\n", "x.csv").column_names == ["country", "2020"]
    assert read_csv(b'what,n\n5" pipe,1\n6 pipe,2\n', "x.csv").column("what").to_pylist() == ['5" pipe', "6 pipe"]
