"""A Ray of one node whose actors are processes forked from a warm one: what the pool and run() ask of Ray, without the
seconds that each of Ray's own actors takes to start. Tests of Ray itself, of Ray Train, Tune and Data are in cluster/.

Actors die of real signals and leave real files. They are raysubset's own SubsetActors.
"""

# pyright: reportPrivateImportUsage=false

import itertools
import multiprocessing
import os
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing import connection
from signal import SIGKILL
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray._private import auto_init_hook
from ray.exceptions import ActorDiedError, RayTaskError

from raysubset.cluster import connection as connecting
from raysubset.cluster import resources, tasks
from raysubset.subset_actors import crew, pool

NODE = "the-node"
WARM = ["tests.warm"]  # imported once, before any actor is forked
_THREADS = 2  # as SubsetActor's max_concurrency


class Ref:
    """A value, or what an actor's method gives once it is there. Pickled, it is its value."""

    def __init__(self, value: Any = None, id: str = "", *, is_there: bool = True) -> None:
        self.value, self.is_there, self.id = value, is_there, id or uuid.uuid4().hex

    def hex(self) -> str:
        return self.id

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.is_there
        return Ref, (self.value, self.id)


def _get(refs: Any) -> Any:
    if isinstance(refs, list):
        return [_get(ref) for ref in refs]
    if isinstance(refs.value, RayTaskError):
        raise refs.value.as_instanceof_cause()
    if isinstance(refs.value, ActorDiedError):
        raise refs.value
    return refs.value


class Actor:
    """A process, once it has a place; each of its methods has a remote()."""

    def __init__(self, processes: "Processes", build: Callable[[], Any], num_cpus: float) -> None:
        self.processes, self.num_cpus, self.build = processes, num_cpus, build
        self.refs: dict[int, Ref] = {}  # by the call's number
        self.calls: list[bytes] = []  # made before it had a place
        self.process: Any = None
        self.pipe: Any = None
        self.is_dead = False
        self._numbers = itertools.count()

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any, **options: Any) -> Ref:
            ref, number = Ref(is_there=False), next(self._numbers)
            if self.is_dead:
                ref.value, ref.is_there = ActorDiedError(), True
                return ref
            self.refs[number] = ref
            self._send(cloudpickle.dumps((number, method, arguments, options)))
            return ref

        if method.startswith("__"):
            raise AttributeError(method)
        return SimpleNamespace(remote=remote)

    def _send(self, call: bytes) -> None:
        if self.pipe is None:
            self.calls.append(call)
            return
        with suppress(BrokenPipeError):  # hear() notices
            self.pipe.send_bytes(call)

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(WARM)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, cloudpickle.dumps(self.build)), daemon=True)
        self.process.start()
        theirs.close()
        for call in self.calls:
            self._send(call)

    def hear(self) -> None:
        """Take in what has come."""
        try:
            while self.pipe.poll():
                number, value = cloudpickle.loads(self.pipe.recv_bytes())
                ref = self.refs.pop(number)
                ref.value, ref.is_there = value, True
        except (EOFError, ConnectionResetError):
            self.end()

    def end(self) -> None:
        """Kill it; what it was asked and has not answered fails."""
        self.is_dead = True
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        for ref in self.refs.values():
            ref.value, ref.is_there = ActorDiedError(), True
        self.refs.clear()
        self.processes.actors.remove(self)
        self.processes.start_those_that_fit()


class Processes:
    """Stands in the place of the module ray."""

    util = ray.util

    def __init__(self, num_cpus: float) -> None:
        self.num_cpus = num_cpus
        self.actors: list[Actor] = []  # that live, or wait for a place
        self.num_started = 0

    def remote(self, num_cpus: float = 1, **options: Any) -> Callable[[type], Any]:
        def of(kind: type) -> Any:
            def start(*arguments: Any) -> Actor:
                self.actors.append(actor := Actor(self, lambda: kind(*arguments), num_cpus))
                self.start_those_that_fit()
                return actor

            return SimpleNamespace(options=lambda **more: SimpleNamespace(remote=start), remote=start)

        return of

    def start_those_that_fit(self) -> None:
        free = self.num_cpus - sum(actor.num_cpus for actor in self.actors if actor.process is not None)
        for actor in self.actors:
            if actor.process is None and actor.num_cpus <= free:
                free -= actor.num_cpus
                self.num_started += 1
                actor.start()

    def put(self, value: Any) -> Ref:
        return Ref(value)

    def get(self, ref: Any) -> Any:
        self.wait([ref], num_returns=1)
        return _get(ref)

    def wait(
        self, refs: Sequence[Ref], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Ref], list[Ref]]:
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            for actor in [actor for actor in self.actors if actor.process is not None]:
                actor.hear()
            ready = [ref for ref in refs if ref.is_there][:num_returns]
            left_s = None if until is None else until - time.monotonic()
            if len(ready) >= num_returns or (left_s is not None and left_s <= 0):
                return ready, [ref for ref in refs if ref not in ready]
            connection.wait([actor.pipe for actor in self.actors if actor.process is not None], left_s)

    def pids(self) -> list[int]:
        """Of the actors that are up."""
        return [actor.process.pid for actor in self.actors if actor.process is not None]

    def kill(self, actor: Actor) -> None:
        if not actor.is_dead:
            actor.end()

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: NODE)

    def nodes(self) -> list[dict[str, Any]]:
        resources = {"CPU": float(self.num_cpus), "object_store_memory": 3e8}
        address = ray.util.get_node_ip_address()
        return [{"NodeID": NODE, "Alive": True, "NodeManagerAddress": address, "Resources": resources, "Labels": {}}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.num_cpus)}

    def available_resources(self) -> dict[str, float]:
        taken = sum(actor.num_cpus for actor in self.actors if actor.process is not None)
        return {"CPU": self.num_cpus - taken}


def install(monkeypatch: pytest.MonkeyPatch, num_cpus: float = 4) -> Processes:
    """Have raysubset meet processes of so many CPUs in the place of Ray, which is looked at without a pause."""
    from raysubset.fine_tuning import worker

    processes = Processes(num_cpus)
    for module in (connecting, resources, tasks, crew, pool):
        monkeypatch.setattr(module, "ray", processes)
    monkeypatch.setattr(worker, "published", lambda *_: nullcontext())
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", False)  # else Ray starts where one of its calls is left
    monkeypatch.setattr(resources, "_published_groups", list)
    monkeypatch.setattr(resources, "_autoscaling_state", lambda: _NO_AUTOSCALER)
    monkeypatch.setattr(pool, "draining_nodes", set)
    monkeypatch.setattr(pool, "kill_processes", lambda places: [os.kill(pid, SIGKILL) for _, pid in places])
    monkeypatch.setattr(pool, "POLL_S", 0.05)
    monkeypatch.setattr(pool, "WAIT_S", 0.05)
    monkeypatch.setattr(pool, "STOP_GRACE_S", 120.0)  # a step may take as long on a busy machine
    monkeypatch.setattr(crew, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(crew, "START_S", 0.0)  # as actors are forked
    return processes


_NO_AUTOSCALER = SimpleNamespace(
    autoscaler_state_version=0, pending_instance_requests=(), pending_instances=(), failed_instance_requests=()
)


def _serve(pipe: Any, build: bytes) -> None:
    """An actor's process."""
    from raysubset.subset_actors import actor as actor_module

    here = SimpleNamespace(
        get=_get,
        put=Ref,
        util=ray.util,
        is_initialized=lambda: True,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: NODE),
    )
    for module in (actor_module, tasks, resources):
        module.ray = here  # type: ignore[attr-defined]
    serve(cloudpickle.loads(build)(), pipe, lambda: os._exit(0))


def serve(actor: Any, pipe: Any, at_end: Callable[[], None]) -> None:
    """Answer the calls that come through the pipe, until the driver is gone."""
    lock = Lock()

    def answer(number: int, method: str, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        try:
            result = getattr(actor, method)(*arguments, **options)
        except Exception as error:
            result = RayTaskError(method, traceback.format_exc(), error)
        with lock:
            pipe.send_bytes(cloudpickle.dumps((number, result)))

    with ThreadPoolExecutor(_THREADS) as threads:
        while True:
            try:
                call = pipe.recv_bytes()
            except (EOFError, ConnectionResetError):
                return at_end()
            threads.submit(answer, *cloudpickle.loads(call))
