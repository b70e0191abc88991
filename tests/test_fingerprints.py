import importlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysubset.config import Config, DataConfig
from raysubset.data import file_fingerprint, load_full_set, refuse_changed_files
from raysubset.doctor import examine
from raysubset.errors import ChangedFile, listed
from raysubset.fingerprints import MOST_NAMED, Entry, Identity, changes, digest, entries, fingerprint
from raysubset.pipeline import run
from raysubset.run_directory import IDENTITY_PATH, REPORT_PATH, CorruptFile, RunDirectory
from raysubset.user_code import source_files
from raysubset.user_code.functions import load_function
from raysubset.user_code.source_files import Workplace, at, code_fingerprint, code_in_use, held_code
from raysubset.work.identity import identify, places_notes
from tests.test_report import a_record

LONG_AGO_NS = 10**18


def write_classes(folder: Path, *, num: int = 4) -> Path:
    """Two classes of PNG images, written long ago."""
    generator = np.random.default_rng(0)
    for number in range(2 * num):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 6), dtype=np.uint8)).save(path)
    return folder


def write_table(path: Path, *, seed: int = 0, num: int = 40) -> Path:
    """Raw pixels, uncompressed: other pixels make a file of the same size and the same statistics."""
    pixels = np.random.default_rng(seed).integers(0, 256, (num, 36), dtype=np.uint8)
    image = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 36)
    tensor = pa.FixedShapeTensorArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), (6, 6, 1)), image)
    table = pa.table({"image": tensor, "label": np.arange(num) % 2})
    pq.write_table(table, path, compression="none", write_statistics=False, use_dictionary=False)
    return path


def found(path: Path | str, known: pa.Table | None = None) -> pa.Table:
    table = file_fingerprint(DataConfig(name=str(path)), known)
    assert table is not None
    return table


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been written a day ago."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 86_400 * 10**9)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes modules into a folder that is worked in, by a process that has imported none of the name."""
    monkeypatch.setattr(source_files, "_first_read", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(**sources: str) -> Path:
        for name, source in sources.items():
            path = tmp_path / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return tmp_path

    return write


class TestData:
    def test_a_file_is_named_below_the_folder_with_its_size(self, tmp_path):
        table = found(write_classes(tmp_path / "photos"))
        assert len(table) == 8
        entry = entries(table)["cat/0.png"]
        assert entry.size == (tmp_path / "photos/cat/0.png").stat().st_size

    def test_a_copied_folder_is_the_same_data(self, tmp_path):
        first = found(write_classes(tmp_path / "photos"))
        shutil.copytree(tmp_path / "photos", tmp_path / "copy")
        assert changes(first, found(tmp_path / "copy", first)) == []
        assert digest(first) == digest(found(tmp_path / "copy"))

    def test_the_order_of_the_files_is_of_no_matter(self):
        some = [Entry("b", 1, "x"), Entry("a", 2, "y")]
        assert fingerprint(some) == fingerprint(some[::-1])

    @pytest.mark.usefixtures("settled")
    def test_a_touched_file_is_the_same_data(self, tmp_path):
        first = found(write_classes(tmp_path / "photos"))
        (tmp_path / "photos/cat/0.png").touch()
        assert changes(first, found(tmp_path / "photos", first)) == []

    @pytest.mark.usefixtures("settled")
    def test_other_bytes_are_seen_though_size_and_mtime_are_as_they_were(self, tmp_path):
        path = write_table(tmp_path / "set.parquet")
        os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
        first = found(path)
        time.sleep(0.05)  # a tick of the clock that file systems take their times from
        write_table(path, seed=1)
        os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
        assert path.stat().st_size == entries(first)["set.parquet"].size
        assert changes(first, found(path, first)) == ["set.parquet has other bytes"]

    @pytest.mark.usefixtures("settled")
    def test_a_file_that_is_as_it_was_is_not_read_again(self, tmp_path):
        path = write_table(tmp_path / "set.parquet")
        known = fingerprint(entry._replace(digest="trusted") for entry in entries(found(path)).values())
        assert entries(found(path, known))["set.parquet"].digest == "trusted"

    def test_a_file_written_a_moment_ago_is_read_again(self, tmp_path):
        path = write_table(tmp_path / "set.parquet")
        known = fingerprint(entry._replace(digest="trusted") for entry in entries(found(path)).values())
        assert changes(known, found(path, known)) == ["set.parquet has other bytes"]

    def test_object_storage_is_asked_for_its_etag_and_the_object_is_not_read(self, tmp_path, monkeypatch):
        import boto3
        from moto.server import ThreadedMotoServer

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            address = "{}:{}".format(*server.get_host_and_port())
            s3 = boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")
            s3.create_bucket(Bucket="data")
            uri = f"s3://data/set.parquet?endpoint_override={address}&scheme=http&region=us-east-1"
            told = []
            for seed in (0, 0, 1):
                body = write_table(tmp_path / "set.parquet", seed=seed).read_bytes()
                tag = s3.put_object(Bucket="data", Key="set.parquet", Body=body)["ETag"]
                (entry,) = entries(table := found(uri)).values()
                assert (entry.digest, entry.size) == (f"ETag {tag}", len(body))
                told.append(table)
            assert changes(told[0], told[1]) == []
            assert changes(told[0], told[2]) == ["set.parquet has other bytes"]
        finally:
            server.stop()

    def test_changes_are_named_a_few_of_many(self, tmp_path):
        first = found(write_classes(tmp_path / "photos"))
        shutil.rmtree(tmp_path / "photos/dog")
        shutil.copy(tmp_path / "photos/cat/0.png", tmp_path / "photos/cat/new.png")
        told = changes(first, found(tmp_path / "photos", first))
        assert told == ["cat/new.png is new", *(f"dog/{number}.png is gone" for number in (1, 3, 5, 7))]
        assert listed(told, most=MOST_NAMED) == "cat/new.png is new, dog/1.png is gone, dog/3.png is gone and 2 more"

    def test_what_a_function_returns_counts_and_not_what_it_is_called(self, modules):
        source = "import numpy as np\ndef data(): return np.full((40, 6, 6), {}, np.uint8), np.arange(40) % 2"
        tables = []
        for number, value in enumerate((7, 7, 8)):
            modules(**{f"set{number}": source.format(value)})
            tables.append(load_full_set(DataConfig(name=f"set{number}:data")).fingerprint)
        assert changes(tables[0], tables[1]) == []
        told = changes(tables[0], tables[2])
        assert told == [f"{split} image has other bytes" for split in ("test", "train", "validation")]

    def test_files_that_change_while_they_are_read_are_refused(self, tmp_path, monkeypatch):
        path = write_table(tmp_path / "set.parquet")
        read = pq.ParquetFile.read

        def read_slowly(self, *args, **options):
            table = read(self, *args, **options)
            write_table(path, seed=1)
            return table

        monkeypatch.setattr(pq.ParquetFile, "read", read_slowly)
        with pytest.raises(ValueError, match=r"changed while it was in use: set.parquet has other bytes"):
            load_full_set(DataConfig(name=str(path)))

    def test_files_of_a_streamed_set_that_change_later_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        path = write_table(tmp_path / "set.parquet")
        full_set = load_full_set(DataConfig(name="set.parquet", streamed=True))
        monkeypatch.chdir("/")  # where a relative name stands for something else
        refuse_changed_files(full_set)
        path.touch()
        refuse_changed_files(full_set)
        write_table(path, seed=1)
        with pytest.raises(ValueError, match=r"set.parquet changed while it was in use: .* --fresh"):
            refuse_changed_files(full_set)

    def test_files_of_a_set_in_memory_may_go(self, tmp_path):
        path = write_table(tmp_path / "set.parquet")
        full_set = load_full_set(DataConfig(name=str(path)))
        path.unlink()
        refuse_changed_files(full_set)


class TestCode:
    def test_files_of_the_project_that_are_imported_count(self, modules):
        modules(
            net="import os, torch\nfrom lib import blocks\ndef make(): from late import helper\n",
            lib__in____init__="",
            lib__in__blocks="from . import shapes\nfrom .deep.more import x",
            lib__in__shapes="import importlib\nimportlib.import_module('by_name')",
            lib__in__deep__in__more="x = 1",
            lib__in__unused="",
            late="",
            by_name="",
            unrelated="",
        )
        found = list(entries(code_fingerprint("net:make")))
        assert found == [
            "by_name.py",
            "late.py",
            "lib/__init__.py",
            "lib/blocks.py",
            "lib/deep/more.py",
            "lib/shapes.py",
            "net.py",
        ]

    def test_finding_them_imports_nothing(self, modules):
        modules(loud="raise AssertionError('imported')", net="import loud\n")
        assert list(entries(code_fingerprint("net:make"))) == ["loud.py", "net.py"]

    def test_a_module_of_a_package_brings_the_package(self, modules):
        modules(pack__in____init__="import other", pack__in__net="", other="")
        assert list(entries(code_fingerprint("pack.net:make"))) == ["other.py", "pack/__init__.py", "pack/net.py"]

    def test_circles_end(self, modules):
        modules(net="import other", other="import net")
        assert list(entries(code_fingerprint("net:make"))) == ["net.py", "other.py"]

    @pytest.mark.parametrize("edited", ["net", "lib__in__blocks"])
    def test_a_comment_in_any_of_them_is_a_change(self, modules, edited):
        sources = {"net": "from lib import blocks\n", "lib__in____init__": "", "lib__in__blocks": "x = 1\n"}
        modules(**sources)
        before = code_fingerprint("net:make")
        modules(**{edited: f"{sources[edited]}# a thought"})
        (told,) = changes(before, code_fingerprint("net:make"))
        assert told.startswith(f"{edited.replace('__in__', '/')}.py ")

    def test_a_copied_project_is_the_same_code(self, modules, monkeypatch):
        here = modules(net="import other", other="")
        before = code_fingerprint("net:make")
        shutil.copytree(here, here / "copy")
        monkeypatch.chdir(here / "copy")
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(here)])
        assert changes(before, code_fingerprint("net:make")) == []

    def test_what_is_installed_does_not_count(self):
        assert len(code_fingerprint("torch.nn:Linear")) == 0
        assert len(code_fingerprint("raysubset.models:build_model")) == 0

    def test_what_another_python_has_installed_does_not_count_either(self, modules, tmp_path, monkeypatch):
        modules(net="import library")
        packages = tmp_path / "other" / "lib" / "site-packages"
        (packages / "library").mkdir(parents=True)
        (packages / "library" / "__init__.py").write_text("")
        monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
        assert list(entries(code_fingerprint("net:make"))) == ["net.py"]
        assert str(packages) in Workplace.here().search_path  # other processes need not have it otherwise


class TestImporting:
    def test_a_function_of_a_notebook_is_told_where_to_go(self):
        with pytest.raises(ValueError, match=r"__main__:net.*a file of its own.*network:net"):
            load_function("model.name", "__main__:net")

    def test_another_process_works_where_the_driver_does(self, modules, tmp_path, monkeypatch):
        library = tmp_path / "library"
        library.mkdir()
        (library / "libnet_of_a_script.py").write_text("def make(): return open('relative.txt').read()")
        modules()
        (tmp_path / "relative.txt").write_text("found")
        sys.path.insert(0, str(library))

        def read() -> str:
            return load_function("model.name", "libnet_of_a_script:make")()

        call = at(Workplace.here(), read)

        monkeypatch.chdir("/")  # as in Ray Train's workers
        sys.path.remove(str(library))
        assert call() == "found"

    def test_another_process_refuses_code_that_was_changed_since(self, modules, monkeypatch):
        modules(net="import helper", helper="rate = 1")
        monkeypatch.setattr(sys, "path", list(sys.path))
        with held_code({"net:make": code_fingerprint("net:make")}):
            begun = Workplace.here()
        begun.enter()
        modules(net="import helper", helper="rate = 2", more="")
        with pytest.raises(ChangedFile, match=r"net:make changed while it was in use: helper.py has other bytes: put"):
            begun.enter()
        Workplace.here().enter()  # of a later command

    def test_a_folder_that_another_machine_lacks_is_no_failure(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        Workplace(str(tmp_path / "missing"), ()).enter()
        assert Path.cwd() == tmp_path


def config_of(folder: Path, **overrides: object) -> Config:
    base = {"data.name": "set.parquet", "model.name": "net:make", "storage_path": str(folder / "store"), "name": "r"}
    return Config().with_overrides(base | overrides)


@pytest.fixture
def project(modules) -> Path:
    """A folder with data and a network, worked in."""
    here = modules(net="import layers\ndef make(k, s): ...", layers="")
    write_table(here / "set.parquet")
    return here


def finish(config: Config) -> RunDirectory:
    """Leave what tells that a run of the config is done, by a process that is gone."""
    directory = RunDirectory(config.storage_path, config.run_name())
    directory.open(config.to_dict(), {}, identify([config], {}, None))
    directory.write_json(REPORT_PATH, a_record() | {"name": "r", "files": {}})
    source_files._first_read.clear()
    return directory


def test_code_that_changed_since_its_import_is_refused_until_it_is_imported_again(project):
    first = code_in_use("net:make")
    load_function("model.name", "net:make")
    (project / "layers.py").write_text("width = 8")
    told = r"layers.py changed since this process imported it, .* call importlib.reload\(layers\)"
    for _ in range(2):
        with pytest.raises(ValueError, match=told):
            code_in_use("net:make")
    importlib.reload(sys.modules["layers"])
    assert changes(first, code_in_use("net:make")) == ["code changed: layers.py 0 → 9 bytes"[14:]]
    del sys.modules["layers"]  # another way to import it again
    (project / "layers.py").write_text("width = 16")
    code_in_use("net:make")


class TestRuns:
    def test_a_finished_run_of_the_same_data_and_code_is_told_of(self, project):
        config = config_of(project)
        finish(config)
        assert run(config).name == "r"

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda here: write_table(here / "set.parquet", seed=1), "data changed: set.parquet has other bytes"),
            (
                lambda here: write_table(here / "set.parquet", num=50),
                r"data changed: set.parquet [\d,]+ → [\d,]+ bytes",
            ),
            (lambda here: (here / "layers.py").write_text("#"), "code changed: layers.py 0 → 1 bytes"),
            (lambda here: (here / "layers.py").unlink(), "code changed: layers.py is gone"),
        ],
    )
    def test_a_finished_run_of_other_data_or_code_is_refused_with_the_difference(self, project, change, told):
        config = config_of(project)
        finish(config)
        change(project)
        with pytest.raises(ValueError, match=rf"{told}\): choose another --name, or start over with --fresh"):
            run(config)
        check = next(check for check in examine(config) if check.name == "earlier run")
        assert check.ok is False
        assert re.search(told, check.text)

    def test_changed_code_can_be_accepted_and_changed_data_cannot(self, project, caplog):
        config = config_of(project)
        finish(config)
        (project / "layers.py").write_text("#")
        with pytest.raises(ValueError, match="--accept-changed-code"):
            run(config)
        assert run(config, accept_changed_code=True).name == "r"
        assert "code changed: layers.py 0 → 1 bytes; finished work stays" in caplog.text
        write_table(project / "set.parquet", seed=1)
        with pytest.raises(ValueError, match=r"\(data changed: [^;]*\): choose another --name, or .*--fresh$"):
            run(config, accept_changed_code=True)

    def test_the_same_command_in_a_second_project_is_not_given_the_report_of_the_first(self, project, monkeypatch):
        finish(config_of(project))
        other = project / "other"
        other.mkdir()
        (other / "net.py").write_text("def make(k, s): ...  # another")
        write_table(other / "set.parquet", num=50)
        monkeypatch.chdir(other)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(project)])
        told = rf"data changed.*code changed.*set.parquet was {project}/set.parquet, net was {project}/net.py"
        with pytest.raises(ValueError, match=told):
            run(config_of(project))

    def test_relative_names_are_told_with_what_they_stand_for(self, project):
        (note,) = places_notes(identify([config_of(project)], {}, None))
        assert note.text == f"set.parquet is {project}/set.parquet, net is {project}/net.py"
        absolute = config_of(project, **{"data.name": str(project / "set.parquet"), "model.name": "cnn"})
        assert places_notes(identify([absolute], {}, None)) == []


class TestIdentity:
    def test_it_is_read_back_as_it_was_written(self, tmp_path):
        table = fingerprint([Entry("a", 1, "x", "now"), Entry("b", 2, "y")])
        whole = Identity({"set": table}, {"net:make": table, "net:other": table}, {"set": "/srv/set"})
        directory = RunDirectory(str(tmp_path), "run")
        directory.open({}, {}, whole)
        assert directory.read_identity() == whole

    def test_names_that_only_one_has_are_kept_and_not_compared(self, tmp_path):
        table, other = fingerprint([Entry("a", 1, "x")]), fingerprint([Entry("a", 1, "y")])
        directory = RunDirectory(str(tmp_path), "run")
        directory.open({}, {}, Identity({"set": table}))
        directory.open({}, {}, Identity({"more": other}))
        with pytest.raises(ValueError, match="data changed: a has other bytes"):
            directory.open({}, {}, Identity({"set": other}))

    def test_a_run_that_recorded_none_is_refused(self, tmp_path):
        directory = RunDirectory(str(tmp_path), "run")
        directory.open({}, {})
        whole = Identity({"set": fingerprint([Entry("a", 1, "x")])})
        with pytest.raises(ValueError, match=rf"a run without {IDENTITY_PATH}.*--fresh"):
            directory.open({}, {}, whole)
        assert directory.open({}, {}, whole, fresh=True) is False

    def test_a_damaged_one_says_how_to_go_on(self, tmp_path):
        directory = RunDirectory(str(tmp_path), "run")
        directory.open({}, {}, Identity({"set": fingerprint([Entry("a", 1, "x")])}))
        directory.write_bytes(IDENTITY_PATH, b"half")
        with pytest.raises(CorruptFile, match=r"identity.parquet in .* is damaged: .*; start over with --fresh"):
            directory.open({}, {}, Identity())
        assert directory.open({}, {}, Identity(), fresh=True) is False

    def test_a_driver_that_died_before_the_config_was_written_left_no_run(self, tmp_path):
        directory = RunDirectory(str(tmp_path), "run")
        directory.write_table(IDENTITY_PATH, Identity().to_table())
        assert directory.open({}, {}, Identity()) is False
