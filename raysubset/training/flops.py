"""The forward pass's share of a pass, counted in floating-point operations of the network itself."""

import torch
from torch import Tensor, nn

from raysubset.costs import FORWARD_SHARE
from raysubset.models import modes_restored
from raysubset.tasks import Spec
from raysubset.training.uncompiled import import_no_compiler_for

_NUM_EXAMPLES = 2  # batch norm in training mode takes no fewer
_SMALL = 2**22  # parameters: a step of fewer takes less time than torch needs to get its meta device ready


def forward_share(model: nn.Module, spec: Spec) -> float:
    """Return the forward pass's share of the operations of forward and backward pass together, in (0, 1).

    It is about a third for deep networks: a backward pass has a product for each layer's weights and one for its
    inputs. It is a half for shallow dense ones, whose first layer needs no gradient of its input, and more if layers
    are frozen. Matrix products and convolutions count (torch.utils.flop_counter); a network without any gets
    FORWARD_SHARE, as does one that computes derivatives itself, which torch does not count. Large networks run on
    torch's meta device, where nothing is computed. Small ones, and those that cannot run there, make a step on two
    examples of zeros. The model is on the CPU and left as it is.
    """
    with modes_restored(model), torch.random.fork_rng(devices=[]):
        model.train()
        is_small = sum(p.numel() for p in model.parameters()) <= _SMALL
        try:
            forward, backward = _operations(model, spec, "cpu" if is_small else "meta")
        except Exception:  # a user's constants on the CPU, or control flow that depends on values
            try:
                forward, backward = _operations(model, spec, "cpu")
            except RuntimeError:  # torch's counter refuses autograd.grad() within forward()
                return FORWARD_SHARE
    return forward / (forward + backward) if forward and backward else FORWARD_SHARE


def _operations(model: nn.Module, spec: Spec, device: str) -> tuple[int, int]:
    """Count the floating-point operations of a forward pass on zeros, and of the backward pass of the outputs' sum."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)

    from torch.utils import flop_counter  # imports triton: 0.16 CPU s that an actor does without

    if inner := getattr(flop_counter, "_FlopCounterMode", None):  # another torch may lack it, without harm to results
        import_no_compiler_for(inner.__torch_dispatch__)
    tensors = {name: copied(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with flop_counter.FlopCounterMode(display=False) as forward:
        outputs = torch.func.functional_call(model, tensors, (spec.zeros(_NUM_EXAMPLES).to(device),))
    with flop_counter.FlopCounterMode(display=False) as backward:
        outputs.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()
