"""in_local_mode(): does work as the only worker of a Ray Train job, in this process."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from raysubset.fine_tuning.job import FOLDER


def in_local_mode(work: Callable[[], Any]) -> Any:
    """Return what the work returns in Ray Train's local mode. Its errors pass through.

    This mode starts no process and keeps no checkpoints: the work resumes by itself.
    """
    trainer = TorchTrainer(
        work,
        torch_config=_NoDeviceConfig(),
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name=FOLDER),
    )
    return trainer.fit().return_value


class _NoDeviceConfig(TorchConfig):
    """A TorchConfig that leaves the device to use_device(); torch's own would start CUDA in a process without a GPU."""

    @property
    def train_func_context(self) -> Any:
        return nullcontext
