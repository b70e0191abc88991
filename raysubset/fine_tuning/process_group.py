"""PrivateTorchConfig: the torch process group of a Ray Train job, with a store open to its node's address only."""

import logging
import socket
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig

from raysubset.cluster.private_ray import TorchBackend, set_torch_distributed_env_vars

logger = logging.getLogger(__name__)
_listening: list[socket.socket] = []  # of the first worker, between _listen() and _join()


class PrivateTorchConfig(TorchConfig):
    """A TorchConfig whose TCPStore listens on the first worker's node address alone.

    The store asks nobody for a token. torch's own listens on every interface, because it gets no socket.
    """

    @property
    def backend_cls(self) -> type:
        return _PrivateTorchBackend


class _PrivateTorchBackend(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        host, port = worker_group.execute_single(0, _listen)
        worker_group.execute(set_torch_distributed_env_vars)
        size, backend, timeout_s = len(worker_group), backend_config.backend, backend_config.timeout_s
        joining = (
            worker_group.execute_single_async(rank, _join, host, port, rank, size, backend, timeout_s)
            for rank in range(size)
        )
        ray.get(list(joining))


def _listen() -> tuple[str, int]:
    """Open a port that the system chooses, and return the address at which this process waits for the others."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError as error:  # behind address translation, a node's public address is not its own
        logger.warning("TCPStore listens on every interface: %s is no address of this node (%s)", host, error)
        server = socket.create_server(("", 0), family=family)
    _listening[:] = [server]
    return host, server.getsockname()[1]


def _join(host: str, port: int, rank: int, size: int, backend: str | None, timeout_s: float) -> None:
    """Connect with the others; the first worker serves the store on its listening socket."""
    timeout = timedelta(seconds=timeout_s)
    socket_number = _listening.pop().detach() if rank == 0 else None
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=socket_number
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
