"""Which token a process sends, against a control store that answers one question: in processes of their own, as Ray
reads its environment once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import raysubset.cluster.authentication  # noqa: F401  before anything imports Ray

# isort: split
import grpc
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

TOKEN = "0123456789abcdef"
CALLS = """
import json, os, sys
from raysubset.cluster.authentication import use_token_of
for line in sys.stdin:
    address, env = json.loads(line)
    if os.fork():
        os.wait()
        continue
    os.environ.update(env)
    try:
        use_token_of(address)
        print("ok", os.environ["RAY_AUTH_MODE"])
    except Exception as error:
        print(type(error).__name__, error)
    break
"""


class ControlStore(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    def __init__(self, token: str | None) -> None:
        self._token = token

    def CheckAlive(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self._token and ("authorization", f"Bearer {self._token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.CheckAliveReply()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a control store with the token that is the parameter, or with none."""
    server = grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(
        ControlStore(getattr(request, "param", TOKEN)), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With a token where Ray looks for it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    return tmp_path


@pytest.fixture(scope="module")
def callers() -> Iterator[dict[str | None, subprocess.Popen[str]]]:
    """Processes that have imported Ray, which reads the mode then, and fork for each call: it reads all else later."""
    with ExitStack() as stack:
        yield (started := {})
        for process in started.values():
            stack.enter_context(process).communicate(timeout=60)


@pytest.fixture
def use_token_of(callers: dict[str | None, subprocess.Popen[str]]) -> Callable[..., str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}

    def use(address: str, home: Path, **env: str) -> str:
        if (mode := env.pop("RAY_AUTH_MODE", None)) not in callers:
            command, its = [sys.executable, "-u", "-c", CALLS], clean | ({"RAY_AUTH_MODE": mode} if mode else {})
            callers[mode] = subprocess.Popen(
                command, env=its, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
            )
        stdin, stdout = callers[mode].stdin, callers[mode].stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps([address, {"HOME": str(home)} | env]) + "\n")
        return stdout.readline()

    return use


@pytest.mark.parametrize("address", [TOKEN], indirect=True)
def test_the_users_token_is_sent_where_one_is_asked_for(
    use_token_of: Callable[..., str], address: str, home: Path, tmp_path_factory: Any
) -> None:
    assert use_token_of(address, home) == "ok token\n"
    elsewhere = tmp_path_factory.mktemp("empty")
    assert use_token_of(address, elsewhere, RAY_AUTH_TOKEN=TOKEN) == "ok token\n"
    path = str(home / ".ray" / "auth_token")
    assert use_token_of(address, elsewhere, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=path) == "ok token\n"


@pytest.mark.parametrize("address", [None], indirect=True)
def test_none_is_used_where_none_is_asked_for(use_token_of: Callable[..., str], address: str, home: Path) -> None:
    assert use_token_of(address, home) == "ok disabled\n"
    assert use_token_of(address, home, RAY_AUTH_MODE="token") == "ok token\n"  # as the user says


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({}, "~/.ray/auth_token has none; put the cluster's token into"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "/nowhere/token has none; put"),
        ({"RAY_AUTH_MODE": "token"}, "~/.ray/auth_token has none; put"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "fedcba"}, "has another token than RAY_AUTH_TOKEN; put"),
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token, but RAY_AUTH_MODE=disabled; put"),
    ],
)
def test_no_token_or_another_is_a_mistake_told_at_once(
    use_token_of: Callable[..., str], address: str, tmp_path: Path, env: dict[str, str], told: str
) -> None:
    said = use_token_of(address, tmp_path, **env)
    assert said.startswith("ValueError ")
    assert address in said
    assert told in said


def test_what_is_no_control_store_does_not_answer(use_token_of: Callable[..., str], tmp_path: Path) -> None:
    assert use_token_of("127.0.0.1:1", tmp_path).startswith("ConnectionError ")


COMMAND = "(umask 077; ray get-auth-token --generate; chmod 600 ~/.ray/auth_token) > /dev/null"


@pytest.mark.parametrize("page", ["clusters/README.md", "clusters/local_autoscaling.yaml"])
def test_every_documented_command_makes_a_token_that_others_cannot_read(page: str) -> None:
    text = (Path(__file__).parents[1] / page).read_text()
    assert text.count(COMMAND) == text.count("get-auth-token") > 0


def test_the_documented_command_makes_its_token_unreadable_from_the_start(tmp_path: Path) -> None:
    """chmod is left out: what it would mend later must not be needed."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = COMMAND.replace("chmod 600 ~/.ray/auth_token", "true")
    subprocess.run(
        ["bash", "-c", f"umask 000; {command}"], check=True, timeout=120, env={"HOME": str(tmp_path), "PATH": tools}
    )
    for path in (tmp_path / ".ray", tmp_path / ".ray" / "auth_token"):
        assert path.stat().st_mode & 0o077 == 0
