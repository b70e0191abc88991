"""The process group of a Ray Train job: who can reach its store."""

import psutil
import ray
import torch
import torch.distributed as dist

from raysubset.fine_tuning.process_group import _join, _listen


def test_the_store_listens_on_the_nodes_own_address_only() -> None:
    host, port = _listen()
    try:
        _join(host, port, 0, 1, "gloo", 30)
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0, 1.0]
        sockets = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert (host, port) in sockets
        assert {address.ip for address in sockets} <= {ray.util.get_node_ip_address(), "127.0.0.1", "127.0.1.1", "::1"}
    finally:
        dist.destroy_process_group()
