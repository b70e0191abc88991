"""12-bit pixels in 16-bit files (microscopes, X-ray) keep 17 of their 4096 levels, without a word; 16-bit PGM is refused as
"32-bit pixels … save it with 8 or 16 bits", which it has. Kind: open-edge-platform/geti_v2#1042, dpschreiner/icb#27,
CellProfiler#2285, python-pillow/Pillow#3796."""

from common import *
import struct
from raysubset.data import EncodedImages, decode

deep = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
for i in range(20):
    put(f"x/{'ab'[i % 2]}/{i}.png", encoded(deep))
f = load("x")
levels = len(np.unique(f.train.arrays()["image"]))
check(
    "4096 levels in 16-bit files: at least 200 are kept, or it is told",
    levels >= 200 or told(f, "bit"),
    f"{levels} levels, notes {getattr(f, 'notes', '')}",
)
try:
    pgm = b"P5\n2 2\n65535\n" + struct.pack(">4H", 0, 20000, 40000, 65535)
    decode(EncodedImages(1, lambda i: pgm, lambda i: "a.pgm"), None)
    check("16-bit PGM", True)
except ValueError as error:
    check("16-bit PGM is read, or not said to have 32 bits", "32-bit" not in str(error), error)
