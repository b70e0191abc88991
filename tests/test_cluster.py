"""What is decided from what a cluster has, or says that it can start."""

import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from raysubset import compare, run, sweep
from raysubset.cluster import NodeType, connected, connection, num_gpus_of, own_node, reached, resources, started_ahead
from raysubset.cluster.own_node import OwnNode
from raysubset.config import ActorsConfig, ClusterConfig, Config
from raysubset.events import Event, Note
from raysubset.pipeline.decisions import refuse_what_has_no_place
from raysubset.run_directory import RunDirectory, minimum_path

CPUS, GPUS = NodeType("alive", {"CPU": 4.0}, 1, 0), NodeType("gpu.spot", {"CPU": 8.0, "GPU": 1.0}, 0, 3)


@pytest.mark.parametrize(
    ("asked", "types", "unknown", "num", "told"),
    [
        (None, [CPUS], False, 0.0, ""),
        (None, [CPUS, GPUS], False, 1.0, ""),
        (None, [CPUS, GPUS], True, 1.0, ""),
        (None, [CPUS], True, 0.0, "--actors.num-gpus=1"),
        (0.0, [CPUS], True, 0.0, ""),
        (0.5, [CPUS], True, 0.5, ""),
    ],
)
def test_actors_ask_for_gpus_where_there_may_be_some_and_the_user_hears_where_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch, asked: float | None, types: list[NodeType], unknown: bool, num: float, told: str
) -> None:
    monkeypatch.setattr(resources, "node_types", lambda: types)
    monkeypatch.setattr(resources, "_may_start_unknown_nodes", lambda: unknown)
    events: list[Event] = []
    assert num_gpus_of(ActorsConfig(num_gpus=asked), events.append) == num
    assert len(events) == bool(told)
    assert all(isinstance(event, Note) and event.is_warning and told in event.text for event in events)


def small_sweep(config: Config) -> Any:
    return sweep(config, {"subsets.size": [100]}, seeds=1)


@pytest.mark.parametrize(
    ("begin", "overrides", "told"),
    [
        (
            run,
            {"actors.num_cpus": 3},
            "subset actors ask for 3 CPU; this cluster can never place that: it has 1 × this",
        ),
        (run, {"actors.num_gpus": 1.0}, "subset actors ask for 1 CPU + 1 GPU"),
        (run, {"trunk.num_workers": 3}, "trunk workers ask for 3 × 1 CPU"),
        (run, {"fine_tuning.num_workers": 3}, "fine_tuning workers ask for 3 × 1 CPU"),
        (run, {"method": "conventional", "conventional.num_workers": 3}, "conventional workers ask for 3 × 1 CPU"),
        (small_sweep, {"fine_tuning.num_workers": 3}, "fine_tuning workers ask for 3 × 1 CPU"),
        (compare, {"actors.num_cpus": 3}, "legs of a comparison ask for 3 CPU"),
    ],
)
def test_what_can_never_be_placed_is_refused_before_ray_is_started_and_leaves_nothing(
    tmp_path: Path, begin: Callable[[Config], Any], overrides: dict[str, Any], told: str
) -> None:
    config = Config(storage_path=str(tmp_path)).with_overrides(
        {"cluster.num_cpus": 2, "cluster.num_gpus": 0, **overrides}
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        begin(config)
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())


def test_stages_that_are_done_ask_for_nothing_and_fewer_workers_are_enough_where_they_are_elastic(
    tmp_path: Path,
) -> None:
    config = Config().with_overrides(
        {"cluster.num_cpus": 2, "trunk.num_workers": 9, "fine_tuning.num_workers": 9, "fine_tuning.min_workers": 2}
    )
    directory = RunDirectory(str(tmp_path), "run")
    with pytest.raises(ValueError, match="trunk workers ask for 9"):
        refuse_what_has_no_place(config, directory)
    directory.write_json(minimum_path("trunk"), {})
    refuse_what_has_no_place(config, directory)


@pytest.mark.parametrize("begin", [run, compare, small_sweep])
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1", "127.0.0.1:99999", "ray://127.0.0.1:1"])
def test_a_wrong_address_leaves_nothing(tmp_path: Path, begin: Callable[[Config], Any], address: str) -> None:
    config = Config(storage_path=str(tmp_path)).with_overrides({"cluster.address": address})
    with pytest.raises(ValueError, match=rf"no Ray cluster answers at {address}, .* Without cluster.address a new one"):
        begin(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_stale_address_is_said_to_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    told = rf"answers at {address}, which RAY_ADDRESS in the environment names .* Without RAY_ADDRESS in"
    with pytest.raises(ValueError, match=told), reached(ClusterConfig()):
        pass


def keepers() -> list[psutil.Process]:
    """This process's keepers of nodes. Other tests' children may be there too."""
    return [child for child in psutil.Process().children() if own_node._KEEPER in child.cmdline()]


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has a node of our own kept by this program, which prints an address, reads to the end of its input, and goes."""

    def keep(program: str = "") -> None:
        monkeypatch.setattr(
            own_node, "_KEEPER", program or "import sys; print('127.0.0.1:7', flush=True); sys.stdin.read()"
        )

    keep()
    return keep


@pytest.mark.usefixtures("keeper")
def test_a_signal_while_ray_starts_stops_as_ctrl_c_does_and_ends_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(15))  # what Ray's handler of SIGTERM does
    with pytest.raises(KeyboardInterrupt), connected(ClusterConfig(num_cpus=1)):
        pass
    assert keepers() == []


def test_a_node_that_does_not_come_up_is_told_of_by_ray_s_last_word(keeper: Callable[[str], None]) -> None:
    keeper("import sys; sys.exit('one\\nno memory')")
    with OwnNode() as node, pytest.raises(RuntimeError, match="Ray does not start on this machine: no memory"):
        node.address()


@pytest.mark.parametrize("num_slow", [1, 2])
def test_a_start_that_is_too_slow_is_tried_once_more(
    keeper: Callable[[str], None], tmp_path: Path, num_slow: int
) -> None:
    tries = tmp_path / "tries"
    keeper(f"""
import sys
with open({str(tries)!r}, "a+") as file:
    file.write("x")
    file.seek(0)
    if len(file.read()) <= {num_slow}:
        sys.exit("Exception: The current node timed out during startup.")
print("127.0.0.1:7", flush=True)
""")
    with OwnNode() as node:
        if num_slow == 1:
            assert node.address() == "127.0.0.1:7"
        else:
            with pytest.raises(RuntimeError, match=r"Ray does not start on this machine: .* timed out"):
                node.address()
    assert tries.read_text() == "xx"


def test_a_file_of_the_working_directory_does_not_stand_for_a_module_that_ray_imports(
    keeper: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    keeper("import queue; print('127.0.0.1:7', flush=True)")
    with OwnNode() as node:
        assert node.address() == "127.0.0.1:7"


def test_a_keeper_that_does_not_end_is_killed_with_what_it_has_started(
    keeper: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_node, "END_S", 0.0)
    keeper("import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)")
    with OwnNode() as node:
        sleeper = psutil.Process(int(node.address()))
    psutil.wait_procs([sleeper])


@pytest.mark.usefixtures("keeper")
def test_a_node_started_ahead_is_the_one_connected_to_and_goes_with_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_keepers: list[int] = []

    def init(**options: Any) -> None:
        assert options["address"] == "127.0.0.1:7"
        num_keepers.append(len(keepers()))
        raise ConnectionError("far enough")

    monkeypatch.setattr(ray, "init", init)
    config = ClusterConfig(num_cpus=1)
    with started_ahead(config):
        ahead = psutil.Process(connection._nodes_ahead[config]._keeper.pid)  # which has no command line at first
        with pytest.raises(ConnectionError, match="far enough"), connected(config):
            pass
        psutil.wait_procs([ahead])  # while what follows goes on
    assert num_keepers == [1]


@pytest.fixture
def rays(monkeypatch: pytest.MonkeyPatch, keeper: Callable[[str], None]) -> list[str]:
    """The calls of ray.init() and ray.shutdown(), which connect to nothing."""
    calls: list[str] = []

    def init(**_: Any) -> None:
        calls.append("init")
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: calls[-1:] == ["init"])
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    keeper("import sys; print('x://', flush=True); sys.stdin.read()")  # nobody watches the head of such an address
    return calls


def test_threads_share_a_connection_which_the_last_one_ends(rays: list[str]) -> None:
    first_has_left, other_is_in = threading.Event(), threading.Event()

    def other() -> None:
        with connected(ClusterConfig(num_cpus=1)):
            other_is_in.set()
            first_has_left.wait(20)
            seen.append(list(rays))

    seen: list[list[str]] = []
    thread = threading.Thread(target=other)
    with connected(ClusterConfig(num_cpus=1)):
        thread.start()
        assert other_is_in.wait(20)
    first_has_left.set()
    thread.join()
    assert seen == [["init"]]
    assert rays == ["init", "shutdown"]
    assert keepers() == []


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_the_callers_handler_of_sigterm_is_there_again(
    rays: list[str], handler: Any, request: pytest.FixtureRequest
) -> None:
    old = signal.signal(signal.SIGTERM, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, old))
    with connected(ClusterConfig(num_cpus=1)):
        is_callers = signal.getsignal(signal.SIGTERM) is handler
        assert is_callers == (handler is not signal.SIG_DFL)  # which would leave nothing in order
    assert signal.getsignal(signal.SIGTERM) is handler
    assert rays == ["init", "shutdown"]


@pytest.mark.usefixtures("keeper")
def test_no_node_is_started_ahead_of_a_cluster_that_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with started_ahead(ClusterConfig(address="10.0.0.1:6379")):
        assert keepers() == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with started_ahead(ClusterConfig()):
        assert keepers() == []
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with started_ahead(ClusterConfig()):
        assert len(keepers()) == 1


class Ended(Exception):
    pass


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[str, str, float], str]:
    """What a driver says as it ends without its head."""

    def end(code: int) -> None:
        raise Ended(code)

    def watch(address: str, raylet_address: str, limit_s: float) -> str:
        with pytest.raises(Ended, match="1"):
            connection.watch_head(address, raylet_address, limit_s, threading.Event())
        return caplog.text

    monkeypatch.setattr(connection, "LOOK_S", 0.02)
    monkeypatch.setattr(connection.os, "_exit", end)
    return watch


@pytest.fixture
def silent() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_what_ray_tells_all_drivers_is_a_line_in_the_log_and_nothing_on_stdout(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "The node at 10.0.0.7 is dead. It may be (1) SIGKILL. Last 20 lines of the Raylet logs:\n  [state] 0.\n"

    from raysubset.cluster.private_ray import worker

    as_ray_does = worker.print_to_stdstream

    def init(**options: Any) -> None:
        worker.print_to_stdstream({"lines": [message], "pid": "raylet", "is_err": False}, ignore_prefix=False)

    monkeypatch.setattr(ray, "init", init)
    with connection._connection("ray://10.0.0.1:10001", head_s=1.0):
        pass
    assert "Ray: The node at 10.0.0.7 is dead" in caplog.messages
    assert capsys.readouterr().out == ""
    assert worker.print_to_stdstream is as_ray_does


def test_a_head_or_a_raylet_that_is_lost_is_a_line_and_exit_code_1(
    lost: Callable[[str, str, float], str], silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RAYLET_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        text = lost(silent, address, 0.1)
        assert f"the head at {silent} does not answer" in text
        assert "the same command resumes" in text
        text = lost(address, silent, 60.0)
        assert f"the raylet of this node at {silent} does not answer" in text
