"""Records what the user should know of the images read: depths, transparency, frames. Chooses the range of greys."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raysubset.events import Note
from raysubset.tasks import FULL_RANGE, GreyRange

_OFFSET_BITS = 3  # black is another value than 0 only if this saves so many bits

# Of 256 levels: images that use fewer after rounding to 8 bits have lost most of their contents.
_FEWEST_LEVELS = 32


@dataclass(frozen=True)
class Findings:
    """The findings in some images. Findings can be added."""

    greys: tuple[int, int] | None = None  # the lowest and highest of all deep grey pixels
    num_rounded: int = 0  # images of floats, or of colours with 16 bits a channel, whose upper byte is read
    num_transparent: int = 0  # images with pixels that are not opaque
    num_animated: int = 0  # images with further frames or pages
    flat_shape: tuple[int, int, int] | None = None  # (H, W, 3) of coloured images in flat lists

    def __add__(self, other: "Findings") -> "Findings":
        greys = [each.greys for each in (self, other) if each.greys]
        return Findings(
            greys=(min(low for low, _ in greys), max(high for _, high in greys)) if greys else None,
            num_rounded=self.num_rounded + other.num_rounded,
            num_transparent=self.num_transparent + other.num_transparent,
            num_animated=self.num_animated + other.num_animated,
            flat_shape=self.flat_shape or other.flat_shape,
        )

    def notes(self, where: str, grey_range: GreyRange = FULL_RANGE) -> tuple[Note, ...]:
        """Return a note of one sentence for each finding."""
        return tuple(map(Note, self._sentences(where, grey_range)))

    def _sentences(self, where: str, grey_range: GreyRange) -> Iterator[str]:
        if self.num_rounded:
            yield f"pixels of {self.num_rounded} images of {where} rounded to 8 bits"
        if self.greys and grey_range != FULL_RANGE:
            (black, white), (low, high) = grey_range, self.greys
            bits = (white - black).bit_length()
            yield f"greys of {where} run from {low} to {high}: read as {bits} bits, {black} as black, {white} as white"
        if self.num_transparent:
            yield f"{_images(self.num_transparent, where)} transparent pixels, which are shown on white"
        if self.num_animated:
            yield f"{_images(self.num_animated, where)} several frames or pages: only the first is read"
        if self.flat_shape:
            sizes = "x".join(map(str, self.flat_shape))
            yield f"flat lists of pixels of {where} read as {sizes}: height, width, colours"


def _images(num: int, where: str) -> str:
    return f"{num} images of {where} have" if num > 1 else f"1 image of {where} has"


def choose_grey_range(findings: Findings) -> GreyRange:
    """Choose black and white for a whole set's deep greys: the range of the fewest bits that holds them all.

    Black is 0, unless the values are offset (such as by 32768, of signed values, or below 0), so that they would use
    an eighth of the levels or fewer. Then the range is a window of 2^b values that begins at a multiple of its half.
    """
    if findings.greys is None:
        return FULL_RANGE
    lowest, highest = findings.greys
    window = next(window for bits in range(8, 18) if (window := _window(lowest, bits))[1] >= highest)
    plain = (0, 2 ** max(8, highest.bit_length()) - 1)
    has_offset = lowest < 0 or (plain[1] + 1) >= (window[1] - window[0] + 1) * 2**_OFFSET_BITS
    return window if has_offset else plain


def _window(lowest: int, bits: int) -> GreyRange:
    half = 2 ** (bits - 1)
    first = lowest // half * half
    return first, first + 2 * half - 1


def level_notes(levels: np.ndarray, *, has_rounded: bool) -> tuple[Note, ...]:
    """Warn about training images without contrast, or with few levels left after rounding to 8 bits.

    Args:
        levels: int64 [C, 256], the number of training pixels of each level.
    """
    counts = levels.sum(axis=0)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        return (Note(f"all pixels of all training images are equal ({used[0]} of 255)", is_warning=True),)
    shares = np.cumsum(counts) / counts.sum()
    low, high = (int(np.searchsorted(shares, share)) for share in (0.0005, 0.9995))
    if not has_rounded or high - low >= _FEWEST_LEVELS:
        return ()
    text = (
        f"99.9 % of the training pixels lie between {low} and {high} of 255 after rounding to 8 bits, which "
        f"leaves them {high - low + 1} levels: scale the values before they are read"
    )
    return (Note(text, is_warning=True),)
