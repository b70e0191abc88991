"""profiled(): a trace of some steps of one minimization by torch's profiler, for Perfetto."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_NUM_BEFORE = 4  # steps that choose kernels and fill caches


@contextmanager
def profiled(
    num_steps: int, device: torch.device, leave: Callable[[bytes], object]
) -> Iterator[Callable[[], None] | None]:
    """Trace so many of the block's steps, after a few to warm up. Call the yielded function after each step.

    Args:
        num_steps: 0: trace nothing, and yield None.
        leave: called with the trace, Chrome's JSON in gzip, once it is complete or the block ends. It is not called if
            the block ends before the traced steps.
    """
    if not num_steps:
        yield None
        return

    def export(profiler: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            profiler.export_chrome_trace(str(path))
            leave(path.read_bytes())

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    steps = schedule(wait=_NUM_BEFORE - 1, warmup=1, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=export, record_shapes=True) as profiler:
        yield profiler.step
