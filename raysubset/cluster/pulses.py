"""Pulses of processes that answer no calls, by Ray's control store: published there each second, heard by the driver.

with published(key): ...  # where the work is done
for process in heard(key): watch.hear(process.pulse, process.pid)  # where it is watched
"""

import json
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from os import getpid, kill
from pathlib import Path
from signal import SIGKILL
from typing import Any

import ray
from ray.exceptions import RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysubset.cluster.private_ray import internal_kv
from raysubset.cluster.resources import own_address
from raysubset.events import Note, OnEvent, Retry
from raysubset.pulse import Pulse, Watch, begin, pulse

_EVERY_S = 1.0
_NAMESPACE = "raysubset.pulses"
_KILL_S = 10.0  # for a node to end a process


@dataclass(frozen=True)
class Process:
    """What a process at work last published."""

    pulse: Pulse
    node: str  # its address, as ledgers name nodes
    node_id: str
    pid: int
    group: str  # id of its placement group, "" without one


@contextmanager
def published(key: str) -> Iterator[None]:
    """Publish this process's pulse under the key while the block runs. If the process dies, its last pulse stays."""
    context, group = ray.get_runtime_context(), ray.util.get_current_placement_group()
    place = (own_address(), context.get_node_id(), getpid(), group.id.hex() if group else "")
    done = threading.Event()
    begin()

    def publish() -> None:
        is_last = False
        while not is_last:
            record = json.dumps(asdict(Process(pulse(), *place)))
            with suppress(RpcError):  # the control store may answer the next time
                internal_kv._internal_kv_put(key, record, overwrite=True, namespace=_NAMESPACE)
            is_last = done.wait(_EVERY_S)

    thread = threading.Thread(target=publish, daemon=True, name="raysubset-pulse")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        forget(key)


def heard(prefix: str) -> dict[str, Process]:
    """What is published under keys that begin so, by what follows it in them."""
    processes = {}
    for key in sorted(internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)):
        if record := internal_kv._internal_kv_get(key, namespace=_NAMESPACE):
            values = json.loads(record)
            name = key.decode().removeprefix(prefix)
            processes[name] = Process(Pulse(**values.pop("pulse")), **values)
    return processes


def forget(prefix: str) -> None:
    """Delete what is published under keys that begin so."""
    internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)


class Lookout:
    """Watches the tasks that publish under a prefix; kills those that stand still, which Ray or the caller tries again.

    The name that follows the prefix in a task's key is what is told.
    """

    def __init__(self, *, stall_s: float, tell: OnEvent) -> None:
        self.prefix = f"{uuid.uuid4().hex}/"
        self._stall_s, self._tell = stall_s, tell
        self._watches: dict[str, Watch] = {}

    def look(self) -> None:
        """Hear all that have begun."""
        for name, process in heard(self.prefix).items():
            watch = self._watches.setdefault(name, Watch(self._stall_s))
            watch.hear(process.pulse, process.pid)
            text = f"{name} on node {process.node} stands still: {watch.in_words()}"
            match watch.look():
                case "stalled":
                    more = f"it is killed in {watch.limit_s:.0f} s unless it makes one (--actors.stall-s)"
                    self._tell(Note(f"{text}; {more}", is_warning=True))
                case "lost":
                    self._tell(Retry(f"{text}; it was killed (actors.stall_s)"))
                    kill_processes([process])
                    forget(self.prefix + name)
                    del self._watches[name]


def kill_processes(processes: Sequence[Process]) -> None:
    """Send SIGKILL, by a task on each process's node: Ray asks a process to end itself, which a stopped one cannot."""
    tasks = []
    for process in processes:
        place: Any = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(_kill)
        tasks.append(task.remote(process.pid))
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=_KILL_S)


def _kill(pid: int) -> None:
    """End a process of Ray's on this node, unless the id is another's by now."""
    try:
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::"):
            kill(pid, SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass
