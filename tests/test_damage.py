"""Whatever happens to a file of a run, who reads it gets what was written, or a word that names the file.

The short form of tests/chaos/storage_faults.py, which damages a whole run's files and resumes it.
"""

import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch

from raysubset.config import Config
from raysubset.fingerprints import Entry, Identity, fingerprint
from raysubset.run_directory import (
    CorruptFile,
    RunDirectory,
    checkpoint_path,
    minimum_folder,
    minimum_path,
    subsets_path,
    weights_path,
)
from raysubset.run_directory.ledger import Ledger, Work
from raysubset.subset_actors.actor import _Damages
from tests.test_report import minimum

MINIMUM = minimum_folder(0, 1)
WORKS = [Work("subsets", 0, subset, 0, "node", "cpu", started_at=1.0 + subset, outcome="done") for subset in (0, 1)]


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(str(tmp_path), "run")
    identity = Identity({"data": fingerprint([Entry("a", 1, "0")])}, {})
    run.open(Config().to_dict(), {}, identity)
    run.write_json("decisions.json", {"num_gpus": 0.0, "num_workers": 2})
    run.write_json("sessions.json", {"sessions": [{"started_at": 1.0, "startup_s": 2.0, "wall_s": 3.0}]})
    files = {weights_path(MINIMUM): run.write_weights(weights_path(MINIMUM), {"a": torch.arange(50.0)})}
    run.write_json(minimum_path(MINIMUM), minimum(1) | {"files": files})
    for attempt in (0, 1):
        run.write_checkpoint(checkpoint_path(MINIMUM, attempt), {"position": [attempt, 0], "a": torch.arange(50.0)})
    run.write_table(subsets_path(0), pa.table({"subset": [0, 1], "indices": [[1], [2, 3]]}))
    Ledger(run).write(WORKS[0])
    Ledger(run).compact()
    Ledger(run).write(WORKS[1])
    return run


def weights_of(run: RunDirectory) -> Any:
    record = run.read_record(minimum_path(MINIMUM))
    return record and run.read_weights(weights_path(MINIMUM), record["files"])["a"].tolist()


def checkpoint_of(run: RunDirectory) -> Any:
    found = run.newest_checkpoint(MINIMUM)
    return found and (found[0], found[1]["position"], found[1]["a"].tolist())


READERS: dict[str, Callable[[RunDirectory], Any]] = {
    "config.json": RunDirectory.read_config,
    "identity.parquet": lambda run: [table.to_pylist() for table in run.read_identity().data.values()],
    "decisions.json": lambda run: run.read_json_or_none("decisions.json"),
    "sessions.json": lambda run: run.read_json_or_none("sessions.json"),
    minimum_path(MINIMUM): weights_of,
    weights_path(MINIMUM): weights_of,
    checkpoint_path(MINIMUM, 1): checkpoint_of,
    subsets_path(0): lambda run: run.read_table(subsets_path(0)).to_pydict(),
    "ledger.parquet": lambda run: Ledger(run).read(),
    WORKS[1].path: lambda run: Ledger(run).read(),
}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut short, a bit changed, a part overwritten, a part doubled, or all of it something else."""
    begin, end = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
    flipped = bytearray(data)
    flipped[begin] ^= 1 << draw.randrange(8)
    others = [b"", b"{}", b"[]", b"null", b"[[]]", b'"x"', b"\x80\x05cos\nsystem\n", bytes(len(data))]
    kinds = [data[:begin], bytes(flipped), data[:begin] + draw.randbytes(end - begin + 1) + data[end + 1 :]]
    return draw.choice([*kinds, data[:end] + data[begin:], draw.choice(others)])


@pytest.mark.parametrize("path", READERS)
def test_a_damaged_file_is_read_as_it_was_written_or_named(run: RunDirectory, path: str, caplog) -> None:
    assert run.local_path
    read, draw = READERS[path], random.Random(path)
    written, before = read(run), {name: run.read_bytes(name) for name in run.list(recursive=True)}
    assert not caplog.text, "a sound run needs no words"
    for number in range(60):
        caplog.clear()
        (run.local_path / path).write_bytes(changed := damaged(before[path], draw))
        try:
            found, words = read(run), caplog.text
        except CorruptFile as error:
            found, words = None, str(error)
        except ValueError as error:  # of config.json that belongs to no run
            assert path == "config.json"
            found, words = None, str(error)
        assert found == written or path.rpartition("/")[2] in words, (number, changed)
        for name, content in before.items():  # reading may mend
            (run.local_path / name).parent.mkdir(exist_ok=True)
            (run.local_path / name).write_bytes(content)
    caplog.clear()
    assert read(run) == written


def test_what_an_actor_finds_damaged_is_kept_for_its_answer(run: RunDirectory) -> None:
    damages = _Damages()
    run.write_bytes(checkpoint_path(MINIMUM, 1), b"")
    assert checkpoint_of(run)[0] == 0
    (text,) = damages.texts
    assert text.startswith(f"{checkpoint_path(MINIMUM, 1)} in {run.uri} cannot be read: ")
