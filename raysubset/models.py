"""Networks by name: small ones whose Q can exceed one, torchvision's, and the user's own. No training, no files."""

import copy
import math
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysubset.config import ModelConfig, nearest
from raysubset.errors import one_line
from raysubset.user_functions import call_function

_OWN = ("cnn", "lenet5", "mlp", "cifar_resnet")
_SMALLEST_POOLED_SIDE = 4  # cnn: a map of 3×3 or less is averaged as it is
_NUM_SIDES_TRIED = 512


def build_model(config: ModelConfig, *, num_classes: int, image_shape: tuple[int, int, int], seed: int) -> nn.Module:
    """A freshly initialised network that maps float [N, C, H, W] to logits [N, num_classes].

    The weights are drawn from torch's CPU generator under `seed` alone, so every node gets the same bits; the global
    generators are left as they were. A user's "package.module:function" is called as function(num_classes,
    image_shape) with image_shape = (C, H, W); its module may lie in the working directory. Its network is tried: in
    evaluation mode, and on a copy for a step of training in the memory layout of the actors. One that works in torch's
    default layout alone is given its images in that (see needs_default_layout()); one that changes its images in place
    is given copies.

    Args:
        config: architecture, size and normalisation.
        num_classes: number of logits.
        image_shape: (H, W, C) of one image.
        seed: of the initial weights.

    Returns:
        A float32 module on the CPU in train mode. Under torch.device("meta") one of stand-ins, which takes no memory;
        torchvision's regnets cannot be built so.

    Raises:
        ValueError: for an unknown name, images that the network cannot take, or a user's function that is missing
            or whose network cannot be trained, or gives anything but [N, num_classes] in either mode.
    """
    height, width, channels = image_shape
    shape = (channels, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators as well
        if config.name in _OWN:
            model = _own_network(config, num_classes, shape)
        elif config.is_function:
            model = _users_network(config.name, num_classes, shape)
        else:
            return _torchvision_network(config.name, num_classes, shape).train()
        _refuse_complex(config.name, model)
        model.to("cpu")._apply(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor).eval()
        _try_evaluation(config.name, model, num_classes, shape)
        if not num_parameters(model):
            raise ValueError(f"{config.name} has no trainable parameters: there is nothing to minimize over")
        if config.is_function:
            _try_training(config.name, model, num_classes, shape)
    return model.train()


class Described(Protocol):
    """What says of a set's images what a network must take and give: a FullSet, or the record of a trained model."""

    @property
    def num_classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...


def new_model(config: ModelConfig, described: Described, *, seed: int = 0) -> nn.Module:
    """build_model() for images of this shape, with a logit a class."""
    return build_model(config, num_classes=described.num_classes, image_shape=described.image_shape, seed=seed)


def _refuse_complex(name: str, model: nn.Module) -> None:
    """Raises ValueError for complex parameters: optimizers, means and their statistics here are of real numbers."""
    for key, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"{name}: parameter {key} is complex; hold real and imaginary parts as one real parameter [..., 2] and "
                "use torch.view_as_complex in forward()"
            )


def num_parameters(model: nn.Module) -> int:
    """Trainable parameters: the P of the overdetermination ratio."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the network keeps running statistics that must be recomputed for averaged weights."""
    return bool(learning_batch_norms(model))


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Keys of the state dict that training may change by its gradient; tied parameters under each of their names."""
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)


def averaged_names(model: nn.Module) -> frozenset[str]:
    """Keys of the state dict of which a mean over members means something: trainable parameters, running statistics.

    Everything else - frozen parameters, masks, codebooks, counters, the vectors of spectral norm, the statistics of
    batch norm that a network keeps in evaluation mode - stays as one member has it.
    """
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    learning = [name for name, module in modules_in_training(model) if _keeps_statistics(module)]
    keys = {f"{name}.{statistic}".lstrip(".") for name in learning for statistic in statistics}
    return trainable_names(model) | (keys & model.state_dict().keys())


def learning_batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Batch norms whose running statistics change in training, and must be recomputed for averaged weights.

    Those that train() leaves in evaluation mode, or whose momentum is 0, are not among them.
    """
    found = {id(m): m for _, m in modules_in_training(model) if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return [module for module in found.values() if module.track_running_stats and _keeps_statistics(module)]


def modules_in_training(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that model.train() puts in training mode, by name; the modes are left as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    learning = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if m.training]
    for module, was_training in modes:
        module.training = was_training
    return learning


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor) and getattr(module, "momentum", None) != 0


def has_dropout(model: nn.Module) -> bool:
    """Whether modules of the network draw random numbers in train mode: dropout or stochastic depth with p > 0.

    Dropout that a user's forward() calls as a function is not seen.
    """
    return any(_dropout_rate(module) > 0 for module in model.modules())


def _dropout_rate(module: nn.Module) -> float:
    named = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth"
    # Attention (torch's and Swin's) and recurrent layers hold their rate as a number of this name.
    rate = module.p if named else getattr(module, "dropout", 0.0)
    return rate if isinstance(rate, int | float) else 0.0


def _own_network(config: ModelConfig, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    if config.name == "lenet5":
        return _lenet5(num_classes, shape)
    width, depth = config.size()
    if config.name == "mlp":
        return _mlp(num_classes, shape, width, depth)
    if config.name == "cnn":
        return _cnn(num_classes, shape, width, depth, config.norm)
    return _CifarResNet(num_classes, shape[0], width, depth, config.norm)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(8, channels), channels) if kind == "group" else nn.Identity()


def _conv3x3(in_channels: int, out_channels: int, norm: str, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=norm == "none")


def _cnn(num_classes: int, shape: tuple[int, int, int], width: int, depth: int, norm: str) -> nn.Module:
    """Blocks conv3x3 - norm - pool - ReLU of width·2^i channels, then the mean over the map and one linear layer.

    A block halves its map while the shorter side is at least 4, so 8×8 images take any depth. The maximum and ReLU
    may be exchanged; on the smaller map ReLU is cheaper, which makes the whole loop 1.1 times as fast on a CPU thread.
    """
    channels, side = shape[0], min(shape[1:])
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(depth):
        out_channels = width * 2**i
        block: OrderedDict[str, nn.Module] = OrderedDict()
        block["conv"] = _conv3x3(channels, out_channels, norm)
        block["norm"] = _norm(norm, out_channels)
        if side >= _SMALLEST_POOLED_SIDE:
            block["pool"] = nn.MaxPool2d(2)
            side //= 2
        block["relu"] = nn.ReLU(inplace=True)
        layers[f"block{i}"] = nn.Sequential(block)
        channels = out_channels
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(channels, num_classes)}
    return nn.Sequential(layers)


def _lenet5(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) for 28×28 (padded by 2) or 32×32 images: 61,706 parameters for ten grey digits.

    ReLU and max-pooling stand for the original's tanh, trained sub-sampling and sparse connections.
    """
    channels, height, width = shape
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
        head=nn.Linear(84, num_classes),
    )
    return nn.Sequential(layers)


def _mlp(num_classes: int, shape: tuple[int, int, int], width: int, depth: int) -> nn.Module:
    """Depth hidden layers of `width` rectified units over the pixels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    units = math.prod(shape)
    for i in range(depth):
        layers |= {f"hidden{i}": nn.Linear(units, width), f"relu{i}": nn.ReLU(inplace=True)}
        units = width
    layers["head"] = nn.Linear(units, num_classes)
    return nn.Sequential(layers)


class _CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for small images (He et al. 2016, arXiv:1512.03385, section 4.2): n blocks a stage.

    Shortcuts are the paper's option A, without parameters: every second pixel, new channels zero. So ResNet-20 of
    width 16 has 269,722 parameters for ten classes. Initial convolutions as in He et al. 2015 (arXiv:1502.01852).
    """

    def __init__(self, num_classes: int, channels: int, width: int, depth: int, norm: str) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, width, norm)
        self.norm = _norm(norm, width)
        self.stage0 = self._stage(width, width, depth // 6, norm)
        self.stage1 = self._stage(width, 2 * width, depth // 6, norm)
        self.stage2 = self._stage(2 * width, 4 * width, depth // 6, norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, out_channels: int, num_blocks: int, norm: str) -> nn.Sequential:
        rest = (_ResidualBlock(out_channels, out_channels, norm) for _ in range(num_blocks - 1))
        return nn.Sequential(_ResidualBlock(in_channels, out_channels, norm), *rest)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.conv(images)))
        features = self.stage2(self.stage1(self.stage0(features)))
        return self.head(self.flatten(self.pool(features)))


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; more channels come with half the side."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.num_new_channels = out_channels - in_channels
        self.conv0 = _conv3x3(in_channels, out_channels, norm, stride=2 if self.num_new_channels else 1)
        self.norm0 = _norm(norm, out_channels)
        self.conv1 = _conv3x3(out_channels, out_channels, norm)
        self.norm1 = _norm(norm, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features
        if self.num_new_channels:
            shortcut = F.pad(features[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.num_new_channels))
        features = F.relu(self.norm0(self.conv0(features)))
        return F.relu(shortcut + self.norm1(self.conv1(features)))


class _GreyToRGB(nn.Module):
    """Repeats one channel three times, without a copy."""

    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1)


def _torchvision_network(name: str, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A torchvision classification network without pretrained weights or auxiliary heads; grey images are repeated.

    Raises:
        ValueError: for an unknown name, or images it cannot take, with the smallest size from theirs up that it can.
    """
    from torchvision import models  # 1 s to import: only for those who ask for it

    names = models.list_models(module=models)
    if name not in names:
        known = [*_OWN, *names]
        raise ValueError(
            f"there is no model {name}{nearest(name, known)}; known are {', '.join(_OWN)}, the {len(names)} "
            f"classification networks of torchvision, and package.module:function"
        )
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"{name} takes images of 1 or 3 channels, not {channels}")

    def network(height: int, width: int) -> nn.Module:
        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            options = {"aux_logits": False, "init_weights": True}
        elif name.startswith("vit_"):
            options = {"image_size": height}
        elif name == "maxvit_t":
            options = {"input_size": (height, width)}
        return models.get_model(name, weights=None, num_classes=num_classes, **options)

    any_size = None if name.startswith("vit_") or name == "maxvit_t" else network(height, width)

    def fits(height: int, width: int) -> bool:
        try:
            with torch.device("meta"):
                tried = any_size or network(height, width)
            return _meta_output_shape(tried, (2, 3, height, width)) == (2, num_classes)
        except (RuntimeError, ValueError, AssertionError):  # what torch and torchvision raise for a size
            return False

    if not fits(height, width):
        largest = max(height, width)
        side = next((side for side in range(largest, largest + _NUM_SIDES_TRIED) if fits(side, side)), None)
        assert side is not None, f"{name} does not run on the meta device"
        raise ValueError(
            f"{name} cannot take images of {height}×{width}; the smallest it takes from there up are {side}×{side}: "
            f"set data.image_size={side}"
        )
    model = any_size or network(height, width)
    return nn.Sequential(OrderedDict(grey_to_rgb=_GreyToRGB(), network=model)) if channels == 1 else model


def _meta_output_shape(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the outputs in eval mode, found with stand-ins for the weights: no arithmetic, nothing changes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    stand_ins = {name: tensor.detach().to("meta") for name, tensor in tensors}
    with torch.no_grad():
        images = torch.empty(shape, device="meta")
        return tuple(torch.func.functional_call(model.eval(), stand_ins, (images,)).shape)


def _users_network(name: str, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """What the user's function returns, without torch's wrappers that spread it over cards or compile it."""
    model = call_function("model.name", name, num_classes, shape)
    if isinstance(model, nn.DataParallel):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned a {type(model).__name__}; it should return an nn.Module")
    return model.to("cpu")


def needs_default_layout(model: nn.Module) -> bool:
    """Whether build_model() found that the network cannot be trained on channels-last images, so is given no such."""
    return any(hook is _in_default_layout for hook in model._forward_pre_hooks.values())


def _in_default_layout(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook: copies of the images in memory [N, C, H, W]; contiguous() would keep the strides of a single channel."""
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


def _as_a_copy(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook: copies of the images, as the network changes its own."""
    return (inputs[0].clone(), *inputs[1:])


def _try_evaluation(name: str, model: nn.Module, num_classes: int, shape: tuple[int, int, int]) -> None:
    """Try two images of zeros, and one, on a network in eval mode.

    Raises:
        ValueError: if it cannot take them, or gives anything but float [N, num_classes].
    """
    for num in (2, 1):
        images = torch.zeros(num, *shape)
        try:
            with generators_restored(), torch.no_grad():
                outputs = model(images)
        except Exception as error:  # the user's forward() may raise anything
            reason, of = one_line(error), f"images of shape {list(images.shape)} [N, C, H, W]"
            text = f"{name} cannot take {of}" if num > 1 else f"{name} cannot take {of}, one alone, in evaluation mode"
            raise ValueError(f"{text}: {reason}") from error
        _check_outputs(name, outputs, num, num_classes, "")


def _try_training(name: str, model: nn.Module, num_classes: int, shape: tuple[int, int, int]) -> None:
    """Try a step of two random images on copies of a network, in the layout of the actors and else in torch's default.

    Raises:
        ValueError: if it fails in both, or gives anything but float [2, num_classes] that depends on its parameters.
    """
    channels, height, width = shape
    reasons = []
    for layout in (torch.channels_last, torch.contiguous_format):
        network = copied(model).train()
        network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        images = torch.randn(2, height, width, channels).permute(0, 3, 1, 2)  # in the memory that Examples have
        if layout is torch.contiguous_format:
            images = images.clone(memory_format=layout)
        given = images.clone()
        try:
            with generators_restored(), torch.enable_grad():
                outputs = network(given)
                if isinstance(outputs, Tensor) and outputs.requires_grad and outputs.is_floating_point():
                    outputs.sum().backward()
        except Exception as error:  # likewise
            reasons.append(one_line(error))
            continue
        _check_outputs(name, outputs, len(images), num_classes, " in train mode")
        if not outputs.requires_grad:
            cause = "leave no_grad(), detach() and NumPy out of its forward()"
            raise ValueError(f"{name} gave outputs in train mode that have no gradient: {cause}")
        if layout is torch.contiguous_format:
            model.register_forward_pre_hook(_in_default_layout)
        elif not torch.equal(given, images):
            model.register_forward_pre_hook(_as_a_copy)
        return
    raise ValueError(f"{name} cannot take a step of training on two images: {reasons[-1]}")


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network; attributes that cannot be copied, as locks, are shared with it."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever an attribute of the user's raises
        shared = {}
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    try:
                        copy.deepcopy(value)
                    except Exception:  # likewise
                        shared[id(value)] = value
        return copy.deepcopy(model, shared)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Python's and NumPy's global generators as they were, afterwards; torch's are seen to by build_model()."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _check_outputs(name: str, outputs: Any, num: int, num_classes: int, when: str) -> None:
    """Refuse anything but float [num, num_classes]."""
    if not isinstance(outputs, Tensor):
        kind = type(outputs).__name__
        raise ValueError(
            f"{name} gave a {kind}{when}; it should give logits [N, {num_classes}]"
            + (", as it does in evaluation mode: leave its auxiliary heads out, or wrap it" if when else "")
        )
    if outputs.shape != (num, num_classes) or not outputs.is_floating_point():
        gave = f"{str(outputs.dtype).removeprefix('torch.')} {list(outputs.shape)}"
        images = "two images" if num == 2 else "one image"
        squeezed = num == 1 and outputs.ndim < 2
        raise ValueError(
            f"{name} gave {gave} for {images}{when}; it should give float logits [{num}, {num_classes}], one a class"
            + (": squeeze() drops the dimension of the batch too, flatten(1) does not" if squeezed else "")
        )
