"""AlexNet, VGG-11, VGG-16 and ResNet-18 cut down to images of 32×32, as comparisons on CIFAR use them.

Those of ImageNet, which torchvision has, halve a map of 32 pixels to nothing, or take images of 63 pixels at least.
Weight update skipping was measured on these four (arXiv:2012.02792); how its authors cut them down is not known to us.
"""

from collections import OrderedDict

from torch import nn

from raysubset.models.small import conv3x3, normalisation
from raysubset.tasks import Spec

_SIDE = 32
_VGG: dict[int, tuple[tuple[int, ...], ...]] = {  # channels of each block's convolutions
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


def alexnet_32(spec: Spec) -> nn.Module:
    """AlexNet (Krizhevsky 2014, arXiv:1404.5997): its five convolutions, then one linear layer: 2,472,266 parameters.

    The first is padded by 5, so that it leaves 8×8; all pools are 2×2; the two hidden layers of 4,096 and their dropout
    are left out.
    """
    channels = _channels("alexnet_32", spec)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv0=nn.Conv2d(channels, 64, 11, stride=4, padding=5))
    layers |= {"relu0": nn.ReLU(inplace=True), "pool0": nn.MaxPool2d(2)}
    layers |= {"conv1": nn.Conv2d(64, 192, 5, padding=2), "relu1": nn.ReLU(inplace=True), "pool1": nn.MaxPool2d(2)}
    for i, (before, after) in enumerate(((192, 384), (384, 256), (256, 256)), start=2):
        layers |= {f"conv{i}": conv3x3(before, after, "none"), f"relu{i}": nn.ReLU(inplace=True)}
    layers |= {"pool2": nn.MaxPool2d(2), "flatten": nn.Flatten(), "head": nn.Linear(256, spec.num_outputs)}
    return nn.Sequential(layers)


def vgg_32(num_layers: int, spec: Spec) -> nn.Module:
    """VGG-11 or VGG-16 (Simonyan and Zisserman 2015, arXiv:1409.1556): 9,228,362 or 14,724,042 parameters.

    Its convolutions, each with batch normalisation, and one linear layer for its three and their dropout. Initial
    convolutions are as torchvision's.
    """
    before = _channels(f"vgg{num_layers}_32", spec)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, block in enumerate(_VGG[num_layers]):
        for j, after in enumerate(block):
            conv = conv3x3(before, after, "batch")
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers |= {f"conv{i}{j}": conv, f"norm{i}{j}": normalisation("batch", after)}
            layers[f"relu{i}{j}"] = nn.ReLU(inplace=True)
            before = after
        layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers |= {"flatten": nn.Flatten(), "head": nn.Linear(before, spec.num_outputs)}
    return nn.Sequential(layers)


def resnet18_32(spec: Spec) -> nn.Module:
    """torchvision's ResNet-18 (He et al. 2016) with a first convolution of 3×3 pixels, without stride or a pool.

    11,173,962 parameters.
    """
    from torchvision.models import resnet18

    network = resnet18(num_classes=spec.num_outputs)
    network.conv1 = conv3x3(_channels("resnet18_32", spec), 64, "batch")
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
    network.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return network


def _channels(name: str, spec: Spec) -> int:
    """Of images of 32×32; ValueError for others."""
    channels, height, width = spec.inputs
    if (height, width) != (_SIDE, _SIDE):
        raise ValueError(f"{name} takes images of 32×32, not {height}×{width}: set data.image_size=32")
    return channels
