"""Pixels as their files mean them: depths, transparency, frames, damage; each with its value worked out by hand."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysubset.config import DataConfig
from raysubset.data import FullSet, load_full_set
from raysubset.data.findings import Findings, choose_grey_range, level_notes
from raysubset.data.images import EncodedImages, as_images, decode
from raysubset.events import Note
from raysubset.tasks import FULL_RANGE, GreyRange
from tests.tiny import inputs_of

RANDOM = np.random.default_rng(0)


def encode(image: Any, kind: str = "PNG", **more: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **more)
    return stream.getvalue()


def found(*data: bytes, grey_range: GreyRange | None = None) -> tuple[np.ndarray, Findings]:
    return decode(EncodedImages(len(data), data.__getitem__, lambda number: f"image {number}"), None, grey_range)


def colours(num: int = 1) -> np.ndarray:
    return RANDOM.integers(0, 256, (num, 6, 6, 3), dtype=np.uint8)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def load(path: Path, **settings: Any) -> FullSet:
    return load_full_set(DataConfig(name=str(path), **settings))


def noted(full_set: FullSet, words: str) -> list[str]:
    return [note for note in full_set.notes if words in note]


def sixteen_bit_png(pixels: np.ndarray) -> bytes:
    """A PNG of [H, W, C] with 16 bits a channel, which Pillow writes for C = 1 only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def signed_tiff(pixels: np.ndarray) -> bytes:
    """A TIFF of int16, which Pillow reads and does not write."""
    data, (height, width) = pixels.astype("<i2").tobytes(), pixels.shape
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 134, 277: 1, 278: height, 279: len(data), 339: 2}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


# Deep greys


@pytest.mark.parametrize(
    ("greys", "chosen"),
    [
        ((0, 65535), (0, 65535)),
        ((0, 40000), (0, 65535)),
        ((17000, 48000), (0, 65535)),  # half of 16 bits: no offset
        ((0, 4095), (0, 4095)),
        ((2100, 4000), (0, 4095)),
        ((0, 4096), (0, 8191)),
        ((0, 7), (0, 255)),  # a dark image of 8 bits
        ((32768, 33791), (32768, 33791)),  # 10 bits behind an offset
        ((31744, 35863), (28672, 36863)),  # 13 bits with a sign, stored without
        ((-1024, 3071), (-4096, 4095)),
        ((-32768, 32767), (-32768, 32767)),
    ],
)
def test_black_and_white_are_those_of_the_bits_in_use(greys: tuple[int, int], chosen: GreyRange):
    assert choose_grey_range(Findings(greys=greys)) == chosen


def test_twelve_bits_in_sixteen_keep_their_levels_alike_in_all_splits(tmp_path: Path):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for number in range(20):
        write(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", encode(ramp))
        write(tmp_path / "test" / "ab"[number % 2] / f"{number}.png", encode(ramp // 4))  # darker, with the same white
    full_set = load(tmp_path)
    assert inputs_of(full_set).grey_range == (0, 4095)
    assert np.array_equal(full_set.train.arrays()["image"][0, ..., 0], np.rint(ramp / (4095 / 255)))
    assert np.array_equal(full_set.test.arrays()["image"][0, ..., 0], np.rint(ramp // 4 / (4095 / 255)))
    assert noted(full_set, "run from 0 to 4095: read as 12 bits, 0 as black, 4095 as white")
    again, _ = decode(EncodedImages(1, lambda _: encode(ramp), str), None, inputs_of(full_set).grey_range)
    assert np.array_equal(again[0], full_set.train.arrays()["image"][0])


def test_sixteen_bits_in_use_stay_as_they_were(tmp_path: Path):
    ramp = (np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64)
    for number in range(20):
        write(tmp_path / "ab"[number % 2] / f"{number}.png", encode(ramp))
    full_set = load(tmp_path)
    assert inputs_of(full_set).grey_range == FULL_RANGE
    assert np.array_equal(full_set.train.arrays()["image"][0, ..., 0], np.rint(ramp / 257))
    assert not noted(full_set, " bits")


def test_greys_beyond_the_sets_range_are_refused_rather_than_made_white():
    deep = np.full((2, 2), 5000, np.uint16)
    with pytest.raises(ValueError, match="cannot be decoded: its greys run from 5000 to 5000, beyond 0 to 4095"):
        decode(EncodedImages(1, lambda _: encode(deep), str), None, (0, 4095))


def test_sixteen_bit_pgm_wide_tiff_and_signed_tiff_are_read():
    pgm = b"P5\n2 1\n65535\n" + struct.pack(">2H", 257, 65535)
    assert found(pgm)[0].ravel().tolist() == [1, 255]
    assert found(b"P5\n2 1\n4095\n" + struct.pack(">2H", 0, 4095))[0].ravel().tolist() == [0, 255]
    wide = np.array([[0, 4095]], np.int32)
    assert found(encode(wide, "TIFF"), grey_range=(0, 4095))[0].ravel().tolist() == [0, 255]
    signed = signed_tiff(np.array([[-4096, 4095]]))
    assert found(signed)[1].greys == (-4096, 4095)
    assert found(signed, grey_range=(-4096, 4095))[0].ravel().tolist() == [0, 255]
    with pytest.raises(ValueError, match="32-bit pixels"):
        found(encode(wide * 100, "TIFF"))


def test_colours_with_sixteen_bits_of_which_twelve_are_used_are_warned_of(tmp_path: Path):
    pixels = RANDOM.integers(0, 4096, (6, 6, 3))
    pixels[0, 0] = 4095
    for number in range(10):
        write(tmp_path / "ab"[number % 2] / f"{number}.png", sixteen_bit_png(pixels))
    full_set = load(tmp_path)
    assert noted(full_set, "pixels of 10 images of ")
    assert noted(
        full_set, "warning: 99.9 % of the training pixels lie between 0 and 15 of 255 after rounding to 8 bits"
    )
    assert found(sixteen_bit_png(pixels * 16))[0].max() == 255


def test_little_that_is_left_after_rounding_is_warned_of(tmp_path: Path):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    ramp[0, 0] = 65535  # one hot pixel
    for number in range(20):
        write(tmp_path / "ab"[number % 2] / f"{number}.png", encode(ramp))
    assert noted(load(tmp_path), "warning: 99.9 % of the training pixels lie between 0 and 16 of 255")
    levels = np.zeros((1, 256), np.int64)
    levels[0, :17] = 9
    assert level_notes(levels, has_rounded=False) == ()  # as digits are
    levels[0, 1:] = 0
    (note,) = level_notes(levels, has_rounded=False)
    assert note == Note("all pixels of all training images are equal (0 of 255)", is_warning=True)


# Transparency and frames


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_black_on_transparent_is_black_on_white(kind: str):
    drawing = np.zeros((6, 6, 4), np.uint8)
    drawing[2:4, :, 3] = 255
    images, findings = found(encode(drawing, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (images[0, 2:4] == 0).all()
    assert (images[0, [0, 1, 4, 5]] == 255).all()
    assert findings.num_transparent == 1
    assert findings.notes("it") == (Note("1 image of it has transparent pixels, which are shown on white"),)


def test_transparent_greys_and_palettes_are_laid_on_white_and_stay_grey_or_coloured():
    alpha = Image.fromarray(np.array([[0, 255, 51]], np.uint8))
    images, _ = found(encode(Image.merge("LA", [Image.new("L", (3, 1), 0), alpha])))
    assert images[0, 0].tolist() == [[255], [0], [204]]  # a fifth of black
    one_clear = encode(np.array([[7, 8]], np.uint8), transparency=7)
    assert found(one_clear)[0].ravel().tolist() == [255, 8]
    palette = Image.fromarray(colours()[0]).quantize(4)
    clear = np.asarray(palette) == 0
    images, _ = found(encode(palette, transparency=0))
    assert (images[0][clear] == 255).all()
    assert np.array_equal(images[0][~clear], np.asarray(palette.convert("RGB"))[~clear])


def test_opaque_alpha_changes_nothing():
    image = colours()[0]
    opaque = np.concatenate([image, np.full((6, 6, 1), 255, np.uint8)], axis=2)
    images, findings = found(encode(opaque))
    assert np.array_equal(images[0], image)
    assert findings == Findings()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_read_and_said(kind: str):
    frames = [Image.fromarray(image) for image in colours(3)]
    single, several = encode(frames[0], kind), encode(frames[0], kind, save_all=True, append_images=frames[1:])
    images, findings = found(several, single)
    assert findings.num_animated == 1
    if kind != "GIF":
        assert np.array_equal(images[0], np.asarray(frames[0]))
    assert findings.notes("it") == (Note("1 image of it has several frames or pages: only the first is read"),)


# Damage and shapes


def test_damaged_images_are_named_together_until_there_are_ten(tmp_path: Path):
    good = encode(colours()[0])
    data = [good] * 50
    data[5], data[20], data[49] = good[:40], b"", good[:40]
    with pytest.raises(ValueError, match=r"^3 images cannot be decoded: image 5, image 20, image 49: cannot identify"):
        found(*data)
    asked = []
    with pytest.raises(ValueError, match=r"^at least 10 images cannot be decoded") as caught:
        decode(EncodedImages(10_000, lambda number: asked.append(number) or b"", str), None)
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9: cannot identify" in str(caught.value)
    assert len(asked) < 2000
    table = pa.table({"image": data, "label": [0, 1] * 25})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=25)
    for streamed, text in (
        (False, r"3 images .*row 5 of .*row 20 of .*row 49 of"),
        (True, r"2 images .*row 5 .*row 20"),
    ):
        with pytest.raises(ValueError, match=text):
            load(tmp_path / "a.parquet", streamed=streamed)


def test_channels_first_and_other_types_are_refused_with_what_cures_them():
    with pytest.raises(ValueError, match=r"transpose\(0, 2, 3, 1\)"):
        as_images(np.zeros((4, 3, 8, 8), np.uint8), "it", None)
    with pytest.raises(ValueError, match=r"are uint16: .*divide them by the value that is white"):
        as_images(np.zeros((4, 8, 8), np.uint16), "it", None)
