"""Ray's own workers, forked from a warm process: each is up in a tenth of a second, where imports take 5 s of a CPU.

with warm_process(): OwnNode, with PATHS among its RayParams

A raylet runs tests/worker.py in the place of Ray's own. That asks the warm process for a fork which goes on as Ray's
default_worker.py, with the arguments, environment, folder and output that the raylet gave. All else is Ray's own:
raylets, the control store, what a worker does, how it is placed, signalled and how it dies. tests/cluster/test_cli.py
and test_jobs.py have workers as a user's cluster starts them.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.worker import WARM_PROCESS

ROOT = Path(__file__).parents[1]
PATHS = dict.fromkeys(("worker_path", "setup_worker_path"), str(Path(__file__).with_name("worker.py")))


@contextlib.contextmanager
def warm_process() -> Iterator[None]:
    """Have the nodes that are started in the block with PATHS take their workers from a process, once that is warm."""
    folder = tempfile.mkdtemp(prefix="rs")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path := os.path.join(folder, "socket"))
        listener.listen(100)
        command, fd = [sys.executable, "-m", "tests.forked_workers"], listener.fileno()
        process = subprocess.Popen([*command, str(fd)], cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[fd])
    os.environ[WARM_PROCESS] = path
    try:
        yield
    finally:
        del os.environ[WARM_PROCESS]
        process.communicate()  # it ends with its stdin
        shutil.rmtree(folder)


def serve(listener: socket.socket) -> list[str]:
    """Fork for all that ask, until stdin is closed; return in each fork, with the arguments of Ray's worker."""
    gc.freeze()
    gc.set_threshold(50_000)  # a tenth of what a fork takes to import Ray
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            sys.exit()
        connection, _ = listener.accept()
        with connection:
            _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
            words = b""
            while part := connection.recv(2**16):
                words += part
            if os.fork() == 0:
                connection.detach()  # stays open as long as this process lives
                break
        for output in outputs:
            os.close(output)
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
        os.dup2(file, number)
        os.close(file)
    arguments, environment, folder = json.loads(words)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return [argument for argument in arguments if argument not in PATHS.values()]


def as_ray_sets_it_up(arguments: list[str]) -> list[str]:
    """Take a worker's runtime environment on, as Ray's setup_worker.py does; return default_worker.py's arguments."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    option = "--serialized-runtime-env-context="
    for serialized in (argument.removeprefix(option) for argument in arguments if argument.startswith(option)):
        context = RuntimeEnvContext.deserialize(serialized)
        assert not context.command_prefix, context.command_prefix
        update_envs(context.env_vars)
    return [argument for argument in arguments if not argument.startswith((option, "--language="))]


if __name__ == "__main__":
    # Not Ray, which as it is imported reads a worker's environment and seeds its random IDs: forks' would be the same.
    # But what Ray imports of others
    import click
    import colorful
    import filelock
    import fsspec
    import google.protobuf.descriptor_pb2
    import grpc.aio
    import jsonschema
    import msgpack
    import packaging.version
    import pandas
    import psutil
    import pyarrow.dataset
    import pydantic.types
    import requests
    import rich.table
    import torch
    import yaml

    import raysubset.work

    del click, colorful, filelock, fsspec, google, grpc, jsonschema, msgpack, packaging, pandas, psutil, pyarrow
    del pydantic, raysubset, requests, rich, torch, yaml
    assert "ray" not in sys.modules
    arguments = as_ray_sets_it_up(serve(socket.socket(fileno=int(sys.argv[1]))))
    import ray._private.workers

    sys.argv = [os.path.join(ray._private.workers.__path__[0], "default_worker.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
