"""torchvision's classification networks, without pretrained weights."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import nearest
from raysubset.tasks import Spec

_SIDE = 224  # of images of ImageNet


class _GreyToRGB(nn.Module):
    """Repeats one channel three times, without a copy."""

    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1)


def check_name(name: str, own_names: Sequence[str]) -> None:
    """Refuse a name that is neither a torchvision network nor among the others.

    Raises:
        ValueError: with the nearest name that is known.
    """
    from torchvision import models  # takes 1 s to import

    names = models.list_models(module=models)
    if name not in names:
        all_names = [*own_names, *names]
        raise ValueError(
            f"there is no model {name}{nearest(name, all_names)}; known are {', '.join(own_names)}, the {len(names)} "
            f"classification networks of torchvision, and package.module:function"
        )


def network(name: str, spec: Spec) -> nn.Module:
    """Build a torchvision classification network without pretrained weights or auxiliary heads; grey becomes RGB.

    Raises:
        ValueError: for images that it cannot take, with a size that it can.
    """
    from torchvision import models

    channels, height, width = spec.inputs
    if channels not in (1, 3):
        raise ValueError(f"{name} takes images of 1 or 3 channels, not {channels}")

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": height}
    elif name == "maxvit_t":
        options = {"input_size": (height, width)}
    try:
        model = models.get_model(name, weights=None, num_classes=spec.num_outputs, **options)
        shape = _meta_output_shape(model, (2, 3, height, width))
    except (RuntimeError, ValueError, AssertionError):  # what torch and torchvision raise for a size
        model, shape = nn.Identity(), ()
    if shape != (2, *spec.outputs):
        raise ValueError(
            f"{name} cannot take images of {height}×{width}: set data.image_size={_SIDE}, which all networks take"
        )
    return nn.Sequential(OrderedDict(grey_to_rgb=_GreyToRGB(), network=model)) if channels == 1 else model


def _meta_output_shape(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the outputs in eval mode. Weights are replaced by meta tensors, so nothing is computed."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    stand_ins = {name: tensor.detach().to("meta") for name, tensor in tensors}
    with torch.no_grad():
        images = torch.empty(shape, device="meta")
        return tuple(torch.func.functional_call(model.eval(), stand_ins, (images,)).shape)
