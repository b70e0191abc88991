"""Image files and class folders left out without a word: names that begin with "_" (cameras' _DSC0001, _MG_0001; classes
such as _background_), files of suffixes Pillow reads (.jfif, .avif), class folders that hold nothing readable.
Kind: lstein/PhotoMapAI#364, thumbsup/thumbsup#368, pytorch/vision#109 #4925 #8297, mmpretrain#507."""

from common import *

for i in range(10):
    put(f"u/cat/IMG_{i}.png")
    put(f"u/dog/_DSC{i:04}.png" if i < 7 else f"u/dog/DSC{i}.png")
    put(f"u/_background_/{i}.png")
f = load("u")
check(
    "7 of 10 dogs are named _DSC*: read, refused or told of",
    isinstance(f, ValueError) or size(f) >= 20 or told(f, "_dsc") or told(f, "left out"),
    f"{size(f) if not isinstance(f, ValueError) else f} of 30 images, notes {getattr(f, 'notes', '')}",
)
check(
    "class _background_ is read, refused or told of",
    isinstance(f, ValueError) or "_background_" in f.task.class_names or told(f, "_background_"),
    f"classes {getattr(f, 'class_names', f)}",
)
for i in range(10):
    put(f"s/cat/{i}.png")
    put(f"s/dog/{i}.png")
    put(f"s/fox/{i}.jfif", encoded(pixels(), "JPEG"))
    put(f"s/owl/{i}.avif", encoded(pixels(), "AVIF"))
os.makedirs("s/empty")
f = load("s")
for name in ("fox", "owl", "empty"):
    check(
        f"class folder {name} is read, refused or told of",
        isinstance(f, ValueError) or name in f.task.class_names or told(f, name),
        f"classes {getattr(f, 'class_names', f)}",
    )
