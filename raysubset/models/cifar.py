"""AlexNet, VGG-11, VGG-16 and ResNet-18 reduced to images of 32×32, as comparisons on CIFAR use them.

torchvision's networks for ImageNet halve a map of 32 pixels to nothing, or take only images of at least 63 pixels.
Weight update skipping was measured on these four (arXiv:2012.02792); we do not know how its authors reduced them.
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
    """Build AlexNet (Krizhevsky 2014, arXiv:1404.5997): five convolutions and one linear layer, 2,472,266 parameters.

    The first convolution is padded by 5, so that its map is 8×8. All pools are 2×2. The two hidden layers of 4,096
    units and their dropout are left out.
    """
    channels = _channels("alexnet_32", spec)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv0=nn.Conv2d(channels, 64, 11, stride=4, padding=5))
    layers |= {"relu0": nn.ReLU(inplace=True), "pool0": nn.MaxPool2d(2)}
    layers |= {"conv1": nn.Conv2d(64, 192, 5, padding=2), "relu1": nn.ReLU(inplace=True), "pool1": nn.MaxPool2d(2)}
    for i, (in_channels, out_channels) in enumerate(((192, 384), (384, 256), (256, 256)), start=2):
        layers |= {f"conv{i}": conv3x3(in_channels, out_channels, "none"), f"relu{i}": nn.ReLU(inplace=True)}
    layers |= {"pool2": nn.MaxPool2d(2), "flatten": nn.Flatten(), "head": nn.Linear(256, spec.num_outputs)}
    return nn.Sequential(layers)


def vgg_32(num_layers: int, spec: Spec) -> nn.Module:
    """Build VGG-11 or VGG-16 (Simonyan and Zisserman 2015, arXiv:1409.1556): 9,228,362 or 14,724,042 parameters.

    Each convolution has batch normalisation. One linear layer replaces the three and their dropout. Convolutions are
    initialised as in torchvision.
    """
    in_channels = _channels(f"vgg{num_layers}_32", spec)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, block in enumerate(_VGG[num_layers]):
        for j, out_channels in enumerate(block):
            conv = conv3x3(in_channels, out_channels, "batch")
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers |= {f"conv{i}{j}": conv, f"norm{i}{j}": normalisation("batch", out_channels)}
            layers[f"relu{i}{j}"] = nn.ReLU(inplace=True)
            in_channels = out_channels
        layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers |= {"flatten": nn.Flatten(), "head": nn.Linear(in_channels, spec.num_outputs)}
    return nn.Sequential(layers)


def resnet18_32(spec: Spec) -> nn.Module:
    """Build torchvision's ResNet-18 (He et al. 2016) with a first convolution of 3×3, no stride and no first pool.

    It has 11,173,962 parameters.
    """
    from torchvision.models import resnet18

    network = resnet18(num_classes=spec.num_outputs)
    network.conv1 = conv3x3(_channels("resnet18_32", spec), 64, "batch")
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
    network.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return network


def _channels(name: str, spec: Spec) -> int:
    """Return the channels of images of 32×32; raise a ValueError for other sizes."""
    channels, height, width = spec.inputs
    if (height, width) != (_SIDE, _SIDE):
        raise ValueError(f"{name} takes images of 32×32, not {height}×{width}: set data.image_size=32")
    return channels
