"""The nodes of local_autoscaling.yaml: Ray's fake ones, each with a folder of its own for what jobs bring along."""

# ruff: noqa: TID251
from typing import Any
from unittest import mock

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalNodes(FakeMultiNodeProvider):
    """Ray's fake nodes share one folder, as no two machines do: each new one deletes a job's working directory there
    and unpacks it anew, under the feet of the tasks at work on the others (Ray 2.60, `download_and_unpack_package`)."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            name = f"runtime_resources_{self._next_node_id + 1}"
            with mock.patch.object(ray_constants, "DEFAULT_RUNTIME_ENV_DIR_NAME", name):
                super()._create_node_with_resources_and_labels(*arguments)
