"""What is relied on of Ray's private names: a Ray that has moved or changed one fails here, under that name."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray._private import services
from ray._private import utils as ray_utils
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, WorkerGroup

from raysubset.cluster import private_ray

PACKAGE = Path(private_ray.__file__).parents[1]


def takes(function: Callable[..., Any], *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


def has(thing: Any, *names: str) -> bool:
    return all(hasattr(thing, name) for name in names)


RELIED_ON: dict[str, Callable[[Any], bool]] = {
    "AuthenticationTokenLoader": lambda loader: has(loader.instance(), "reset_cache", "has_token"),
    "Config": lambda config: has(config, "initialize"),
    "canonicalize_bootstrap_address": lambda function: function("10.0.0.1:6379") == "10.0.0.1:6379",
    "create_gcs_channel": lambda function: takes(function, "address"),
    "gcs_service_pb2": lambda module: has(module, "CheckAliveRequest"),
    "gcs_service_pb2_grpc": lambda module: has(module, "NodeInfoGcsServiceStub"),
    "Node": lambda node: (
        takes(node, "ray_params", "head", "shutdown_at_exit", "spawn_reaper")
        and takes(node.start_api_server, "include_dashboard", "raise_on_failure")
        and takes(node.kill_all_processes, "check_alive", "allow_graceful")
        and has(node, "gcs_address", "destroy_external_storage")
    ),
    "RayParams": lambda params: takes(
        params, "num_cpus", "num_gpus", "no_monitor", "include_log_monitor", "_system_config"
    ),
    "utils": lambda module: (
        "utils.get_dashboard_dependency_error()" in inspect.getsource(services.start_raylet) and module is ray_utils
    ),
    "worker": lambda module: (
        "print_to_stdstream(" in inspect.getsource(module.listen_error_messages)
        and takes(module.print_to_stdstream, "data", "ignore_prefix")
    ),
    "ResourceAndLabelSpec": lambda spec: (
        spec(num_cpus=3, num_gpus=0).resolve(is_head=True, node_ip_address="127.0.0.1").to_resource_dict()["CPU"] == 3
    ),
    "state": lambda state: has(state, "get_cluster_config", "get_draining_nodes", "_connect_and_get_accessor"),
    "PlacementGroupTableData": lambda message: has(
        message(),
        *("placement_group_id", "creator_actor_id", "state", "PlacementGroupState"),
        "placement_group_creation_timestamp_ms",
    ),
    "global_worker": lambda worker: (
        ".gcs_client = " in inspect.getsource(private_ray.worker)  # set when it is connected
    ),
    "GetClusterStatusReply": lambda message: has(
        message().autoscaling_state,
        "autoscaler_state_version",
        "pending_instance_requests",
        "pending_instances",
        "failed_instance_requests",
    ),
    "internal_kv": lambda module: has(
        module, "_internal_kv_put", "_internal_kv_get", "_internal_kv_list", "_internal_kv_del"
    ),
    "TrainController": lambda controller: (
        has(controller, "run", "get_result", "abort")
        and takes(controller, "failure_policy")
        and takes(TorchTrainer._initialize_and_run_controller, "controller_init_kwargs")
    ),
    "DatasetsCallback": lambda callback: (
        {callback} <= {type(one) for one in TorchTrainer(lambda: None)._create_default_callbacks()}  # pyright: ignore[reportAttributeAccessIssue]
        and inspect.signature(RayTrainWorker.init_train_context).parameters["dataset_shard_provider"].default is None
    ),
    "DefaultFailurePolicy": lambda policy: takes(policy.make_decision, "training_failed_error"),
    "FailureDecision": lambda decision: has(decision, "RAISE"),
    "get_env_vars_to_propagate": lambda function: isinstance(function(), dict),
    "TorchBackend": lambda backend: (
        takes(backend.on_start, "worker_group", "backend_config")
        and takes(WorkerGroup.execute_single, "rank", "fn")
        and takes(WorkerGroup.execute_single_async, "rank", "fn")
    ),
    "set_torch_distributed_env_vars": lambda function: takes(function),
}


@pytest.mark.parametrize("name", private_ray._PLACES)
def test_ray_has_what_is_relied_on(name: str) -> None:
    assert RELIED_ON[name](getattr(private_ray, name))


def test_no_other_file_imports_a_private_name_of_ray_and_none_is_listed_in_vain() -> None:
    used: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "raysubset.cluster.private_ray":
                used |= {alias.name for alias in node.names}
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or ""
                names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
                of_ray = [name for name in names if name.split(".")[0] == "ray"]
                assert [name for name in of_ray if "._" in name or ".generated" in name] == [], path
    assert used == set(private_ray._PLACES)
