"""Ray's token authentication: a token of our own for a cluster of our own; elsewhere what the cluster asks for.

Ray reads the mode when it is imported, and for a new cluster would leave a world-readable token in the home folder: so
this comes before `import ray`. RAY_AUTH_MODE is left alone where the user has set it.
"""

import os
import secrets
import sys

_MODE_CHOSEN = "RAY_AUTH_MODE" in os.environ
_OWN_TOKEN = secrets.token_hex(32)


def _set_own_token() -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", _OWN_TOKEN)


if not _MODE_CHOSEN and "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
    _set_own_token()
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import grpc  # noqa: E402
from ray import exceptions  # noqa: E402

from raysubset.cluster.private_ray import AuthenticationTokenLoader, Config  # noqa: E402

ANSWER_TIMEOUT_S = 10.0

_WAY_OUT = (
    "put the cluster's token into ~/.ray/auth_token, or name the file that has it with RAY_AUTH_TOKEN_PATH, and set "
    "RAY_AUTH_MODE=token (clusters/README.md, Tokens)"
)


def use_own_token() -> None:
    """Before a new cluster on this machine: its token ends with it, as its ports listen on every interface."""
    if not _MODE_CHOSEN:
        _set_own_token()
        _read_environment_again()


def use_token_of(address: str) -> None:
    """Before connecting to host:port: with a token exactly where the cluster there asks for one.

    Ray's own client tries for 20 s, and then says only that it failed.

    Raises:
        ConnectionError: if what listens there is no Ray cluster.
        ValueError: if it asks for a token and this process has none, or another.
    """
    if not _MODE_CHOSEN:
        if os.environ.get("RAY_AUTH_TOKEN") == _OWN_TOKEN:
            del os.environ["RAY_AUTH_TOKEN"]
        os.environ["RAY_AUTH_MODE"] = "disabled"
        _read_environment_again()
        if not _is_refused(address):
            return
        os.environ["RAY_AUTH_MODE"] = "token"
        _read_environment_again()
    mode = os.environ["RAY_AUTH_MODE"].lower()
    if mode == "token" and not _has_token():
        raise ValueError(f"no token for the Ray cluster at {address}: {_token_source()} has none; {_WAY_OUT}")
    if not _is_refused(address):
        return
    if mode == "token":
        raise ValueError(f"the Ray cluster at {address} has another token than {_token_source()}; {_WAY_OUT}")
    raise ValueError(f"the Ray cluster at {address} asks for a token, but RAY_AUTH_MODE={mode}; {_WAY_OUT}")


def _read_environment_again() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _has_token() -> bool:
    try:
        return AuthenticationTokenLoader.instance().has_token()
    except exceptions.AuthenticationError:  # none anywhere, or the file that RAY_AUTH_TOKEN_PATH names is not there
        return False


def _token_source() -> str:
    """Where Ray looks for a token, the first that is set."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


def _is_refused(address: str) -> bool:
    """Whether the control store there wants another token than this process sends now, or one at all.

    Raises:
        ConnectionError: if what listens there is no control store.
    """
    from raysubset.cluster.private_ray import create_gcs_channel, gcs_service_pb2, gcs_service_pb2_grpc

    channel = create_gcs_channel(address)
    try:
        request = gcs_service_pb2.CheckAliveRequest()
        gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive(request, timeout=ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return True
        if code is not grpc.StatusCode.DEADLINE_EXCEEDED:  # a busy one; ray.init() waits longer
            raise ConnectionError(details) from error
    finally:
        channel.close()
    return False
