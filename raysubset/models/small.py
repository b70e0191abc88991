"""Small networks over floats: dense layers, a plain CNN, LeNet-5, VGGs, the ResNets of CIFAR, and a U-Net."""

import math
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysubset.tasks import Spec

_SMALLEST_POOLED_SIDE = 4  # of cnn(): a map of 3×3 or less is averaged without pooling


def normalisation(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(8, channels), channels) if kind == "group" else nn.Identity()


def conv3x3(in_channels: int, out_channels: int, norm: str, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=norm == "none")


def mlp(spec: Spec, width: int, depth: int) -> nn.Module:
    """Build `depth` hidden layers of `width` rectified units over an example's flattened inputs; any output shape."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    units = math.prod(spec.inputs)
    for i in range(depth):
        layers |= {f"hidden{i}": nn.Linear(units, width), f"relu{i}": nn.ReLU(inplace=True)}
        units = width
    layers["head"] = nn.Linear(units, spec.num_outputs)
    if len(spec.outputs) != 1:
        layers["unflatten"] = nn.Unflatten(1, spec.outputs)
    return nn.Sequential(layers)


def cnn(spec: Spec, width: int, depth: int, norm: str) -> nn.Module:
    """Build blocks conv3x3 - norm - pool - ReLU of width·2^i channels, then the mean over the map and a linear layer.

    A block halves its map while the shorter side is at least 4, so 8×8 images take any depth. Pooling before ReLU
    gives the same numbers as after it, and ReLU on the smaller map makes the whole loop 1.1 times as fast on a CPU
    thread.
    """
    channels, side = spec.inputs[0], min(spec.inputs[1:])
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(depth):
        out_channels = width * 2**i
        block: OrderedDict[str, nn.Module] = OrderedDict()
        block["conv"] = conv3x3(channels, out_channels, norm)
        block["norm"] = normalisation(norm, out_channels)
        if side >= _SMALLEST_POOLED_SIDE:
            block["pool"] = nn.MaxPool2d(2)
            side //= 2
        block["relu"] = nn.ReLU(inplace=True)
        layers[f"block{i}"] = nn.Sequential(block)
        channels = out_channels
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(channels, spec.num_outputs)}
    return nn.Sequential(layers)


def two_convolutions(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    """Build conv3x3 - norm - ReLU twice, with convolutions initialised as in He et al. 2015 (arXiv:1502.01852)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, channels in enumerate((in_channels, out_channels)):
        layers |= {f"conv{i}": conv3x3(channels, out_channels, norm), f"norm{i}": normalisation(norm, out_channels)}
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
    block = nn.Sequential(layers)
    _initialise_convolutions(block)
    return block


def _initialise_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def vgg(spec: Spec, width: int, depth: int, norm: str) -> nn.Module:
    """Build a VGG (Simonyan and Zisserman 2015, arXiv:1409.1556) for small images.

    Block i has two convolutions of width·2^i channels, and a max-pool if the shorter side is at least 2. A dense
    hidden layer of twice the last block's channels and the head follow.
    """
    channels, *sides = spec.inputs
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(depth):
        layers[f"block{i}"] = two_convolutions(channels, width * 2**i, norm)
        channels = width * 2**i
        if min(sides) > 1:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            sides = [side // 2 for side in sides]
    layers |= {"flatten": nn.Flatten(), "hidden": nn.Linear(channels * math.prod(sides), 2 * channels)}
    layers |= {"relu": nn.ReLU(inplace=True), "head": nn.Linear(2 * channels, spec.num_outputs)}
    return nn.Sequential(layers)


def lenet5(spec: Spec) -> nn.Module:
    """Build LeNet-5 (LeCun et al. 1998) for 28×28 (padded by 2) or 32×32 images.

    It has 61,706 parameters for ten grey digits. ReLU and max-pooling replace the original's tanh, trained
    sub-sampling and sparse connections.
    """
    channels, height, width = spec.inputs
    if height != width or height not in (28, 32):
        raise ValueError(f"lenet5 takes images of 28×28 or 32×32, not {height}×{width}: set data.image_size=28 or 32")
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv0=nn.Conv2d(channels, 6, 5, padding=2 if height == 28 else 0),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(2),
        conv1=nn.Conv2d(6, 16, 5),
        relu1=nn.ReLU(inplace=True),
        pool1=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        hidden0=nn.Linear(16 * 5 * 5, 120),
        relu2=nn.ReLU(inplace=True),
        hidden1=nn.Linear(120, 84),
        relu3=nn.ReLU(inplace=True),
        head=nn.Linear(84, spec.num_outputs),
    )
    return nn.Sequential(layers)


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers for small images (He et al. 2016, arXiv:1512.03385, section 4.2): n blocks a stage.

    Shortcuts are the paper's option A, without parameters: every second pixel, new channels zero. So ResNet-20 of
    width 16 has 269,722 parameters for ten classes. Convolutions are initialised as in He et al. 2015
    (arXiv:1502.01852).
    """

    def __init__(self, spec: Spec, width: int, depth: int, norm: str) -> None:
        super().__init__()
        self.conv = conv3x3(spec.inputs[0], width, norm)
        self.norm = normalisation(norm, width)
        self.stage0 = self._stage(width, width, depth // 6, norm)
        self.stage1 = self._stage(width, 2 * width, depth // 6, norm)
        self.stage2 = self._stage(2 * width, 4 * width, depth // 6, norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(4 * width, spec.num_outputs)
        _initialise_convolutions(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, num_blocks: int, norm: str) -> nn.Sequential:
        later_blocks = (_ResidualBlock(out_channels, out_channels, norm) for _ in range(num_blocks - 1))
        return nn.Sequential(_ResidualBlock(in_channels, out_channels, norm), *later_blocks)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.conv(images)))
        features = self.stage2(self.stage1(self.stage0(features)))
        return self.head(self.flatten(self.pool(features)))


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut. A block that adds channels halves the side."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.num_new_channels = out_channels - in_channels
        self.conv0 = conv3x3(in_channels, out_channels, norm, stride=2 if self.num_new_channels else 1)
        self.norm0 = normalisation(norm, out_channels)
        self.conv1 = conv3x3(out_channels, out_channels, norm)
        self.norm1 = normalisation(norm, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features
        if self.num_new_channels:
            shortcut = F.pad(features[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.num_new_channels))
        features = F.relu(self.norm0(self.conv0(features)))
        return F.relu(shortcut + self.norm1(self.conv1(features)))


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015, arXiv:1505.04597): it halves the map `depth` times and doubles it again.

    On the way down, level i has two convolutions of width·2^i channels. On the way up, it has two more: their input
    is the level's map from the way down, concatenated with the level below, which nearest neighbours double. Images
    are padded with zeros at the right and the bottom to a multiple of 2^depth and outputs are cropped, so any size
    works.
    """

    def __init__(self, spec: Spec, width: int, depth: int, norm: str) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(depth + 1)]
        self.down = _blocks(zip([spec.inputs[0], *channels[:-2]], channels[:-1], strict=True), norm)
        self.bottom = two_convolutions(channels[-2] if depth else spec.inputs[0], channels[-1], norm)
        self.up = _blocks(((channels[i] + channels[i + 1], channels[i]) for i in reversed(range(depth))), norm)
        self.head = nn.Conv2d(width, spec.outputs[0], 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        multiple = 2 ** len(self.down)
        features = F.pad(images, (0, -width % multiple, 0, -height % multiple))
        levels = []
        for block in self.down:
            levels.append(block(features))
            features = F.max_pool2d(levels[-1], 2)
        features = self.bottom(features)
        for block in self.up:
            features = block(torch.cat([levels.pop(), F.interpolate(features, scale_factor=2.0)], 1))
        return self.head(features)[:, :, :height, :width]


def _blocks(channels: Iterable[tuple[int, int]], norm: str) -> nn.ModuleList:
    return nn.ModuleList(two_convolutions(in_channels, out_channels, norm) for in_channels, out_channels in channels)
