"""Networks of dense layers over any floats."""

import math
from collections import OrderedDict

from torch import nn

from raysubset.tasks import Spec


def mlp(spec: Spec, width: int, depth: int) -> nn.Module:
    """Depth hidden layers of `width` rectified units over all inputs of an example, flattened; outputs of any shape."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    units = math.prod(spec.inputs)
    for i in range(depth):
        layers |= {f"hidden{i}": nn.Linear(units, width), f"relu{i}": nn.ReLU(inplace=True)}
        units = width
    layers["head"] = nn.Linear(units, spec.num_outputs)
    if len(spec.outputs) != 1:
        layers["unflatten"] = nn.Unflatten(1, spec.outputs)
    return nn.Sequential(layers)
