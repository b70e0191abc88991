import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from raysubset.config import Config, ModelConfig
from raysubset.fingerprints import entries
from raysubset.report import list_runs
from raysubset.run_directory import (
    FORMAT,
    CorruptFile,
    Lease,
    RunDirectory,
    checkpoint_path,
    minimum_folder,
    minimum_path,
    optimizer_path,
    recent,
    weights_files,
    weights_path,
)
from raysubset.run_directory.recent import RECENT
from raysubset.run_directory.seals import seal_of
from raysubset.work import weights_fingerprint

FOLDER = minimum_folder(0, 7)
CONFIG = Config().to_dict()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path), "run")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bucket")
        yield f"{host}:{port}"
        server.stop()


@pytest.fixture
def s3_run(s3_endpoint: str, request: pytest.FixtureRequest) -> RunDirectory:
    return RunDirectory(f"s3://bucket/{request.node.name}?endpoint_override={s3_endpoint}&scheme=http", "run")


def damage(run: RunDirectory, path: str) -> None:
    """Keep the first half of a file."""
    data = run.read_bytes(path)
    run.write_bytes(path, data[: len(data) // 2])


def in_another_process(code: str, run: RunDirectory) -> "subprocess.Popen[str]":
    """Run code on the same run directory; `run` is defined there."""
    imports = "import os, time\nfrom raysubset.run_directory import Lease, RunDirectory"
    start = f"{imports}\nrun = RunDirectory.at({run.uri!r})\n"
    return subprocess.Popen([sys.executable, "-c", start + code], stdout=subprocess.PIPE, text=True)


class TestPlaces:
    def test_home_is_expanded_and_a_relative_path_made_absolute(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert RunDirectory("~/results", "run").uri == str(tmp_path / "results" / "run")
        assert RunDirectory("results", "run").uri == str(tmp_path / "results" / "run")

    def test_a_file_uri_is_a_local_path(self, tmp_path):
        RunDirectory(f"file://{tmp_path}/with%20space", "run").write_bytes("a", b"1")
        assert (tmp_path / "with space" / "run" / "a").read_bytes() == b"1"
        assert RunDirectory.at("file:///run").uri == "/run"

    @pytest.mark.parametrize("path", ["net of mine.pt", "folder/net.pt"])
    def test_weights_to_start_from_may_lie_in_a_bucket_itself_and_have_options_of_its_server(self, s3_endpoint, path):
        folder, _, name = f"s3://bucket/{path}".rpartition("/")
        options = f"?endpoint_override={s3_endpoint}&scheme=http"
        RunDirectory.at(f"{folder}{options}").write_bytes(name, b"weights")
        named = weights_fingerprint(ModelConfig(weights=f"{folder}/{name}{options}"))
        assert [entry.size for entry in entries(named).values()] == [len(b"weights")]
        assert RunDirectory.at("s3://bucket").uri == RunDirectory.at("s3://bucket/").uri == "s3://bucket/"

    @pytest.mark.parametrize("uri", ["file://tmp/results", "file://~/results", "file://results"])
    def test_a_file_uri_with_two_slashes_is_refused_as_its_first_folder_would_be_left_out(self, uri):
        with pytest.raises(ValueError, match="names a host: write file:///…, or the path alone"):
            RunDirectory(uri, "run")

    def test_pickling_carries_the_place_to_another_home(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        pickled = pickle.dumps(RunDirectory("~", "run"))
        monkeypatch.setenv("HOME", "/elsewhere")
        assert pickle.loads(pickled).uri == str(tmp_path / "run")

    @pytest.mark.parametrize("storage", ["/results", "/", "s3://bucket/a", "s3://bucket?region=x&scheme=http"])
    def test_a_run_is_found_again_by_its_uri(self, storage):
        found = RunDirectory.at(RunDirectory(storage, "run").uri)
        assert (found.storage_path, found.name) == (storage, "run")

    @pytest.mark.parametrize("storage", ["/results", "s3://bucket/a", "s3://bucket/a?region=x&scheme=http"])
    @pytest.mark.parametrize("name", ["two words", "why?", "50%25", "a#b"])
    def test_whatever_its_name(self, storage, name):
        run = RunDirectory(storage, name)
        found = RunDirectory.at(run.uri)
        assert (found.storage_path, found.name) == (storage, name)
        below = RunDirectory.at(RunDirectory(run.below("trials"), "0").uri)
        assert (below.storage_path, below.name) == (run.below("trials"), "0")
        assert "/report/report.html" in run.below("report/report.html")

    def test_the_uri_shown_keeps_credentials_to_itself(self):
        assert RunDirectory("s3://key:secret@bucket/a", "run").uri == "s3://bucket/a/run"

    def test_ray_train_gets_a_folder_of_the_run(self, run):
        assert run.train_storage("fine_tuning") == (f"{run.uri}/fine_tuning", None)


class TestFiles:
    def test_list_gives_files_relative_to_the_run(self, run):
        for path in ("b.json", "a.json", "rounds/0000/c.json", "rounds/0000/.hidden"):
            run.write_bytes(path, b"")
        assert run.list() == ["a.json", "b.json"]
        assert run.list("rounds") == []
        assert run.list("rounds", recursive=True) == ["rounds/0000/c.json"]
        assert run.list("missing") == []

    def test_delete_removes_files_and_folders_and_minds_no_missing_one(self, run):
        run.write_bytes("a", b"")
        run.write_bytes("folder/b", b"")
        for path in ("a", "folder", "missing"):
            run.delete(path)
        assert not run.exists("a")
        assert not run.exists("folder")

    def test_json_comes_back_with_null_for_what_it_cannot_say(self, run):
        run.write_json("a.json", {"b": [1.5, float("nan")], "a": (float("inf"), -float("inf"), None, "ü")})
        assert run.read_json("a.json") == {"b": [1.5, None], "a": [None, None, None, "ü"]}
        assert list(run.read_json("a.json")) == ["b", "a"]

    def test_a_truncated_record_counts_as_absent_and_is_named(self, run, caplog):
        run.write_json(minimum_path(FOLDER), {"loss": 0.5, "accuracy": 0.9})
        damage(run, minimum_path(FOLDER))
        assert run.read_json_or_none(minimum_path(FOLDER)) is None
        assert "rounds/0000/minima/0007/minimum.json" in caplog.text

    def test_an_absent_record_is_none_without_a_word(self, run, caplog):
        assert run.read_json_or_none(minimum_path(FOLDER)) is None
        assert not caplog.text

    def test_weights_come_back_the_same_whatever_their_layout(self, run):
        shared = torch.arange(6.0).reshape(2, 3)
        weights = {
            "tied": shared,
            "tied_too": shared,
            "transposed": shared.T,
            "channels_last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "num_batches_tracked": torch.tensor(7),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        }
        seal = run.write_weights("w.safetensors", weights)
        read = run.read_weights("w.safetensors", {"w.safetensors": seal})
        assert sorted(read) == sorted(weights)
        for name, tensor in weights.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)

    def test_frozen_weights_are_stored_once_for_all_files_and_a_damaged_file_of_them_is_made_again(self, run):
        frozen, files = torch.arange(8.0), dict[str, str]()
        for number in range(2):
            weights = {"frozen": frozen.clone(), "trained": torch.full((2,), number)}
            files |= run.write_apart(f"{number}.safetensors", weights, {"frozen"})
        (path,) = run.list("frozen")
        assert sorted(files) == ["0.safetensors", "1.safetensors", path]
        for number in range(2):
            read = run.read_weights(f"{number}.safetensors", files)
            assert torch.equal(read["frozen"], frozen)
            assert read["trained"].tolist() == [number, number]
        run.write_apart("2.safetensors", {"frozen": frozen + 1, "trained": frozen}, {"frozen"})
        assert len(run.list("frozen")) == 2
        assert run.write_apart("3.safetensors", {"trained": frozen}, {"frozen"}).keys() == {"3.safetensors"}

        damaged = bytearray(run.read_bytes(path))
        damaged[-1] ^= 1
        run.write_bytes(path, damaged)
        other = RunDirectory(run.storage_path, run.name)
        RECENT.frozen.clear()
        with pytest.raises(CorruptFile, match="digest differs") as caught:
            other.read_weights("0.safetensors", files)
        other.forget(caught.value.path)
        with pytest.raises(CorruptFile, match="it is gone"):
            other.check_lengths(files)
        other.write_apart("0.safetensors", {"frozen": frozen, "trained": torch.zeros(2)}, {"frozen"})
        assert torch.equal(other.read_weights("1.safetensors", files)["frozen"], frozen)

    def test_weights_that_were_read_and_their_file_have_nothing_more_to_do_with_each_other(self, run):
        files = {"w.safetensors": run.write_weights("w.safetensors", {"a": torch.ones(3)})}
        changed, kept = (run.read_weights("w.safetensors", files)["a"] for _ in range(2))
        changed.zero_()
        assert run.read_weights("w.safetensors", files)["a"].tolist() == kept.tolist() == [1, 1, 1]
        run.write_weights("w.safetensors", {"a": torch.full((3,), 2.0)})
        assert (changed.tolist(), kept.tolist()) == ([0, 0, 0], [1, 1, 1])
        run.delete("w.safetensors")
        assert kept.tolist() == [1, 1, 1]

    def test_an_optimizer_s_state_comes_back_from_a_checkpoint(self, run):
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([parameter])
        parameter.square().sum().backward()
        optimizer.step()
        run.write_checkpoint(optimizer_path(FOLDER), optimizer.state_dict())
        restored = torch.optim.Adam([parameter])
        restored.load_state_dict(run.read_checkpoint(optimizer_path(FOLDER)))
        assert torch.equal(restored.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])

    def test_a_checkpoint_runs_no_code(self, run, tmp_path):
        class Touch:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        run.write_checkpoint("c.pt", {"position": Touch()})
        with pytest.raises(CorruptFile):
            run.read_checkpoint("c.pt")
        assert not (tmp_path / "harm").exists()

    def test_tables_come_back(self, run):
        table = pa.table({"subset": [0, 0, 1], "indices": [[1], [], [2, 3]]})
        run.write_table("subsets.parquet", table)
        assert run.read_table("subsets.parquet").equals(table)

    @pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.99])
    @pytest.mark.parametrize("kind", ["json", "weights", "checkpoint", "table"])
    def test_half_a_file_is_refused_by_name(self, run, kind, kept):
        value = {
            "json": {"a": 1},
            "weights": {"a": torch.ones(100)},
            "checkpoint": {"a": torch.ones(100), "position": [0, 1]},
            "table": pa.table({"a": list(range(100))}),
        }[kind]
        seal = getattr(run, f"write_{kind}")("folder/file", value)
        files = ({"folder/file": seal},) if kind == "weights" else ()
        data = run.read_bytes("folder/file")
        run.write_bytes("folder/file", data[: int(kept * (len(data) - 2))])
        with pytest.raises(CorruptFile, match=r"folder/file in .*/run (cannot be read|is damaged)") as refused:
            getattr(run, f"read_{kind}")("folder/file", *files)
        assert refused.value.path == "folder/file"
        assert pickle.loads(pickle.dumps(refused.value)).path == "folder/file"

    @pytest.mark.parametrize("kind", ["json", "weights", "checkpoint", "table"])
    def test_no_bit_of_a_file_changes_unnoticed(self, run, kind):
        value = {
            "json": {"a": [1, 2.5, None, "ü"]},
            "weights": {"a": torch.arange(3.0)},
            "checkpoint": {"a": torch.arange(3.0), "position": [0, 1]},
            "table": pa.table({"a": [1, 2, 3]}),
        }[kind]
        files = {"file": getattr(run, f"write_{kind}")("file", value)}
        data, read = run.read_bytes("file"), partial(getattr(run, f"read_{kind}"), "file")
        if kind == "weights":
            read = partial(read, files)
        for bit in range(0, 8 * len(data), 1 if kind == "json" else 13):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            run.local_path.joinpath("file").write_bytes(changed)
            try:
                found = read()
            except CorruptFile:
                continue
            assert found != value, "it was read as if nothing were"
            assert "digest" not in found, "a digest that says nothing"
            assert found.keys() - value.keys(), "only where the digest lost its name it is not looked at"
        run.write_bytes("file", data)
        read()

    def test_a_record_without_a_digest_is_another_hand_s_and_is_read(self, run):
        run.write_bytes("a.json", b'{"a": 1}')
        assert run.read_json("a.json") == {"a": 1}
        run.write_bytes("a.json", b'{"a": 1, "digest": "x"}')
        with pytest.raises(CorruptFile, match="whoever edits it leaves digest out"):
            run.read_json("a.json")

    def test_a_table_or_record_read_back_has_nothing_of_the_digest_in_it(self, run):
        table = pa.table({"a": [1]}).replace_schema_metadata({"mine": "x"})
        run.write_table("t.parquet", table)
        assert run.read_table("t.parquet").schema.metadata == {b"mine": b"x"}
        assert pq.read_table(run.local_path / "t.parquet").to_pydict() == {"a": [1]}  # others read it too
        run.write_checkpoint("c.pt", {"position": [1]})
        assert torch.load(run.local_path / "c.pt") == {"position": [1]}

    def test_weights_of_any_type_and_layout_are_written_a_tensor_at_a_time_and_read_by_safetensors(self, run):
        tied, image = torch.randn(3, 2), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        weights = {f"{one}": torch.arange(5).to(one) for one in weights_files._DTYPES}
        weights |= {"tied": tied, "tied again": tied, "image": image, "number": torch.tensor(7)}
        weights |= {
            "none": torch.ones(0, 3),
            "slice": torch.arange(10)[::3],
            "of a module": nn.Parameter(torch.ones(1)),
        }
        seal = run.write_weights("w", weights)
        path = run.local_path / "w"
        assert seal == seal_of(path.read_bytes())
        for read in (safetensors.torch.load(path.read_bytes()), run.read_weights("w", {"w": seal})):
            assert read.keys() == weights.keys()
            for key, value in weights.items():
                assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape)
                bits, expected = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (read[key], value))
                assert torch.equal(bits, expected)
        with pytest.raises(ValueError, match="complex128, which safetensors cannot hold"):
            run.write_weights("w", {"a": torch.ones(1, dtype=torch.complex128)})
        assert run.list() == ["w"], "nothing half written is left"

    def test_a_missing_file_is_not_a_corrupt_one_but_where_a_record_names_it(self, run):
        for read in (run.read_bytes, run.read_json, run.read_table):
            with pytest.raises(FileNotFoundError):
                read("missing")
        with pytest.raises(CorruptFile, match="No such file"):
            run.read_weights("missing", {"missing": "4 bytes, sha256 …"})
        with pytest.raises(CorruptFile, match="No such file"):  # an aggregate's record stands for optimizer states
            run.read_checkpoint("missing")

    @pytest.mark.parametrize("harm", ["whole", "gone", "shorter", "unnamed", "list", "forged"])
    def test_a_record_counts_only_while_the_files_it_names_are_there(self, run, harm, caplog):
        record = {"files": {"w": run.write_weights("w", {"a": torch.ones(3)})}}
        if harm == "unnamed":
            del record["files"]
        run.write_json("r.json", record)
        if harm == "gone":
            run.delete("w")
        if harm == "shorter":
            run.write_bytes("w", run.read_bytes("w")[:-1])
        if harm == "list":
            run.write_json("r.json", [])
        if harm == "forged":
            run.write_json("r.json", {"files": {"w": 7}})
        assert run.read_record("r.json") == (record if harm == "whole" else None)
        assert ("is done again" in caplog.text) == (harm != "whole")

    @pytest.mark.parametrize(
        ("path", "records"),
        [
            ("trunk/weights.safetensors", ["trunk/minimum.json"]),
            ("fine_tuning/weights.safetensors", ["fine_tuning/minimum.json"]),
            (weights_path(FOLDER), [minimum_path(FOLDER), "rounds/0000/aggregate.json"]),
            (optimizer_path(FOLDER), [minimum_path(FOLDER), "rounds/0000/aggregate.json"]),
            ("rounds/0000/aggregate.safetensors", ["rounds/0000/aggregate.json"]),
            ("rounds/0000/momentum.safetensors", ["rounds/0000/aggregate.json"]),
            ("rounds/0000/optimizer.pt", ["rounds/0000/aggregate.json"]),
        ],
    )
    def test_what_stands_on_a_damaged_file_is_forgotten_and_nothing_else(self, run, path, records):
        others = ["trunk/minimum.json", "fine_tuning/minimum.json", minimum_path(FOLDER), "rounds/0000/aggregate.json"]
        files = {*others, minimum_path(minimum_folder(0, 8)), "rounds/0001/aggregate.json", "rounds/0000/optimizer.pt"}
        for file in files:
            run.write_bytes(file, b"")
        run.forget(path)
        assert set(run.list(recursive=True)) == files - set(records)


def test_contents_of_files_are_kept_up_to_so_many_bytes_and_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(recent, "MOST_BYTES", 14)
    kept = recent.Recent()
    contents = {"a": b"12345", "b": b"1234", "local": recent.WRITTEN, "c": b"12", "too large": b"123456789012345"}
    for name, content in contents.items():
        kept.keep("run", name, "seal", content)
    assert {name for name in contents if kept.find("run", name, "seal") == contents[name]} == {"b", "local", "c"}
    assert kept.find("run", "b", "another seal") is None


class TestAtomicity:
    def test_a_writer_that_is_killed_leaves_the_old_content(self, run):
        run.open(CONFIG, {})
        run.write_bytes("a.json", b"old")
        killed = in_another_process(
            "os.fsync = lambda _: os.kill(os.getpid(), 9)  # half-way: written, not yet in place\n"
            "run.write_bytes('a.json', b'new')",
            run,
        )
        assert killed.wait() == -signal.SIGKILL
        assert run.read_bytes("a.json") == b"old"
        assert [file.name for file in run.local_path.glob(".a.json.*")], "the kill came too early to show anything"
        assert run.list() == ["a.json", "config.json", "environment.json"]
        run.open(CONFIG, {})
        assert not list(run.local_path.glob(".a.json.*"))

    def test_a_full_disk_names_the_file_and_leaves_the_old_one(self, run, monkeypatch):
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        run.write_bytes("folder/a", b"old")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device.*run/folder/a") as raised:
            run.write_bytes("folder/a", b"new")
        assert raised.value.errno == errno.ENOSPC
        assert run.read_bytes("folder/a") == b"old"
        assert os.listdir(run.local_path / "folder") == ["a"]

    def test_readers_beside_a_writer_see_whole_files(self, run):
        contents = [bytes([digit]) * 100_000 for digit in b"01"]
        run.write_bytes("a", contents[0])
        writer = threading.Thread(target=lambda: [run.write_bytes("a", contents[i % 2]) for i in range(100)])
        writer.start()
        while writer.is_alive():
            assert run.read_bytes("a") in contents
        writer.join()


class TestCheckpoints:
    def test_the_one_that_got_furthest_is_taken_whoever_wrote_it(self, run):
        for attempt, position in enumerate([[1, 10], [2, 0], [1, 30]]):
            run.write_checkpoint(checkpoint_path(FOLDER, attempt), {"position": position})
        run.write_checkpoint(checkpoint_path(minimum_folder(0, 8), 3), {"position": [9, 9]})
        run.write_checkpoint(optimizer_path(FOLDER), {})
        assert run.newest_checkpoint(FOLDER) == (1, {"position": [2, 0]})

    def test_a_truncated_one_is_passed_over_with_a_warning(self, run, caplog):
        for attempt in range(2):
            run.write_checkpoint(checkpoint_path(FOLDER, attempt), {"position": [attempt, 0]})
        damage(run, checkpoint_path(FOLDER, 1))
        assert run.newest_checkpoint(FOLDER) == (0, {"position": [0, 0]})
        assert "rounds/0000/minima/0007/checkpoint-01.pt" in caplog.text

    def test_there_may_be_none(self, run):
        assert run.newest_checkpoint(FOLDER) is None


class TestOpening:
    def test_the_second_time_resumes(self, run):
        assert run.open(CONFIG, {"torch": "2"}) is False
        run.write_json(minimum_path(FOLDER), {})
        assert run.open(CONFIG, {"torch": "3"}) is True
        assert run.exists(minimum_path(FOLDER))
        assert run.read_json("environment.json") == {"torch": "2"}
        assert Config.from_dict(run.read_config()) == Config()

    def test_config_json_keeps_the_format_beside_the_config(self, run):
        run.open(CONFIG, {})
        assert run.read_json("config.json") == {"format": FORMAT, "config": CONFIG}

    def test_a_changed_config_is_refused_with_the_difference_and_the_way_out(self, run):
        run.open(CONFIG, {})
        changed = Config().with_overrides({"seed": 3, "subsets.size": 100}).to_dict()
        told = r"seed: 0 → 3, subsets.size: None → 100\): choose another --name, or start over with --fresh"
        with pytest.raises(ValueError, match=told):
            run.open(changed, {})
        assert run.read_config() == CONFIG

    def test_a_run_of_this_config_is_told_from_others_without_opening_it(self, run):
        assert run.differs(CONFIG)
        run.open(CONFIG, {})
        assert not run.differs(CONFIG)
        assert not run.differs(Config().with_overrides({"actors.max_num": 2}).to_dict())
        assert run.differs(CONFIG | {"seed": 3})

    def test_what_shapes_no_result_may_change(self, run):
        run.open(CONFIG, {})
        assert run.open(Config().with_overrides({"actors.max_num": 2}).to_dict(), {}) is True
        assert run.read_config()["actors"]["max_num"] == 2

    def test_fresh_deletes_all_but_the_lease(self, run):
        with Lease(run):
            run.open(CONFIG, {"torch": "2"})
            run.write_json(minimum_path(FOLDER), {})
            run.write_bytes("model.json", b"")
            assert run.open(CONFIG | {"seed": 5}, {}, fresh=True) is False
            assert run.list(recursive=True) == ["config.json", "environment.json", "lease.json"]
        assert run.read_config()["seed"] == 5

    def test_a_deletion_that_was_cut_short_is_completed(self, run, monkeypatch):
        run.open(CONFIG, {})
        run.write_json(minimum_path(FOLDER), {})
        run.write_json("aggregate.json", {})
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "delete", lambda self, path: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run.open(CONFIG, {}, fresh=True)
        with pytest.raises(ValueError, match="there is no run at"):
            run.read_config()
        assert run.open(CONFIG, {}) is False
        assert run.list(recursive=True) == ["config.json", "environment.json"]

    @pytest.mark.parametrize("fresh", [False, True])
    def test_a_folder_that_is_no_run_is_left_alone(self, run, fresh):
        run.write_bytes("thesis.tex", b"years")
        with pytest.raises(ValueError, match=r"holds thesis.tex but no config.json, so it is no run"):
            run.open(CONFIG, {}, fresh=fresh)
        assert run.list() == ["thesis.tex"]

    @pytest.mark.parametrize("fresh", [False, True])
    @pytest.mark.parametrize("foreign", [{"architectures": ["ResNet"]}, ["a", "list"]])
    def test_the_config_json_of_something_else_makes_no_run_of_its_folder(self, run, fresh, foreign):
        run.write_json("config.json", foreign)
        run.write_bytes("model.safetensors", b"years")
        with pytest.raises(ValueError, match=r"holds a config.json that belongs to no run: choose another --name"):
            run.open(CONFIG, {}, fresh=fresh)
        with pytest.raises(ValueError, match=r"holds a config.json that belongs to no run"):
            run.differs(CONFIG)
        assert run.list() == ["config.json", "model.safetensors"]
        assert run.read_json("config.json") == foreign

    @pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1, "x", None])
    def test_another_format_is_refused_until_asked_to_start_over(self, run, other):
        run.write_json("config.json", {"format": other, "config": CONFIG})
        with pytest.raises(ValueError, match=rf"is of format {other!r}; this version of raysubset reads {FORMAT}: use"):
            run.open(CONFIG, {})
        assert run.open(CONFIG, {}, fresh=True) is False
        assert run.open(CONFIG, {}) is True

    def test_a_damaged_config_says_how_to_go_on(self, run):
        run.open(CONFIG, {})
        damage(run, "config.json")
        with pytest.raises(ValueError, match=r"config.json in .* cannot be read: .*; start over with --fresh"):
            run.open(CONFIG, {})
        assert run.open(CONFIG, {}, fresh=True) is False

    def test_where_there_is_no_run_no_config_is_read(self, run):
        with pytest.raises(ValueError, match="there is no run at"):
            run.read_config()


class TestWritable:
    def test_a_writable_place_is_left_as_it_was(self, run):
        run.check_writable()
        assert not run.local_path.exists()
        run.write_bytes("a", b"")
        run.check_writable()
        assert os.listdir(run.local_path) == ["a"]

    def test_a_path_below_a_file_is_refused_with_the_cause(self, tmp_path):
        (tmp_path / "file").write_text("")
        run = RunDirectory(str(tmp_path / "file"), "run")
        with pytest.raises(ValueError, match=r"cannot write to .*/file/run: Not a directory; choose another --stor"):
            run.check_writable()

    def test_an_unknown_scheme_is_refused(self):
        with pytest.raises(ValueError, match=r"storage_path of ftp:// cannot be opened"):
            RunDirectory("ftp://host", "run").check_writable()


HOLD = "with Lease(run):\n    print('held', flush=True)\n    time.sleep(60)"


class TestLease:
    def test_a_second_process_is_refused_and_told_who_holds_it(self, run):
        with Lease(run):
            second = in_another_process(
                "try:\n    Lease(run).__enter__()\nexcept ValueError as error:\n    print(error)", run
            )
            told, _ = second.communicate()
        assert f"is being written by process {os.getpid()} on " in told
        assert "wait for it, or choose another --name" in told

    def test_it_is_free_again_afterwards(self, run):
        for _ in range(2):
            with Lease(run) as lease:
                assert run.exists("lease.json")
            assert not run.exists("lease.json")
            assert not lease.lost

    def test_it_is_given_back_when_the_driver_fails(self, run):
        with pytest.raises(ZeroDivisionError), Lease(run):
            _ = 1 / 0
        assert not run.exists("lease.json")

    def test_a_killed_holder_on_this_machine_is_succeeded_at_once(self, run):
        holder = in_another_process(HOLD, run)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} "):
            Lease(run).__enter__()
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
        with Lease(run):
            assert run.read_json("lease.json")["pid"] == os.getpid()
        holder.communicate()

    def test_a_process_that_got_a_dead_holder_s_id_does_not_hold_it(self, run):
        with Lease(run):
            record = run.read_json("lease.json")
        run.write_json("lease.json", record | {"driver": "dead", "process_started": "1"})
        with Lease(run):
            assert run.read_json("lease.json")["driver"] != "dead"

    @pytest.mark.parametrize(("silent_s", "dead"), [(59, False), (61, True)])
    def test_a_holder_elsewhere_is_dead_after_a_minute_of_silence(self, run, silent_s, dead):
        with Lease(run):
            record = run.read_json("lease.json")
        run.write_json("lease.json", record | {"process_space": "elsewhere", "host": "far", "renewed_at": 1000.0})
        lease = Lease(run, clock=lambda: 1000.0 + silent_s)
        if dead:
            with lease:
                assert run.read_json("lease.json")["renewed_at"] == 1000.0 + silent_s
        else:
            with pytest.raises(ValueError, match=r"on far since .*its lease ends in 1 s.*wait for it"):
                lease.__enter__()

    def test_it_is_renewed_while_held(self, run):
        ticks = iter(range(1_000_000))
        renewed = threading.Event()

        def clock() -> float:
            if (now := next(ticks)) > 5:
                renewed.set()
            return now

        with Lease(run, renew_s=0.01, clock=clock):
            assert renewed.wait(10)

    def test_a_stolen_lease_is_noticed_and_left_to_the_thief(self, run):
        with Lease(run) as lease:
            run.write_json("lease.json", run.read_json("lease.json") | {"driver": "thief"})
            lease.renew()
            assert lease.lost
        assert run.read_json("lease.json")["driver"] == "thief"

    def test_a_driver_that_stood_still_looks_whether_another_has_taken_over_before_it_goes_on(self, run):
        now = 1000.0
        with Lease(run, renew_s=3600, clock=lambda: now) as lease:  # its thread has not had its turn yet
            now += 59
            lease.check()
            assert run.read_json("lease.json")["renewed_at"] == 1000.0
            now += 2
            lease.check()
            assert run.read_json("lease.json")["renewed_at"] == 1061.0
            run.write_json("lease.json", run.read_json("lease.json") | {"driver": "successor"})
            now += 61
            with pytest.raises(RuntimeError, match=r"another driver has taken over .*; this driver stops"):
                lease.check()
        assert run.read_json("lease.json")["driver"] == "successor"

    def test_a_folder_that_is_deleted_or_unmounted_is_called_that_and_is_not_made_again(self, run):
        with Lease(run, renew_s=3600) as lease:
            run.open(CONFIG, {})
            lease.renew()
            shutil.rmtree(run.local_path)
            lease.renew()
            assert lease.lost == f"{run.uri} is gone, deleted or no longer mounted"
            assert not run.local_path.exists()
        assert not run.local_path.exists()
        with Lease(run):
            assert run.open(CONFIG, {}) is False

    def test_a_folder_that_is_deleted_while_the_lease_is_renewed_is_noticed(self, run, monkeypatch):
        with Lease(run, renew_s=3600) as lease:
            run.open(CONFIG, {})
            read = RunDirectory.read_json_or_none

            def read_too_late(self, path):
                shutil.rmtree(run.local_path)
                return read(self, path)

            monkeypatch.setattr(RunDirectory, "read_json_or_none", read_too_late)
            lease.renew()
            assert lease.lost == f"{run.uri} is gone, deleted or no longer mounted"

    def test_a_folder_that_is_deleted_is_called_that_also_where_an_actor_has_made_it_again(self, run):
        with Lease(run, renew_s=3600) as lease:
            run.open(CONFIG, {})
            shutil.rmtree(run.local_path)
            run.write_json("ledger/subsets-0000-0000-00.json", {})
            lease.renew()
            assert lease.lost == f"{run.uri} is gone, deleted or no longer mounted"

    def test_what_others_put_into_a_deleted_folder_is_left_there(self, run):
        with Lease(run, renew_s=3600):
            shutil.rmtree(run.local_path)
            run.write_bytes("thesis.tex", b"years")
        assert run.list() == ["thesis.tex"]

    @pytest.mark.parametrize("text", ["{", "{}", "[]", "null", '{"driver": 3}'])
    def test_a_damaged_lease_holds_nobody_off_and_is_written_again_by_its_holder(self, run, text):
        with Lease(run, renew_s=3600) as lease:
            run.write_bytes("lease.json", text.encode())
            lease.renew()
            assert not lease.lost
            assert run.read_json("lease.json")["pid"] == os.getpid()
        run.write_bytes("lease.json", text.encode())
        with Lease(run):
            pass

    def test_storage_that_fails_for_a_while_is_survived(self, run, caplog):
        failing = FailingOnce(run.storage_path, run.name)
        with Lease(failing, renew_s=0.01, clock=lambda: 0.0) as lease:
            assert failing.recovered.wait(10)
            assert not lease.lost
        assert "could not be renewed, trying again: the network is down" in caplog.text

    def test_of_drivers_that_start_together_one_gets_it(self, run):
        assert sorted(start_together([Lease(run) for _ in range(8)])) == [False] * 7 + [True]


class FailingOnce(RunDirectory):
    """Whose third write, the second renewal, fails."""

    def __init__(self, storage_path: str, name: str) -> None:
        super().__init__(storage_path, name)
        self.num_writes = 0
        self.recovered = threading.Event()

    def write_bytes(self, path: str, data: bytes | bytearray | memoryview, **options: bool) -> None:
        self.num_writes += 1
        if self.num_writes == 3:
            raise OSError("the network is down")
        super().write_bytes(path, data, **options)
        if self.num_writes > 3:
            self.recovered.set()


def start_together(leases: list[Lease]) -> list[bool]:
    """Which of them was got, taken in threads at the same time and held until all have tried."""
    barrier = threading.Barrier(len(leases), timeout=30)
    got = [False] * len(leases)

    def take(i: int) -> None:
        barrier.wait()
        try:
            with leases[i]:
                got[i] = True
                barrier.wait()
        except ValueError:
            barrier.wait()

    threads = [threading.Thread(target=take, args=(i,)) for i in range(len(leases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


class TestS3:
    def test_files_are_listed_and_deleted_as_on_a_disk(self, s3_run):
        s3_run.write_bytes("b", b"")
        s3_run.write_bytes("folder/deep/a", b"1")
        assert s3_run.list() == ["b"]
        assert s3_run.list(recursive=True) == ["b", "folder/deep/a"]
        assert s3_run.list("missing") == []
        s3_run.delete("folder")
        s3_run.delete("missing")
        assert s3_run.list(recursive=True) == ["b"]
        with pytest.raises(FileNotFoundError):
            s3_run.read_bytes("folder/deep/a")

    def test_all_kinds_of_files_come_back(self, s3_run):
        weights = {"a": torch.arange(3_000_000.0)}  # 12 MB: more than one part of an upload
        files = {weights_path(FOLDER): s3_run.write_weights(weights_path(FOLDER), weights)}
        s3_run.write_json("own.json", {"loss": 1.0})
        s3_run.write_checkpoint(checkpoint_path(FOLDER, 2), {"position": [1, 2]})
        s3_run.write_table("t.parquet", pa.table({"a": [1]}))
        assert torch.equal(s3_run.read_weights(weights_path(FOLDER), files)["a"], weights["a"])
        assert s3_run.read_json("own.json") == {"loss": 1.0}
        assert s3_run.newest_checkpoint(FOLDER) == (2, {"position": [1, 2]})
        assert s3_run.read_table("t.parquet").to_pydict() == {"a": [1]}

    def test_a_run_is_opened_resumed_refused_and_started_over(self, s3_run):
        s3_run.check_writable()
        with Lease(s3_run):
            assert s3_run.open(CONFIG, {}) is False
            s3_run.write_json(minimum_path(FOLDER), {})
            assert RunDirectory.at(s3_run.uri).open(CONFIG, {}) is True
            with pytest.raises(ValueError, match="seed: 0 → 4"):
                s3_run.open(CONFIG | {"seed": 4}, {})
            assert s3_run.open(CONFIG | {"seed": 4}, {}, fresh=True) is False
            assert s3_run.list(recursive=True) == ["config.json", "environment.json", "lease.json"]
        assert not s3_run.exists("lease.json")

    def test_a_name_of_two_words_leads_to_the_same_objects_by_its_uri_and_from_below(self, s3_run):
        run = RunDirectory(s3_run.storage_path, "my run?")
        run.write_bytes("trials/0/a", b"1")
        assert RunDirectory.at(run.uri).read_bytes("trials/0/a") == b"1"
        assert RunDirectory(run.below("trials"), "0").read_bytes("a") == b"1"

    def test_of_drivers_that_start_together_one_gets_it(self, s3_run):
        assert sorted(start_together([Lease(s3_run) for _ in range(3)])) == [False, False, True]

    def test_a_pickled_run_writes_to_the_same_place(self, s3_run):
        pickle.loads(pickle.dumps(s3_run)).write_bytes("a", b"1")
        assert s3_run.read_bytes("a") == b"1"

    def test_ray_train_gets_path_and_file_system(self, s3_run):
        path, filesystem = s3_run.train_storage("fine_tuning")
        assert path.startswith("bucket/")
        assert path.endswith("/run/fine_tuning")
        assert filesystem.type_name == "py::s3"

    def test_a_missing_bucket_is_refused_with_the_cause(self, s3_endpoint):
        run = RunDirectory(f"s3://no-such-bucket?endpoint_override={s3_endpoint}&scheme=http", "run")
        with pytest.raises(ValueError, match=r"cannot write to s3://no-such-bucket/run.*NO_SUCH_BUCKET"):
            run.check_writable()


def test_a_folder_that_appears_while_it_is_listed_counts_as_missing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    class Racing:
        def get_file_info(self, selector: object) -> None:
            raise FileNotFoundError("Cannot list directory")

    monkeypatch.setattr(run, "_at", lambda path: (Racing(), f"/somewhere/{path}"))
    assert run.list("ledger") == []


def test_the_runs_of_a_bucket_are_listed(s3_run: RunDirectory):
    s3_run.open(Config().to_dict(), {})
    ((entry,), num_others) = list_runs(s3_run.storage_path)
    assert (entry.name, entry.kind, entry.state, num_others) == ("run", "run", "stopped", 0)
    root = f"s3://bucket?{s3_run.storage_path.partition('?')[2]}"
    entries, num_others = list_runs(root)
    assert (entries, num_others > 0) == ([], True)  # the folders of tests, which are no run's
