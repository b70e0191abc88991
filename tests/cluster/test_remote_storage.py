"""A run whose storage is an object store: a local S3 server."""

from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from raysubset import Config, load_model, run
from raysubset.run_directory import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def bucket_uri() -> Iterator[str]:
    """With its credentials, as the actors' processes have no others."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys).create_bucket(
        Bucket="runs"
    )
    yield f"s3://test:test@runs/results?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


def test_a_whole_run_with_ray_train_lives_in_an_object_store(bucket_uri: str) -> None:
    config = Config(name="remote", storage_path=bucket_uri).with_overrides(
        {"subsets.num": 2, "minimize.epochs": 1.0, "fine_tuning.epochs": 1.0, "fine_tuning.num_workers": 1}
    )
    report = run(config)
    assert "test:test" not in report.uri
    directory = RunDirectory(bucket_uri, "remote")
    assert directory.read_json("report.json")["test"] == report.test.to_dict()
    assert directory.list("fine_tuning/ray_train", recursive=True)
    notes: list[str] = []
    assert run(config, on_event=lambda event: notes.append(event.text)).test == report.test
    assert "is finished" in notes[0]
    path, _, query = bucket_uri.partition("?")
    assert load_model(f"{path}/remote?{query}").class_names == tuple("0123456789")
