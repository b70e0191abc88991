"""Two Parquet files of one split whose ClassLabel orders the names differently: labels of the second are taken by the
names of the first: half of the set is mislabelled, without a word (between train and test it is refused).
Kind: huggingface/datasets#3111 #2750, open-mmlab/mmdetection#3019."""

from common import *
import json


def with_names(t, *names):
    return t.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}
    )


os.makedirs("h")
pq.write_table(with_names(table(), "zebra", "ant"), "h/a.parquet")
pq.write_table(with_names(table(), "ant", "zebra"), "h/b.parquet")
f = load("h")
check(
    "orders that differ are reconciled, refused or told of",
    isinstance(f, ValueError) or told(f, "order"),
    f"taken as {getattr(f, 'class_names', f)} for both files",
)
