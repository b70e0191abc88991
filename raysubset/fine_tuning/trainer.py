"""WatchedTrainer: Ray Train's TorchTrainer, whose controller the driver looks after while it runs."""

from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysubset.cluster import STOP_GRACE_S, SYSTEM_ERRORS, groups_of, remove_groups
from raysubset.cluster.private_ray import (
    DefaultFailurePolicy,
    FailureDecision,
    TrainController,
    get_env_vars_to_propagate,
)
from raysubset.fine_tuning.worker import MistakeError


class EndsOnMistakes(DefaultFailurePolicy):
    """Tries again what befell the workers, and ends with what they did wrong: they would do it at every attempt.

    Where a worker was lost as well, the others' errors may follow from that.
    """

    def make_decision(self, training_failed_error: ray.train.TrainingFailedError) -> FailureDecision:
        errors = getattr(training_failed_error, "worker_failures", {}).values()
        lost = any(isinstance(error, SYSTEM_ERRORS) for error in errors)
        if not lost and any(isinstance(error, MistakeError) for error in errors):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class WatchedTrainer(TorchTrainer):
    """Calls `look` with the controller while fit() waits for it; what that raises ends the job.

    However fit() is left, the controller, its workers and their placement group are gone. Ctrl-C raises
    KeyboardInterrupt from it, where TorchTrainer's own handler ends the process as if all were done.
    """

    look: Callable[[Any], None]
    every_s: float  # between two looks
    start_timeout_s: float  # for a group of workers to get their places; else the controller counts a failure

    def _initialize_and_run_controller(self, **options: Any) -> ray.train.Result:
        """As TorchTrainer's, which only waits."""
        variables = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | get_env_vars_to_propagate()
        variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(self.start_timeout_s)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        controller_class: Any = ray.remote(TrainController)
        place = {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": {"env_vars": variables}}
        assert self.run_config.failure_config is not None
        options["failure_policy"] = EndsOnMistakes(self.run_config.failure_config)
        controller = controller_class.options(**place).remote(**options)
        try:
            result: Any = None
            for method in (controller.run, controller.get_result):
                result_ref = method.remote()
                while not ray.wait([result_ref], timeout=self.every_s)[0]:
                    self.look(controller)
                result = ray.get(result_ref)
            return result
        except BaseException as error:
            self._end(controller, has_died=isinstance(error, SYSTEM_ERRORS))
            raise

    def _end(self, controller: Any, *, has_died: bool) -> None:
        try:
            if not has_died:
                ray.wait([controller.abort.remote()], timeout=STOP_GRACE_S)
        finally:  # also when a second Ctrl-C cuts the grace short
            ray.kill(controller)
            remove_groups(list(groups_of(controller)))
