"""Folders of splits become the classes: with another folder beside train and test, or names such as seg_train (the Intel
image set), train_images. A network that tells train from test is trained, without a word. Tables of the same names are
taken for splits. Kind: huggingface/datasets#7880, fastai/fastai#1552 #2336."""

from common import *


def make(root, *splits, below=""):
    for split in splits:
        for c in ("cat", "dog"):
            for i in range(10):
                put(f"{root}/{split}/{below.format(split)}{c}/{i}.png")


make("a", "train", "test")
put("a/docs/x/figure.png")
put("a/docs/x/other.png")
make("b", "seg_train", "seg_test", below="{}/")
make("c", "train_images", "test_images")
for root in "abc":
    f = load(root)
    check(
        f"{sorted(os.listdir(root))}",
        isinstance(f, ValueError) or set(f.task.class_names) == {"cat", "dog"} or told(f, "folder", "train"),
        f"classes {getattr(f, 'class_names', f)}",
    )
