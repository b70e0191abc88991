"""The cluster of one node that this package starts where there is none.

with OwnNode(num_cpus=2) as node:  # at once: Ray's processes come up while the caller imports and plans
    ray.init(address=node.address())  # waits for them

Ray's processes are started and ended by a process of their own, the keeper. Forking and Ray's handlers of signals stay
out of a driver that imports torch meanwhile, and Ctrl-C of a terminal reaches the driver alone.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

_TOO_SLOW = "timed out during startup"  # Ray's words where its agent took over 15 s: its files were not cached yet
END_S = 20.0  # that Ray's processes have to end, as ray.shutdown() gives them
_ROOT = str(Path(__file__).parents[2])  # where the keeper imports this package from, wherever the driver has it from
_KEEPER = f"import sys; sys.path.insert(0, {_ROOT!r}); from raysubset.cluster.own_node import keep; keep()"


class OwnNode:
    """Ray's processes on this machine, from now to the end of the block. If this process dies they end as well."""

    def __init__(self, **params: Any) -> None:
        """Give RayParams as JSON has them; CPUs and GPUs are by default the machine's. The environment, with Ray's
        token, is this process's as it is now."""
        self._params = json.dumps(params)
        self._environment = dict(os.environ)
        self._address = ""
        self._start()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # the keeper's, as long as it lives
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", "-c", _KEEPER, self._params],  # -P: no module of the working directory's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            env=self._environment,
        )

    def address(self) -> str:
        """Return host:port of its control store, once the node is up. A start that was too slow is tried once more.

        Raises:
            RuntimeError: if it did not come up; with Ray's last word.
        """
        error = "" if self._address else self._wait()
        if _TOO_SLOW in error:
            self.end()
            self._start()
            error = self._wait()
        if error:
            raise RuntimeError(f"Ray does not start on this machine: {error}")
        return self._address

    def _wait(self) -> str:
        """Wait for the keeper's address, and return the last line of its errors if it has none."""
        assert self._keeper.stdout is not None
        self._address = self._keeper.stdout.readline().strip()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return "" if self._address else (lines or ["it says nothing"])[-1]

    def close(self) -> None:
        """Have Ray's processes end, without waiting for that."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End Ray's processes, and wait for that: at once if the node is not up yet."""
        self.close()
        try:
            self._keeper.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()


def keep() -> None:
    """The keeper: start a node, write its address to stdout, and end it when stdin is closed.

    Left out is what ray.init() starts beside and no run asks for, 6 of the 12 CPU s that Ray takes to come up and go:
    the monitors of logs and of an autoscaler, the dashboard's head and the web server of its agent, as where Ray is
    installed without them, and workers before there is work for them.
    """
    from raysubset.cluster.private_ray import Node, RayParams, utils

    is_up, is_closed = threading.Event(), threading.Event()

    def watch() -> None:
        sys.stdin.read()
        if not is_up.is_set():
            end()
        is_closed.set()

    def end() -> None:
        os.killpg(0, signal.SIGKILL)  # this one too: agents would outlive their raylet by a minute

    class BareNode(Node):
        def start_api_server(self, **_: Any) -> None:
            """No dashboard: nobody is told of one."""

    threading.Thread(target=watch, daemon=True).start()
    utils.get_dashboard_dependency_error = lambda: ImportError("the dashboard is not asked for")
    system_config = {"prestart_worker_first_driver": False}
    bare = {"no_monitor": True, "include_log_monitor": False, "_system_config": system_config}
    params = RayParams(**json.loads(sys.argv[1]), **bare)
    node = BareNode(params, head=True, shutdown_at_exit=False, spawn_reaper=True)
    is_up.set()
    sys.stdout.write(f"{node.gcs_address}\n")
    sys.stdout.flush()
    is_closed.wait()
    node.destroy_external_storage()
    node.kill_all_processes(check_alive=False, allow_graceful=True)
    end()
