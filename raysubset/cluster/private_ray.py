"""Every private name of Ray that this package uses: where it lies, and what for, as no public one does it.

from raysubset.cluster.private_ray import TrainController

A name is looked up when it is imported from here, as Ray Train takes seconds. tests/test_private_ray.py asks each for
what is relied on, so that a Ray that has moved or changed one fails there, under that name.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    # connecting
    "AuthenticationTokenLoader": "ray._raylet",  # has Ray read its token again
    "Config": "ray._raylet",  # has Ray read RAY_AUTH_MODE again, which it does once, when it is imported
    "canonicalize_bootstrap_address": "ray._private.services",  # what ray.init() makes of an address
    "create_gcs_channel": "ray._private.gcs_utils",  # to a control store, with TLS where RAY_USE_TLS says so
    "gcs_service_pb2": "ray.core.generated",  # asks a control store whether it wants a token
    "gcs_service_pb2_grpc": "ray.core.generated",
    # what there is
    "ResourceAndLabelSpec": "ray._private.resource_and_label_spec",  # what ray.init() would count on this machine
    "state": "ray._private.state",  # node groups that can be started, nodes that will go, who made a placement group
    "PlacementGroupTableData": "ray.core.generated.gcs_pb2",
    "global_worker": "ray._private.worker",  # the autoscaler's whole answer: ray.autoscaler.v2.sdk gives a part
    "GetClusterStatusReply": "ray.core.generated.autoscaler_pb2",
    "internal_kv": "ray.experimental",  # the control store as a board where processes tell that they are at work
    # Ray Train
    "TrainController": "ray.train.v2._internal.execution.controller",  # looked after by the driver while it runs
    "DatasetsCallback": "ray.train.v2._internal.callbacks.datasets",  # starts a process for data sets
    "DefaultFailurePolicy": "ray.train.v2._internal.execution.failure_handling",  # knows no mistakes that recur
    "FailureDecision": "ray.train.v2._internal.execution.failure_handling",
    "get_env_vars_to_propagate": "ray.train.v2._internal.constants",
    "TorchBackend": "ray.train.torch.config:_TorchBackend",  # gives torch no socket to listen on
    "set_torch_distributed_env_vars": "ray.train.torch.config:_set_torch_distributed_env_vars",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(name)
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute or name, None) or import_module(f"{module}.{name}")
