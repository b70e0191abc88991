"""Black drawings on a transparent ground (icons, stickers, sketches) become all black: every image is the same, and a
network is trained on that without a word. (torchvision's loader does the same.) Kind: NVIDIA/DIGITS#85, kohya-ss/sd-scripts#1269."""

from common import *

for i in range(20):
    a = np.zeros((16, 16, 4), np.uint8)
    a[4:12, (i % 8) : (i % 8) + 4, 3] = 255
    put(f"t/{'ab'[i % 2]}/{i}.png", encoded(a))
f = load("t")
check(
    "images that are all equal, or have transparency, are told of",
    isinstance(f, ValueError) or f.train.arrays()["image"].std() > 0 or any("warning" in n for n in f.notes),
    f"all pixels {np.unique(f.train.arrays()['image'])}, std {f.task.inputs.std}, notes {getattr(f, 'notes', '')}",
)
