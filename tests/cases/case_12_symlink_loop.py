"""A link below the folder that points back up is followed 40 times: 20 images become 820, the same in train and test.
Kind: fastai/fastai#2270, mindspore-lab/mindocr#538, fox-it/flow.record#234."""

from common import *

for c in ("cat", "dog"):
    for i in range(10):
        put(f"l/{c}/{i}.png")
os.symlink(f"{DIR}/l", "l/cat/loop")
f = load("l")
check(
    "20 examples, or the loop is refused",
    isinstance(f, ValueError) or size(f) == 20,
    f"{size(f) if not isinstance(f, ValueError) else f} examples, notes {getattr(f, 'notes', '')}",
)
