"""string_view labels and binary_view images, as polars writes them to Arrow IPC, are refused: "labels … are string_view,
such as 'cat': they must be integers or class names". Kind: apache/arrow#45523, microsoft/mssql-python#708."""

from common import *
from pyarrow import ipc

t = table(names=("cat", "dog"))
t = pa.table({"image": t["image"], "label": t["label"].combine_chunks().cast(pa.string_view())})
with pa.OSFile("v.arrow", "wb") as sink, ipc.new_file(sink, t.schema) as writer:
    writer.write_table(t)
f = load("v.arrow")
check("string_view labels are read", not isinstance(f, ValueError), f)
