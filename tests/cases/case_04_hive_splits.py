"""split=train/…, split=test/… as Spark and Arrow partition: all of it is training data, the test split too, and a new test
split is carved of both; no note. Kind: marin-community/marin#2381."""

from common import *

for split, num in (("train", 40), ("test", 20)):
    os.makedirs(f"h/split={split}")
    pq.write_table(table(num), f"h/split={split}/part-0.parquet")
f = load("h")
check(
    "split=test is the test split, refused or told of",
    isinstance(f, ValueError) or len(f.test) == 20 or told(f, "split="),
    f"train {len(f.train)} validation {len(f.validation)} test {len(f.test)}; notes {getattr(f, 'notes', '')}",
)
os.makedirs("l")
for c in ("cat", "dog"):
    os.makedirs(f"l/label={c}")
    pq.write_table(table(20).drop(["label"]), f"l/label={c}/part-0.parquet")
f = load("l")
check(
    "label=cat/ is read, or the message speaks of the folder names",
    not isinstance(f, ValueError) or "label=" in str(f).split("has no column")[-1],
    f,
)
