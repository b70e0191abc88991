"""Connecting to Ray: to a cluster that is up, or to a new one on this machine."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from raysubset.cluster.authentication import use_own_token, use_token_of
from raysubset.config import ClusterConfig
from raysubset.errors import first_line
from raysubset.events import OnEvent, Waiting
from raysubset.uris import shown

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0  # for something to listen at a cluster's address
LOOK_S = 2.0  # between two looks at the head
RAYLET_S = 3.0  # that the raylet of the driver's node may not answer: another one would be another node
OWN_HEAD_S, HEAD_S = 5.0, 45.0  # a head of ours does not come back; another's may be started again, within Ray's minute


@contextlib.contextmanager
def connected(config: ClusterConfig, tell: OnEvent = lambda event: None) -> Iterator[None]:
    """Be connected to Ray: to the address, the cluster this job was submitted to, or a new one on this machine.

    A connection that exists is used and left open. A new local cluster ends with the block, and with this process.

    Raises:
        ValueError: if nothing answers at the address, it asks for a token that this process does not have, or this
            process is connected to another one.
    """
    with reached(config):
        if ray.is_initialized():
            yield
            return
        tell(Waiting("Ray starts on this machine"))
        use_own_token()
        with _connection(address="local", num_cpus=config.num_cpus, num_gpus=config.num_gpus, include_dashboard=False):
            yield


@contextlib.contextmanager
def reached(config: ClusterConfig, tell: OnEvent = lambda event: None) -> Iterator[None]:
    """Be connected to a cluster that is up, as connected(); where a new one would be started, do nothing yet.

    A wrong address is a mistake that is told before anything is written.
    """
    if ray.is_initialized():
        _refuse_other_cluster(config.address)
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        yield
        return
    tell(Waiting(f"connecting to Ray at {shown(address).rpartition('@')[2]}"))
    with contextlib.ExitStack() as stack:
        try:
            _knock(address)
            if gcs_address := _gcs_address(address):
                use_token_of(gcs_address)
            stack.enter_context(_connection(address=address))
        except ConnectionError as error:
            raise _no_answer(address, error, given=config.address is not None) from error
        yield


@contextlib.contextmanager
def _connection(**options: Any) -> Iterator[None]:
    """What ray.init() gives, as long as the block. If the head is lost meanwhile the process ends: see Head.watch()."""
    started, done = time.perf_counter(), threading.Event()
    try:
        _init(log_to_driver=False, logging_level="warning", **options)
        log.info("connected to Ray in %.1f s", time.perf_counter() - started)
        if "://" not in options["address"]:
            context, limit_s = ray.get_runtime_context(), OWN_HEAD_S if options["address"] == "local" else HEAD_S
            head = Head(context.gcs_address, _raylet_address(context.get_node_id()), limit_s)
            threading.Thread(target=head.watch, args=(done,), daemon=True, name="raysubset-head").start()
        yield
    finally:
        done.set()
        ray.shutdown()


def _init(**options: Any) -> None:
    """ray.init() that leaves the caller's handler of SIGTERM: by Ray's own, a stopped job just ends, with a stack.

    Raises:
        KeyboardInterrupt: if Ray's handler got the signal.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@dataclass(frozen=True)
class Head:
    """The cluster's head as the driver sees it. Ray would end a driver without one after a minute, with a stack."""

    address: str  # of its control store
    raylet_address: str  # of the driver's node
    limit_s: float  # that the head may be away

    def watch(self, done: threading.Event) -> None:
        """Look until done is set. If the head or this process's raylet is lost, say so and end the process, with 1."""
        lost_at: dict[str, float] = {}
        while not done.wait(LOOK_S):
            text = ""
            for what, address, limit_s in (
                ("the head", self.address, self.limit_s),
                ("the raylet of this node", self.raylet_address, RAYLET_S),
            ):
                try:
                    _knock(address)
                    lost_at.pop(what, None)
                except ConnectionError as error:
                    now = time.monotonic()
                    if now - lost_at.setdefault(what, now) >= limit_s:
                        text = f"{what} at {address} does not answer ({error})"
            if text and not done.is_set():
                log.critical("the Ray cluster is lost: %s. What was done is kept, the same command resumes", text)
                os._exit(1)  # whatever waits for Ray would wait on


def _raylet_address(node_id: str) -> str:
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _refuse_other_cluster(address: str | None) -> None:
    """ValueError where the connection this process has is not one to host:port."""
    if not address or "://" in address or ":" not in address:  # a client's proxy has another port; "auto", "local"
        return
    try:
        _knock(address)
    except ConnectionError as error:
        raise _no_answer(address, error) from error
    connected_to = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    if f"{socket.gethostbyname(host)}:{port}" != connected_to and address != connected_to:
        raise ValueError(
            f"cluster.address = {address}, but this process is connected to Ray at {connected_to}: call "
            "ray.shutdown() first, or leave the address out"
        )


def _no_answer(address: str, error: ConnectionError, *, given: bool = True) -> ValueError:
    source = "" if given else ", which RAY_ADDRESS in the environment names"
    out = "leave cluster.address out" if given else "unset RAY_ADDRESS"
    address = shown(address).rpartition("@")[2]  # of RAY_ADDRESS, which nothing has checked
    return ValueError(
        f"no Ray cluster answers at {address}{source} ({first_line(error)}). Is it up, and is that the head's host and "
        f"`ray start --port` (6379 by default), not its dashboard's? For a new one on this machine {out}"
    )


def _gcs_address(address: str) -> str | None:
    """host:port of what "auto" or the address means; None for a client's proxy (ray://), and where nothing is found."""
    from raysubset.cluster.private_ray import canonicalize_bootstrap_address

    try:
        return None if "://" in address else canonicalize_bootstrap_address(address)
    except ValueError as error:  # a word that is no address
        raise ConnectionError(str(error)) from error


def _knock(address: str) -> None:
    """ConnectionError where nothing listens at host:port: ray.init() would go on trying for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):  # "auto", "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # a port above 65535; a host that can be no name
        raise ConnectionError(str(error)) from error
