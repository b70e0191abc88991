import pytest

from raysubset.cli import call
from raysubset.run_directory import RunDirectory
from raysubset.uris import holds_secret, refuse_ambiguous, shown, without_secrets

PLAIN = (
    "s3://bucket/a",
    "s3://bucket/a@b/c",
    "s3://bucket/hour=12:30/a",
    "s3://bucket?region=x&scheme=http&endpoint_override=host:9000",
    "abfs://container@account.dfs.core.windows.net/a",
    "hdfs://host:8020/a",
    "http://[::1]:9000/a",
    "sqlite:////tmp/mlflow.db",
    "/local/a?b@c:d",
)
HELD = (
    ("s3://key:HIDDEN@bucket/a", "s3://bucket/a"),
    ("s3://key:12345@bucket/a", "s3://bucket/a"),
    ("s3://key:HID@DEN@bucket/a", "s3://bucket/a"),
    ("s3://key:HID%2FDEN@bucket/a?region=x", "s3://bucket/a?region=x"),
    ("s3://bucket/a?access_key=me&secret_key=HIDDEN&region=x", "s3://bucket/a?region=x"),
    ("s3://bucket/a?endpoint_override=me:HIDDEN@host&scheme=http", "s3://bucket/a?scheme=http"),
    ("abfss://container:HIDDEN@account/a?sig=HIDDEN&se=1", "abfss://container@account/a"),
    ("abfs://:HIDDEN@account/a", "abfs://account/a"),
    ("gs://HIDDEN@bucket/a", "gs://bucket/a"),
)
AMBIGUOUS = (  # as secrets are pasted
    ("s3://key:HID/DEN@bucket/a?region=x", "s3://bucket/a?region=x"),
    ("s3://key:1/HIDDEN@bucket/a", "s3://bucket/a"),
    ("s3://KEY/ID:HIDDEN@bucket/a", "s3://bucket/a"),
    ("s3://key:HID?DEN@bucket/a", "s3://bucket/a"),
    ("s3://key:HID#DEN@bucket/a", "s3://bucket/a"),
    ("s3://key:HID@DE/N@bucket/a", "s3://bucket/a"),
    ("s3://key:HIDDEN", "s3://key"),
)


@pytest.mark.parametrize("uri", PLAIN)
def test_what_holds_no_secret_is_shown_as_it_is(uri: str):
    assert shown(uri) == uri
    assert not holds_secret(uri)
    refuse_ambiguous(uri)


@pytest.mark.parametrize(("uri", "expected"), [*HELD, *AMBIGUOUS])
def test_users_passwords_keys_and_tokens_are_not_shown(uri: str, expected: str):
    assert shown(uri) == expected
    assert holds_secret(uri)
    assert without_secrets(f"cannot read '{uri}': no such {uri}") == f"cannot read '{expected}': no such {expected}"


def test_a_comma_after_a_port_does_not_make_it_a_secret():
    assert without_secrets("at ray://head:10001, which (gs://b/x)") == "at ray://head:10001, which (gs://b/x)"
    assert without_secrets("at s3://key:secret, which") == "at s3://key, which"


@pytest.mark.parametrize(("uri", "expected"), HELD)
def test_a_run_shows_and_records_no_secret_and_is_found_again(uri: str, expected: str):
    run = RunDirectory(uri, "a run")
    assert run.shown_storage_path == expected
    assert RunDirectory.at(run.uri).storage_path == expected
    assert run.storage_path == uri


@pytest.mark.parametrize(("uri", "expected"), AMBIGUOUS)
def test_a_secret_that_ends_its_uri_early_is_refused_without_being_shown(uri: str, expected: str):
    with pytest.raises(ValueError, match="write / as %2F") as raised:
        RunDirectory(uri, "run")
    assert str(raised.value).startswith(f"{expected}: ")


@pytest.mark.usefixtures("no_node_ahead")
@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--storage-path", "s3://key:HID/DEN@bucket/a"],
        ["run", "--storage-path", "s3://key:HIDDEN@bucket/a?secret_key=HIDDEN"],
        ["run", "--storage-path", "nosuch://key:HIDDEN@bucket/a"],
        ["run", "--storage-pathh", "s3://key:HIDDEN@bucket/a"],
        ["run", "s3://key:HIDDEN@bucket/a"],
        ["run", "--seed", "s3://key:HIDDEN@bucket/a"],
        ["run", "--data.name", "s3://key:HID/DEN@bucket/a"],
        ["report", "s3://key:HIDDEN@bucket/a?sig=HIDDEN"],
        ["report", "s3://key:HID/DEN@bucket/a"],
        ["predict", "nosuch://key:HIDDEN@bucket/a", "x.png"],
    ],
    ids=" ".join,
)
def test_no_message_of_a_mistake_shows_a_secret(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert call(arguments) == 2
    error = capsys.readouterr().err
    assert "HID" not in error
    assert "DEN" not in error
    assert sum(line.startswith("raysubset: ") for line in error.splitlines()) == 1


def test_a_command_to_resume_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stopped(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("raysubset.cli.commands._do", stopped)
    assert call(["run", "--storage-path=s3://key:HIDDEN@bucket/a?region=x", "--seed", "3"]) == 130
    assert "'--storage-path=s3://bucket/a?region=x' --seed 3" in capsys.readouterr().err
