"""Every private name of Ray that this package uses: its module, and what it is needed for, as no public name does it.

from raysubset.cluster.private_ray import TrainController

A name is looked up when it is imported from here, as Ray Train takes seconds. tests/test_private_ray.py checks each
name for what the package relies on: if a new Ray has moved or changed a name, that test fails under the name.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    # connecting
    "AuthenticationTokenLoader": "ray._raylet",  # makes Ray read its token again
    "Config": "ray._raylet",  # makes Ray read RAY_AUTH_MODE again, which it otherwise reads once, on import
    "canonicalize_bootstrap_address": "ray._private.services",  # resolves an address as ray.init() does
    "create_gcs_channel": "ray._private.gcs_utils",  # to a control store, with TLS if RAY_USE_TLS says so
    "gcs_service_pb2": "ray.core.generated",  # asks a control store whether it wants a token
    "gcs_service_pb2_grpc": "ray.core.generated",
    "Node": "ray._private.node",  # the processes of a node: ray.init() leaves none of them out
    "RayParams": "ray._private.parameter",
    "utils": "ray._private",  # tells a node that the dashboard cannot be there
    "worker": "ray._private",  # prints messages to drivers on stdout, where results belong
    # resources
    "ResourceAndLabelSpec": "ray._private.resource_and_label_spec",  # counts what ray.init() would on this machine
    "state": "ray._private.state",  # startable node groups, nodes that will go, the creators of placement groups
    "PlacementGroupTableData": "ray.core.generated.gcs_pb2",
    "global_worker": "ray._private.worker",  # the autoscaler's whole answer: ray.autoscaler.v2.sdk returns a part
    "GetClusterStatusReply": "ray.core.generated.autoscaler_pb2",
    "internal_kv": "ray.experimental",  # the control store, where processes publish their pulses
    # Ray Train
    "TrainController": "ray.train.v2._internal.execution.controller",  # watched by the driver while it runs
    "DatasetsCallback": "ray.train.v2._internal.callbacks.datasets",  # starts a process for data sets
    "DefaultFailurePolicy": "ray.train.v2._internal.execution.failure_handling",  # repeats mistakes that will recur
    "FailureDecision": "ray.train.v2._internal.execution.failure_handling",
    "get_env_vars_to_propagate": "ray.train.v2._internal.constants",
    "TorchBackend": "ray.train.torch.config:_TorchBackend",  # passes no listening socket to torch
    "set_torch_distributed_env_vars": "ray.train.torch.config:_set_torch_distributed_env_vars",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(name)
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute or name, None) or import_module(f"{module}.{name}")
