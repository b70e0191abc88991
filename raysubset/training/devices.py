"""The device and the threads a process computes with, set explicitly."""

import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from raysubset.models import needs_default_layout


def use_device(*, num_gpus: float, num_threads: int) -> torch.device:
    """Choose the device for what this process was given, and make its results repeatable.

    A process that was given no GPU computes on the CPU even where one is visible: Ray leaves CUDA_VISIBLE_DEVICES alone
    for actors without GPUs. The thread count is a part of the result (sums are split by threads); OpenMP keeps it per
    calling thread, so this is to be called in the thread that computes.

    Raises:
        RuntimeError: if GPUs were given but torch sees none.
    """
    torch.set_num_threads(num_threads)
    if not num_gpus:
        _keep_freed_memory()
        return torch.device("cpu")
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with a fixed workspace
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else deterministic algorithms write NaN to each new tensor first, at the price of a kernel
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cudnn.benchmark = False
        # Attention in float32 has a backward pass that only warns; flash attention, in bfloat16, obeys
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise RuntimeError(f"{num_gpus:g} GPUs were given to this process, but torch {torch.__version__} sees none")


@cache
def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 64 MiB, 128 MiB in all, for the next: half of an evaluation's time on MNIST
    went into handing back a batch's activations and having the same pages zeroed again.

    Thresholds that the user's environment sets stay, and other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3
    is_set = any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP"))
    if sys.platform == "linux" and not is_set and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        with suppress(OSError, AttributeError):  # of another C library
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            # Older glibc takes no more than 32; where it takes none, the trim threshold would end its own adapting
            if any(mallopt(mmap_threshold, num * 2**20) for num in (64, 32)):
                mallopt(trim_threshold, 128 * 2**20)


def card_bytes(*, num_gpus: float) -> int | None:
    """Memory of the CUDA card that this process was given, others' share of it included; None where it has none."""
    if not num_gpus or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most memory that this process has had since it began: of the host, resident, and of a CUDA card, by torch."""
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = {"host": 1024 * int(status["VmHWM"].split()[0])}  # ru_maxrss is at least that of the process that forked
    except (OSError, KeyError):  # not on Linux, or in a sandbox that has a part of /proc
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"host": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return peak | ({"card": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})


_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def mixed_precision(device: torch.device, dtype: torch.dtype, precision: str) -> AbstractContextManager[object]:
    """The context of a forward pass, to be entered as often as needed; auto: bfloat16 on CUDA cards that have it.

    Args:
        device: computed on.
        dtype: of the parameters.
        precision: the recipe's.

    Raises:
        ValueError: if half precision is asked for with parameters that autocast leaves as they are.
    """
    if precision in _HALVES and dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"minimize.precision={precision} needs float32 parameters; these are {name}: set it to auto")
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.bfloat16 if precision == "auto" and supported and dtype == torch.float32 else _HALVES.get(precision)
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point numbers that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_name(device: torch.device) -> str:
    """As ledgers name it: the card's model, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def place(model: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """The model on the device, its convolutions in the memory layout that is fast with images of that layout.

    One that works in torch's default layout alone is in that, whatever is asked for.
    """
    layout = torch.channels_last if channels_last and not needs_default_layout(model) else torch.contiguous_format
    return model.to(device).to(memory_format=layout)
