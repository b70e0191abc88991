"""Names of more than 255 bytes end with exit code 1 and a stat() error; a class name with a line break shifts the class names
in exported files; several damaged images are told of one a run; an unlabelled test split (-1, as on Hugging Face) makes the
whole set unusable, without a way out in the message. Kind: ray-project/ray#1463, huggingface/datasets#5624, pytorch/vision#485."""

from common import *
import json

done = cli("run", "--name", "n" * 256, "--storage-path", f"{DIR}/store")
check(
    "a name that is too long is a mistake told as one",
    done.returncode == 2 and "--name" in done.stderr,
    f"exit {done.returncode}: {done.stderr.strip()[:80]}",
)
t = table(60)
images = t["image"].to_pylist()
for row in (5, 20, 50):
    images[row] = images[row][:30]
pq.write_table(pa.table({"image": images, "label": t["label"]}), "bad.parquet")
f = load("bad.parquet")
check("three damaged images are told of at once", "20" in str(f) or "3 " in str(f), f)
names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}})}
os.makedirs("u")
pq.write_table(table().replace_schema_metadata(names), "u/train.parquet")
t = table(20)
pq.write_table(pa.table({"image": t["image"], "label": [-1] * 20}).replace_schema_metadata(names), "u/test.parquet")
f = load("u")
check(
    "a test split without labels is left out, or the message says what to do",
    not isinstance(f, ValueError) or "leave" in str(f) or "remove" in str(f),
    f,
)
