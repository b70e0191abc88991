"""Tells a Ray cluster which nodes its autoscaler can start: run on the head, after `ray start`.

    python clusters/publish_node_types.py ~/ray_bootstrap_config.yaml
    kubectl exec -i HEAD_POD -- python clusters/publish_node_types.py /dev/stdin < clusters/kuberay/raycluster.yaml

Ray's control store has a place for this (`state.get_cluster_config()`), which Ray's own autoscalers leave empty (2.60).
With it filled in, raysubset knows of GPUs while no node is up, refuses at once what can never be placed, and counts how
many workers there may be. Without it a run on a cluster that scales from zero has to be told: --actors.num-gpus 1.
"""

# ruff: noqa: TID251
import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DEFAULT_ADDRESS = "127.0.0.1:6379"


def node_groups(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, resources of a node, and least and most nodes, of each type that the autoscaler may start.

    Args:
        config: an autoscaler's config, or a RayCluster of KubeRay, of which Ray makes one.
    """
    if config.get("kind") == "RayCluster":
        from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

        config = _derive_autoscaling_config_from_ray_cr({**config, "metadata": {"name": "any", "namespace": "any"}})
    most = config.get("max_workers", 2)  # Ray's default
    return [
        {
            "name": name,
            "resources": {key: int(amount) for key, amount in kind["resources"].items()},
            "min_count": kind.get("min_workers", 0),
            "max_count": min(kind.get("max_workers", most), most),
        }
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]


def publish(config: Mapping[str, Any], address: str) -> None:
    """Write the node types of an autoscaler's config to the control store at host:port.

    A process that asks for a token finds it as every Ray process does: RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH.
    """
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    message = ClusterConfig(node_group_configs=[NodeGroupConfig(**group) for group in node_groups(config)])
    GcsClient(address=address).report_cluster_config(message.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="what `ray start --autoscaling-config` was given")
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS", DEFAULT_ADDRESS), help="the head's host:port"
    )
    arguments = parser.parse_args()
    config = next(yaml.safe_load_all(arguments.config.expanduser().read_text()))
    publish(config, arguments.address)


if __name__ == "__main__":
    main()
