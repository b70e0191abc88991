"""The device and the threads that a process computes with, set explicitly."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.models import needs_default_layout


def use_device(*, num_gpus: float, num_threads: int) -> torch.device:
    """Choose the device that this process was given, and make its results repeatable.

    A process without a GPU computes on the CPU even if a GPU is visible: Ray leaves CUDA_VISIBLE_DEVICES alone for
    actors without GPUs. The thread count affects the result, because sums are split by threads. OpenMP keeps it per
    calling thread, so call this in the thread that computes.

    Raises:
        torch.AcceleratorError: if GPUs were given but torch sees none. Another node may do better.
    """
    torch.set_num_threads(num_threads)
    if not num_gpus:
        _keep_freed_memory()
        return torch.device("cpu")
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with a fixed workspace
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Otherwise deterministic algorithms first write NaN to each new tensor, which costs a kernel
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cudnn.benchmark = False
        # Attention in float32 has a backward pass that only warns; flash attention, in bfloat16, is deterministic
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise torch.AcceleratorError(
        f"{num_gpus:g} GPU was given to this process, but torch {torch.__version__} sees none: install a torch built "
        "for this node's driver, or give --actors.num-gpus=0"
    )


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 64 MiB, 128 MiB in all, for reuse.

    Half of an evaluation's time on MNIST went into returning a batch's activations to the system and having the same
    pages zeroed again. Thresholds that the user's environment sets stay, and other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3
    is_set = any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP"))
    if sys.platform == "linux" and not is_set and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        with suppress(OSError, AttributeError):  # of another C library
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            # Older glibc allows at most 32. If it allows none, the trim threshold would only end its own adapting
            if any(mallopt(mmap_threshold, num * 2**20) for num in (64, 32)):
                mallopt(trim_threshold, 128 * 2**20)


def card_bytes(*, num_gpus: float) -> int | None:
    """Return the total memory of this process's CUDA card, other processes' share included; None if it has no card."""
    if not num_gpus or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Return the process's peak memory since it began: "host", resident, and "card", as torch counts a CUDA card's."""
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = {"host": 1024 * int(status["VmHWM"].split()[0])}  # ru_maxrss is at least the forking process's
    except (OSError, KeyError):  # not on Linux, or in a sandbox with a part of /proc
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"host": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return peak | ({"card": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})


_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def mixed_precision(device: torch.device, dtype: torch.dtype, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass, to be entered repeatedly; auto means bfloat16 on CUDA cards that have it.

    Args:
        device: computed on.
        dtype: of the parameters.
        precision: the recipe's.

    Raises:
        ValueError: if half precision is requested for parameters that autocast would leave as they are.
    """
    if precision in _HALVES and dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"minimize.precision={precision} needs float32 parameters; these are {name}: set it to auto")
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.bfloat16 if precision == "auto" and supported and dtype == torch.float32 else _HALVES.get(precision)
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)


def placed(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a few numbers as a tensor on a device. torch.tensor(device=…) would wait for all of a card's work."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Let a card compute convolutions and recurrent layers in float32: cuDNN's TF32, the default, has 10 bits."""
    cudnn: Any = torch.backends.cudnn
    operations = [cudnn.conv, cudnn.rnn] if device.type == "cuda" else []
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_name(device: torch.device) -> str:
    """Return the name that ledgers use: the card's model, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def place(model: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """Return the model on the device, its convolutions in the memory layout that is fast for images of that layout.

    A network that only works in torch's default layout gets that one, whatever is requested.
    """
    layout = torch.channels_last if channels_last and not needs_default_layout(model) else torch.contiguous_format
    return model.to(device).to(memory_format=layout)
