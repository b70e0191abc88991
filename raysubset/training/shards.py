"""Shares of every batch, for several workers that compute one minimization together."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.training.records import LeftOutError
from raysubset.training.uncompiled import data_parallel

_OPTIONS = signature(nn.parallel.DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"  # in earlier torch


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one of several workers computes; the default is all of it."""

    rank: int = 0
    num: int = 1
    leaves_out: bool = False  # True if a step may leave parameters without gradients, in one worker or in all

    def sum(self, value: Tensor) -> Tensor:
        """Sum `value` over the workers, in place. Every worker must call it."""
        if self.num > 1:
            torch.distributed.all_reduce(value)
        return value

    def gathered(self, value: Any) -> list[Any]:
        """Return every worker's value, by rank, in the first worker; [] in the others. Every worker must call it."""
        values = [None] * self.num if self.rank == 0 else None
        torch.distributed.gather_object(value, values)
        return values or []

    def average_gradients(self, parameters: Iterable[nn.Parameter], *, as_bfloat16: bool = False) -> None:
        """Replace the gradients by their mean over the workers, in place and in one exchange.

        Every worker must call it, with the same parameters. If leaves_out, a parameter that has a gradient in any
        worker gets one in all of them. As bfloat16, gradients are rounded as data_parallel() does.
        """
        if self.num == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        if self.leaves_out:
            used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
            used = self.sum(used.to(parameters[0].device)).tolist()
            for parameter, num in zip(parameters, used, strict=True):
                if num and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat = self.sum(flat.bfloat16().div_(self.num)) if as_bfloat16 else self.sum(flat).div_(self.num)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def check_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Check that no parameter lacks a gradient, unless leaves_out: the other workers wait for it.

        Raises:
            LeftOutError: if one does.
        """
        if self.num > 1 and not self.leaves_out and any(p.requires_grad and p.grad is None for p in parameters):
            raise LeftOutError("a step left out parameters, which Ray Train's workers did not know of")

    def data_parallel(self, model: nn.Module, device: torch.device, *, as_bfloat16: bool = False) -> nn.Module:
        """Return the model whose backward passes average gradients over the workers while they compute.

        As bfloat16, each worker's gradients are rounded and divided by the number of workers, and their sums are
        rounded. Buffers are not averaged; the result has the first worker's.
        """
        if self.num == 1:
            return model
        ids = [device] if device.type == "cuda" else None
        options = {"device_ids": ids, SYNC_BUFFERS: False, "find_unused_parameters": self.leaves_out}
        parallel = data_parallel(model, **options)
        if as_bfloat16:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook  # 26 ms

            parallel.register_comm_hook(None, bf16_compress_hook)
        return parallel


def in_parts(
    forward_and_backward: Callable[[Tensor, Tensor, float], Tensor],
    inputs: Tensor,
    targets: Tensor,
    weight: float,
    *,
    num_parts: int,
    network: nn.Module,
) -> Tensor:
    """Pass a worker's share of a batch forward and backward in nearly equal parts; return its outputs [n, …].

    The workers exchange gradients once, in the last part's backward pass.
    """
    without_exchange = network.no_sync if isinstance(network, nn.parallel.DistributedDataParallel) else nullcontext
    num_parts, outputs = min(num_parts, len(inputs)), list[Tensor]()
    parts = zip(inputs.tensor_split(num_parts), targets.tensor_split(num_parts), strict=True)
    for number, (part_inputs, part_targets) in enumerate(parts, start=1):
        with nullcontext() if number == num_parts else without_exchange():
            outputs.append(forward_and_backward(part_inputs, part_targets, weight))
    return torch.cat(outputs)
