"""What a Ray Train worker raises: tried again where it came from outside its work, and only there."""

import pytest
import ray.train
import torch
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from raysubset.fine_tuning.trainer import EndsOnMistakes
from raysubset.fine_tuning.worker import MistakeError, _may_pass
from raysubset.subset_actors.pool import PLACE_ERRORS
from raysubset.user_functions import in_a_line


def decision(*errors: Exception) -> FailureDecision:
    """As the controller decides, which has the policy and the errors from other processes."""
    policy = EndsOnMistakes(ray.train.FailureConfig(max_failures=3))
    there = cloudpickle.loads(cloudpickle.dumps((policy, WorkerGroupError("failed", dict(enumerate(errors))))))
    return there[0].make_decision(there[1])


def test_mistakes_are_not_tried_again_and_losses_are():
    mistake = MistakeError("worker 1 of 2 on node 10.0.0.1: TypeError: labels are wanted", False)
    assert decision(mistake) == FailureDecision.RAISE
    assert decision(RuntimeError("Connection closed by peer"), mistake) == FailureDecision.RAISE
    assert decision(OSError("503")) == FailureDecision.RETRY
    assert decision(RayActorError(), mistake) == FailureDecision.RETRY  # it may follow from the loss


def test_what_may_pass_is_storage_devices_ray_and_lost_connections():
    passing = [OSError("503"), ConnectionError(), RayActorError(), torch.distributed.DistNetworkError("lost")]
    passing += [RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:3021")]
    assert all(map(_may_pass, passing))
    mistakes = [ValueError("connection"), TypeError("x"), KeyError("labels"), RuntimeError("mat1 and mat2 shapes")]
    assert not any(map(_may_pass, mistakes))


def test_a_device_that_fails_in_a_users_function_is_no_mistake_of_the_function():
    with pytest.raises(torch.AcceleratorError) as told, in_a_line("data.augmentation", "views:cut"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert _may_pass(told.value)
    assert isinstance(told.value, PLACE_ERRORS)  # and in an actor
