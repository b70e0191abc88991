"""Aggregates and test results, computed on the driver, or in a task on the cluster that has a GPU."""

from collections.abc import Callable
from typing import Any

import torch

from raysubset.aggregation import Aggregation, Unmeasured
from raysubset.cluster import call_on_cluster, own_address
from raysubset.run_directory import Seal
from raysubset.training import Metrics, Weights
from raysubset.work import Round, Run, leave_aggregate, leave_test


class ScoringPlace:
    """Where forward work between the stages is done, and its ledger entry written. A task that dies is run again by
    Ray, and its entry counts as lost; the driver's is not."""

    def __init__(self, run: Run, *, num_gpus: float) -> None:
        """num_gpus 0 means the driver's CPU, with as many threads as an actor."""
        self._run, self._num_gpus = run, num_gpus

    def aggregate(self, of: Round) -> tuple[Aggregation | Unmeasured, dict[str, Any]]:
        """leave_aggregate(), there."""
        return self._call(_aggregate, of)

    def test(self, weights: Weights) -> tuple[Metrics, dict[str, Seal]]:
        """leave_test(), there. To be called once, at the end."""
        return self._call(_test, weights)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        run = self._run
        if not self._num_gpus:
            num_threads = torch.get_num_threads()
            try:
                return function(run.full_set, 0, run.config, run.directory, *arguments)
            finally:
                torch.set_num_threads(num_threads)  # the process is the caller's
        return call_on_cluster(
            function,
            run.full_set_ref,
            self._num_gpus,
            run.config,
            run.directory,
            *arguments,
            request={"CPU": run.config.actors.num_cpus, "GPU": self._num_gpus},
            tell=run.tell,
            stall_s=run.config.actors.stall_s,
        )


def _aggregate(*arguments: Any) -> tuple[Aggregation | Unmeasured, dict[str, Any]]:
    return leave_aggregate(*arguments, node=own_address())


def _test(*arguments: Any) -> tuple[Metrics, dict[str, Seal]]:
    return leave_test(*arguments, node=own_address())
