"""Starts the cluster of local_autoscaling.yaml on this machine, and ends it and all its nodes at Ctrl-C.

    python clusters/local_autoscaling.py [--port 6379] [--dashboard-port 8265]

It prints the two lines to type in another terminal. The cluster gets a token of its own, which ends with it: Ray's
ports listen on every interface. Never end it with `ray stop`, which ends every Ray process of the machine.
"""

# ruff: noqa: T201, TID251
import argparse
import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.util  # with it comes psutil
import yaml

# isort: split
import psutil

CONFIG_PATH = Path(__file__).resolve().with_suffix(".yaml")
LOG_NAME = "ray_start.log"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0


@contextlib.contextmanager
def cluster(
    *, port: int, dashboard_port: int, work_dir: Path
) -> Iterator[tuple[subprocess.Popen[Any], dict[str, str]]]:
    """The head's process, and the environment that reaches the cluster; all its processes are ended at the end.

    Args:
        port: of the head's control store.
        dashboard_port: of the dashboard and job server, on loopback.
        work_dir: for the cluster's config, log and token; must be the caller's alone.

    Raises:
        RuntimeError: if it does not come up; the message has the end of its log.
    """
    config = yaml.safe_load(CONFIG_PATH.read_text())
    address = f"{ray.util.get_node_ip_address()}:{port}"
    config["provider"]["gcs_address"] = address
    config_path, token_path, log_path = (work_dir / name for name in ("cluster.json", "token", LOG_NAME))
    config_path.write_text(json.dumps(config))
    token = secrets.token_hex(32)
    token_path.touch(mode=0o600)
    token_path.write_text(token)
    reach = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}",  # for `ray job submit`
        "RAY_ADDRESS": address,  # for `raysubset run` and ray.init()
    }
    with log_path.open("w") as log:
        process = subprocess.Popen(
            _start_command(config_path, port, dashboard_port),
            env=_environment(config) | {key: reach[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for_dashboard(process, reach["RAY_API_SERVER_ADDRESS"], token, work_dir)
        publish = [sys.executable, str(CONFIG_PATH.with_name("publish_node_types.py")), str(config_path)]
        subprocess.run(publish, env=os.environ | reach, check=True)
        yield process, reach
    finally:
        _end(process)


def _start_command(config_path: Path, port: int, dashboard_port: int) -> list[str]:
    options = {
        "port": port,
        "num-cpus": 0,
        "num-gpus": 0,
        "object-store-memory": 200_000_000,
        "autoscaling-config": config_path,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard_port,
        "ray-client-server-port": free_port(),  # these two would else collide with another head on this machine
        "dashboard-agent-listen-port": free_port(),
    }
    flags = [f"--{key}={value}" for key, value in options.items()]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", *flags]


def _environment(config: dict[str, Any]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    return kept | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": config["provider"]["head_node_id"],
        "RAY_NODE_TYPE_NAME": config["head_node_type"],
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_prestart_worker_first_driver": "0",  # they would be of no job's runtime environment
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CONFIG_PATH.parent), os.environ.get("PYTHONPATH")])),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the head's
    }


def free_port() -> int:
    """One that nobody takes before Ray listens: its workers have 10002 to 19999, Linux for connections from 32768."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def _wait_for_dashboard(process: subprocess.Popen[Any], url: str, token: str, work_dir: Path) -> None:
    request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {token}"})
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to this machine, whatever proxies are set
    until = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < until:
        try:
            directly.open(request, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"the cluster did not come up:\n{_tail(work_dir)}")


def _tail(work_dir: Path) -> str:
    return (work_dir / LOG_NAME).read_text()[-3000:]


def _end(process: subprocess.Popen[Any]) -> None:
    """End the head and all that it started, by process id: nodes are children of its autoscaler."""
    with contextlib.suppress(psutil.NoSuchProcess):
        head = psutil.Process(process.pid)
        started = [head, *head.children(recursive=True)]
        for one in started:  # the head by itself would let them work on for these seconds
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()
        _, left = psutil.wait_procs(started, timeout=STOP_TIMEOUT_S)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--dashboard-port", type=int, default=8265)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        tempfile.TemporaryDirectory(prefix="raysubset-") as folder,
        contextlib.suppress(KeyboardInterrupt),
        cluster(port=arguments.port, dashboard_port=arguments.dashboard_port, work_dir=Path(folder)) as (head, reach),
    ):
        print("The cluster is up, with no worker yet; Ctrl-C ends it. In another terminal:\n")
        print("export", *(f"{key}={shlex.quote(value)}" for key, value in reach.items()))
        print(
            "ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/subset_pretraining.py",
            flush=True,
        )
        head.wait()
        sys.exit(f"the head has ended:\n{_tail(Path(folder))}")


if __name__ == "__main__":
    main()
