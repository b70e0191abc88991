"""How several workers share every batch of one minimization."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one of several workers computes; the default is all of it."""

    rank: int = 0
    num: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over the workers, in place; every worker must call it."""
        if self.num > 1:
            torch.distributed.all_reduce(value)
        return value

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean over the workers of the gradients that are there, in place and in one exchange.

        Every worker must call it, with gradients of the same parameters.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.num == 1 or not gradients:
            return
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients])).div_(self.num)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def data_parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose backward passes average gradients over the workers, while they go on.

        Buffers go their own ways: what counts in the end are the first worker's.
        """
        if self.num == 1:
            return model
        ids = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
