"""Ray's token authentication: a cluster that we start has a token of ours; another gets the token that it asks for.

Ray reads the mode when it is imported, and for a new cluster would leave a world-readable token in the home folder. So
this module comes before `import ray`. If the user has set RAY_AUTH_MODE, it is left alone.
"""

import os
import secrets
import sys

_MODE_IS_SET = "RAY_AUTH_MODE" in os.environ
_OWN_TOKEN = secrets.token_hex(32)


def _set_own_token() -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", _OWN_TOKEN)


if not _MODE_IS_SET and "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
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
    """Prepare a new cluster on this machine: it gets a token of its own, as its ports listen on all interfaces."""
    if not _MODE_IS_SET:
        _set_own_token()
        _read_environment_again()


def use_token_of(address: str) -> None:
    """Prepare a connection to host:port: with a token if the cluster there asks for one, and otherwise without.

    Ray's own client tries for 20 s, and then reports only that it failed.

    Raises:
        ConnectionError: if no Ray cluster listens there.
        ValueError: if it asks for a token and this process has none, or a different one.
    """
    if not _MODE_IS_SET:
        if os.environ.get("RAY_AUTH_TOKEN") == _OWN_TOKEN:
            del os.environ["RAY_AUTH_TOKEN"]
        os.environ["RAY_AUTH_MODE"] = "disabled"
        _read_environment_again()
        if not _is_refused(address):
            return
        os.environ["RAY_AUTH_MODE"] = "token"
        _read_environment_again()
    mode = os.environ["RAY_AUTH_MODE"].lower()
    # Ray looks for a token in the first of these places that is set
    source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else os.environ.get("RAY_AUTH_TOKEN_PATH")
    source = source or "~/.ray/auth_token"
    if mode == "token" and not _has_token():
        raise ValueError(f"no token for the Ray cluster at {address}: {source} has none; {_WAY_OUT}")
    if _is_refused(address):
        flaw = f"has another token than {source}" if mode == "token" else f"asks for a token, but RAY_AUTH_MODE={mode}"
        raise ValueError(f"the Ray cluster at {address} {flaw}; {_WAY_OUT}")


def _read_environment_again() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _has_token() -> bool:
    try:
        return AuthenticationTokenLoader.instance().has_token()
    except exceptions.AuthenticationError:  # there is no token, or no file at RAY_AUTH_TOKEN_PATH
        return False


def _is_refused(address: str) -> bool:
    """Return True if the control store wants a token, and this process sends none or a different one.

    Raises:
        ConnectionError: if no control store listens there.
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
        if code is not grpc.StatusCode.DEADLINE_EXCEEDED:  # it is busy; ray.init() waits longer
            raise ConnectionError(details) from error
    finally:
        channel.close()
    return False
