"""A local S3 server, for tests whose storage is an object store."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bucket(path: str, secret: str = "secret") -> Iterator[str]:
    """Yield the URI of a path that begins with a new bucket, with its credentials: Ray's processes have no others."""
    import boto3  # both take a second of a CPU, and each process of `pytest -n 2` collects all files
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or it prints each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": secret}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys)
    client.create_bucket(Bucket=path.partition("/")[0])
    yield f"s3://test:{secret}@{path}?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()
