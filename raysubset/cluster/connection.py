"""Connections to Ray: to a running cluster, or to a new one on this machine."""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from raysubset.cluster.authentication import use_own_token, use_token_of
from raysubset.cluster.own_node import OwnNode
from raysubset.config import ClusterConfig
from raysubset.errors import first_line
from raysubset.events import OnEvent, Waiting
from raysubset.uris import shown

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0  # for something to listen at a cluster's address
LOOK_S = 2.0  # between two looks at the head
RAYLET_S = 3.0  # for which the raylet of the driver's node may be away: a new raylet would be a new node
OWN_HEAD_S, HEAD_S = 5.0, 45.0  # our own head does not come back; another may be restarted, within Ray's minute


@contextlib.contextmanager
def connected(config: ClusterConfig, tell: OnEvent = lambda event: None) -> Iterator[None]:
    """Connect to Ray: to the address, the cluster that this job was submitted to, or a new one on this machine.

    An existing connection is used and stays open. A new local cluster ends with the block, and with this process. If
    several threads are connected at once, the last one's block ends it.

    Raises:
        ValueError: if nothing answers at the address, it asks for a token that this process does not have, or this
            process is connected to another cluster.
    """
    global _num_users
    address = _address(config)
    with _lock:
        if not ray.is_initialized():
            _opened.enter_context(_reached(config, address, tell) if address else _new_cluster(config, tell))
        _num_users += 1
    try:
        _refuse_other_cluster(config.address)
        yield
    finally:
        with _lock:
            _num_users -= 1
            if not _num_users:
                _opened.close()


_lock = threading.RLock()  # of what follows; reentrant, as a listener that is told may call anything
_opened = contextlib.ExitStack()  # the connection of this process that its commands opened, if they did
_num_users = 0  # blocks, of any thread, that need this process's connection


def reached(config: ClusterConfig, tell: OnEvent = lambda event: None) -> contextlib.AbstractContextManager[None]:
    """Return connected(), but a context that does nothing yet if a new cluster would be started.

    So a wrong address is reported before anything is written.
    """
    return connected(config, tell) if _address(config) or ray.is_initialized() else contextlib.nullcontext()


@contextlib.contextmanager
def _new_cluster(config: ClusterConfig, tell: OnEvent) -> Iterator[None]:
    """Connect to a cluster of one node that ends with the block."""
    tell(Waiting("Ray starts on this machine"))
    with started_ahead(config):
        node = _nodes_ahead.pop(config)
        try:
            with _connection(node.address(), head_s=OWN_HEAD_S):
                yield
        finally:
            node.close()


_nodes_ahead = dict[ClusterConfig, OwnNode]()


@contextlib.contextmanager
def started_ahead(config: ClusterConfig) -> Iterator[None]:
    """Have Ray's processes come up in the background where connected() will start a cluster, and do nothing elsewhere.

    What comes before connected(), imports and the plan, takes as long as they do. They end with the block at the
    latest, at once if they are not up yet, and with this process.
    """
    if config in _nodes_ahead or ray.is_initialized() or _address(config):
        yield
        return
    use_own_token()
    with OwnNode(num_cpus=config.num_cpus, num_gpus=config.num_gpus) as node:
        _nodes_ahead[config] = node
        try:
            yield
        finally:
            _nodes_ahead.pop(config, None)


@contextlib.contextmanager
def _reached(config: ClusterConfig, address: str, tell: OnEvent) -> Iterator[None]:
    """Connect to the cluster at the address for the length of the block."""
    shown_address = shown(address).rpartition("@")[2]  # RAY_ADDRESS is not checked, and may hold a secret
    tell(Waiting(f"connecting to Ray at {shown_address}"))
    with contextlib.ExitStack() as stack:
        try:
            _knock(address)
            if gcs_address := _gcs_address(address):
                use_token_of(gcs_address)
            stack.enter_context(_connection(address, head_s=HEAD_S))
        except ConnectionError as error:
            origin = "cluster.address" if config.address else "RAY_ADDRESS in the environment"
            raise ValueError(
                f"no Ray cluster answers at {shown_address}, which {origin} names ({first_line(error)}). Is it up, and "
                "is that the head's host and `ray start --port` (6379 by default), not its dashboard's? Without "
                f"{origin} a new one starts on this machine"
            ) from error
        yield


def _address(config: ClusterConfig) -> str | None:
    """Of the cluster to connect to; None where a new one is to be started."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


@contextlib.contextmanager
def _connection(address: str, *, head_s: float) -> Iterator[None]:
    """Keep a connection of ray.init() for the length of the block. A head that is lost for head_s ends the process: see
    watch_head(). SIGTERM's default ends the process without leaving blocks; Ray's handler, which leaves them, stands in
    for it until the block ends."""
    from raysubset.cluster.private_ray import worker

    start_s, stop = time.perf_counter(), threading.Event()
    handler, as_ray_does = signal.getsignal(signal.SIGTERM), worker.print_to_stdstream
    try:
        worker.print_to_stdstream = log_in_a_line
        _init(address)
        log.info("connected to Ray in %.1f s", time.perf_counter() - start_s)
        if "://" not in address:
            context = ray.get_runtime_context()
            node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
            raylet_address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
            watched = context.gcs_address, raylet_address, head_s, stop
            threading.Thread(target=watch_head, args=watched, daemon=True, name="raysubset-head").start()
        yield
    finally:
        stop.set()
        ray.shutdown()
        worker.print_to_stdstream = as_ray_does
        if handler is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _init(address: str) -> None:
    """Call ray.init() but keep the caller's handler of SIGTERM: with Ray's own, a stopped job just ends, with a stack.

    Raises:
        KeyboardInterrupt: if Ray's handler got the signal.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")  # pyright: ignore[reportArgumentType]
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        if handler not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def log_in_a_line(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Log the first sentence of what Ray tells all drivers, such as that a node died.

    Ray would print the whole to stdout: numbers of processes, guesses, and 20 lines of a raylet's log.

    Args:
        data: its messages are "lines".
        ignore_prefix: passed by Ray, and not needed.
    """
    for message in data["lines"]:
        log.warning("Ray: %s", re.split(r"\.\s", message.strip())[0])


def watch_head(address: str, raylet_address: str, limit_s: float, stop: threading.Event) -> None:
    """Look until `stop` is set. If the head or this node's raylet is lost, log it and exit the process with 1.

    Without a head, Ray ends the driver after a minute, with a stack.

    Args:
        address: of the head's control store.
        raylet_address: of the driver's node.
        limit_s: for which the head may be away.
    """
    watched = {f"the head at {address}": limit_s, f"the raylet of this node at {raylet_address}": RAYLET_S}
    lost_at = dict[str, float]()
    while not stop.wait(LOOK_S):
        for process, most_s in watched.items():
            try:
                _knock(process.rpartition(" ")[2])
                lost_at.pop(process, None)
            except ConnectionError as error:
                now = time.monotonic()
                if now - lost_at.setdefault(process, now) >= most_s and not stop.is_set():
                    text = f"{process} does not answer ({error})"
                    log.critical("the Ray cluster is lost: %s. Finished work is kept, the same command resumes", text)
                    os._exit(1)  # threads that wait for Ray would wait on


def _refuse_other_cluster(address: str | None) -> None:
    """Raise a ValueError if this process is connected to another cluster than the one at host:port."""
    if not address or "://" in address or ":" not in address:  # "auto", "local", or a client's proxy on another port
        return
    connected_to = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):  # of a host without a name
        host = socket.gethostbyname(host)
    if f"{host}:{port}" != connected_to and address != connected_to:
        raise ValueError(
            f"cluster.address = {address}, but this process is connected to Ray at {connected_to}: call "
            "ray.shutdown() first, or leave the address out"
        )


def _gcs_address(address: str) -> str | None:
    """Return the host:port of "auto" or an address; None for a client's proxy (ray://), or if nothing is found."""
    from raysubset.cluster.private_ray import canonicalize_bootstrap_address

    try:
        return None if "://" in address else canonicalize_bootstrap_address(address)
    except ValueError as error:  # a word that is no address
        raise ConnectionError(str(error)) from error


def _knock(address: str) -> None:
    """Raise a ConnectionError if nothing listens at host:port, as ray.init() would try for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):  # "auto", "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # also a port above 65535, or an impossible host name
        raise ConnectionError(str(error)) from error
