"""Pulses of processes that answer no calls: published each second in Ray's control store, and read by the driver.

with published(key, minimizer.reports): ...  # in the process that works
for process in processes_at(key).values(): watch.hear(process.pulse, process.pid)  # in the process that watches
request_stop(key)  # likewise: the process that works calls what it gave as on_stop
"""

import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from os import getpid, kill
from pathlib import Path
from signal import SIGKILL
from typing import Any

import ray
from ray.exceptions import RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysubset.cluster.private_ray import internal_kv
from raysubset.cluster.resources import own_address
from raysubset.pulse import Pulse, begin, pulse

_EVERY_S = 1.0
_NAMESPACE, _STOPS = "raysubset.pulses", "raysubset.stops"
_PREEMPTED, _INTERRUPTED = b"preempted", b"interrupted"
_KILL_S = 10.0  # seconds for a node to end a process


@dataclass(frozen=True)
class Process:
    """A working process, and the pulse and reports that it last published."""

    pulse: Pulse
    reports: Mapping[int, Any]  # work.Report by place in the pack; work takes too long to import here
    node: str  # its address, by which ledgers name nodes
    node_id: str
    pid: int
    group: str  # id of its placement group; "" without one


@contextmanager
def published(
    key: str, reports: Callable[[], Mapping[int, Any]], on_stop: Callable[..., None] | None = None
) -> Iterator[None]:
    """Publish this process's pulse and reports under the key for the length of the block.

    A thread calls on_stop(preempted=…) within a second after request_stop(key). If the process dies, what it published
    stays.
    """
    context, group = ray.get_runtime_context(), ray.util.get_current_placement_group()
    place = (own_address(), context.get_node_id(), getpid(), group.id.hex() if group else "")
    stop = threading.Event()
    begin()

    def publish() -> None:
        is_last = False
        while not is_last:
            record = pickle.dumps(Process(pulse(), reports(), *place))
            with suppress(RpcError):  # the control store may answer the next time
                internal_kv._internal_kv_put(key, record, overwrite=True, namespace=_NAMESPACE)
                if on_stop and (request := internal_kv._internal_kv_get(key, namespace=_STOPS)):
                    on_stop(preempted=request == _PREEMPTED)
            is_last = stop.wait(_EVERY_S)

    thread = threading.Thread(target=publish, daemon=True, name="raysubset-pulse")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        forget(key)


def processes_at(prefix: str) -> dict[str, Process]:
    """Return the processes that publish under keys with this prefix, by the rest of their keys."""
    keys = sorted(internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE))
    records = {key: internal_kv._internal_kv_get(key, namespace=_NAMESPACE) for key in keys}
    return {key.decode().removeprefix(prefix): pickle.loads(record) for key, record in records.items() if record}


def request_stop(key: str, *, timeout_s: float, preempted: bool = False) -> None:
    """Ask the process that publishes under the key, if any, to stop, and wait until it has left its block.

    If the control store does not answer, nobody is asked.

    Args:
        preempted: it stops because its node will go, and not because the driver does.
    """
    until = time.monotonic() + timeout_s
    with suppress(RpcError):
        internal_kv._internal_kv_put(key, _PREEMPTED if preempted else _INTERRUPTED, namespace=_STOPS)
        try:
            while internal_kv._internal_kv_exists(key, namespace=_NAMESPACE) and time.monotonic() < until:
                time.sleep(0.05)
        finally:  # also if a second Ctrl-C cuts the wait short
            internal_kv._internal_kv_del(key, namespace=_STOPS)


def forget(prefix: str) -> None:
    """Delete everything that is published under keys with this prefix."""
    internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)


def kill_processes(processes: Iterable[tuple[str, int]]) -> None:
    """Send SIGKILL, by a task on each process's node: Ray asks a process to exit, which a stopped process cannot do.

    Args:
        processes: their nodes' ids, and their own.
    """
    task: Any = ray.remote(num_cpus=0, max_retries=0)(_kill)
    on = partial(NodeAffinitySchedulingStrategy, soft=False)
    tasks = [task.options(scheduling_strategy=on(node_id)).remote(pid) for node_id, pid in processes]
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=_KILL_S)


def _kill(pid: int) -> None:
    """Kill a process of Ray's on this node, unless another process has the id by now."""
    with suppress(FileNotFoundError, ProcessLookupError):
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::"):
            kill(pid, SIGKILL)
