"""The form in which a member sends its weights: differences from the round's start in 16 or 8 bits, and back.

packed = to_differences(weights, start, names, "int8")   # a quarter of the bytes
weights = from_differences(packed, start)
"""

from collections.abc import Collection
from typing import Literal

import torch

from raysubset.training import Weights

Send = Literal["float32", "difference", "bfloat16", "int8"]
"""Weights as they are; differences in their own type, in 16 bits or in 8."""

_LARGEST = 127  # the largest integer of a difference: the scale is symmetric
_WHOLE, _DIFFERENCE, _SCALE = "whole ", "difference ", "scale "  # prefixes of names


def to_differences(weights: Weights, start: Weights, names: Collection[str], send: Send) -> Weights:
    """Pack weights for sending. Of `names` the difference from the start is rounded to nearest; of all else, what
    equals the start is left out, and the rest is unchanged.

    An int8 is a multiple of its tensor's scale, the largest difference / 127, and off by at most half of the scale. A
    bfloat16 is off by at most 2⁻⁸ of the difference. The difference of half-precision weights keeps
    their type. Values that are not finite are sent unchanged.

    Args:
        names: of the trainable parameters. Running variances are not among them, as they could become negative.
    """
    packed = {}
    for name, value in weights.items():
        value = value.detach().cpu()
        if name not in names and torch.equal(value, start[name]):
            continue
        difference = value - start[name] if name in names else None
        if difference is None or not difference.isfinite().all():
            packed[_WHOLE + name] = value
        elif send == "difference" or value.element_size() < 4:
            packed[_DIFFERENCE + name] = difference
        elif send == "bfloat16":
            packed[_DIFFERENCE + name] = difference.to(torch.bfloat16)
        else:
            scale = difference.abs().max() / _LARGEST if difference.numel() else difference.new_zeros(())
            multiples = difference / scale.clamp(min=torch.finfo(scale.dtype).tiny)
            packed |= {_SCALE + name: scale, _DIFFERENCE + name: multiples.round().to(torch.int8)}
    return packed


def from_differences(packed: Weights, start: Weights) -> Weights:
    """Return the weights that to_differences() packed, given the same start."""
    weights = {}
    for key, value in packed.items():
        kind, _, name = key.partition(" ")
        if f"{kind} " == _WHOLE:
            weights[name] = value
        elif f"{kind} " == _DIFFERENCE:
            difference = value.to(start[name].dtype)
            weights[name] = start[name] + difference * packed.get(_SCALE + name, torch.ones(()))
    return {name: weights.get(name, value) for name, value in start.items()}
