"""A folder of the `datasets` library with its cache-*.arrow beside data-*.arrow: both are read, so that most rows are there
twice, some in train and test. No note. Kind: allenai/open-instruct#638, huggingface/datasets#2196."""

from common import *
from pyarrow import ipc


def stream(t, path):
    with pa.OSFile(path, "wb") as sink, ipc.new_stream(sink, t.schema) as writer:
        writer.write_table(t)


os.makedirs("h")
t = table(40)
stream(t, "h/data-00000-of-00001.arrow")
stream(t.slice(0, 30), "h/cache-0123456789abcdef.arrow")
open("h/state.json", "w").write("{}")
open("h/dataset_info.json", "w").write("{}")
f = load("h")
check(
    "40 examples, or told of the other file",
    isinstance(f, ValueError) or size(f) == 40 or told(f, "cache-"),
    f"{size(f) if not isinstance(f, ValueError) else f} examples; notes {getattr(f, 'notes', '')}",
)
