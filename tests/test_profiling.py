"""Traces of some steps (actors.profile): left by the first subset and the stages on the full set, changing no bit."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.pipeline.stages import _Stages
from raysubset.run_directory import TRACES_FOLDER, RunDirectory, trace_path, weights_path
from raysubset.work import Minimizer, Piece
from tests.flags import parse_config
from tests.tiny import same_bits, stored_weights


def work(folder: Path, profile: int, *, epochs: float = 3.0, subsets: tuple[int | None, ...] = (0,)) -> RunDirectory:
    config = Config().with_overrides(
        {
            "data.name": "iris",
            "storage_path": str(folder),
            "name": str(profile),
            "actors.profile": profile,
            "minimize.epochs": epochs,
            "minimize.batch_size": 8,
        }
    )
    directory, full_set = RunDirectory(str(folder), config.run_name()), load_full_set(*config.learned)
    minimizer = Minimizer(lambda: full_set, num_gpus=0, node="n")
    pieces = [Piece(config, directory, "subsets", subset_id=subset) for subset in subsets]
    minimizer.minimize(pieces, None, attempts=[0] * len(pieces), waited_s=0.0)
    return directory


def test_the_steps_asked_for_are_traced_and_the_minimum_has_the_same_bits(tmp_path):
    traced, plain = work(tmp_path, 2), work(tmp_path, 0)
    trace = json.loads(gzip.decompress(traced.read_bytes(trace_path("subsets"))))
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert sum(name.startswith("ProfilerStep") for name in names) in (2, 4)  # on the CPU's line, and its annotation's
    assert any("addmm" in name or "linear" in name for name in names)
    path = weights_path("rounds/0000/minima/0000")
    assert same_bits(stored_weights(traced, path), stored_weights(plain, path))
    assert plain.list(TRACES_FOLDER) == []


@pytest.mark.parametrize(("epochs", "subsets"), [(0.5, (0,)), (3.0, (1,))])
def test_nothing_is_left_of_few_steps_and_of_another_subset(tmp_path, epochs, subsets):
    assert work(tmp_path, 2, epochs=epochs, subsets=subsets).list(TRACES_FOLDER) == []


def test_a_pack_of_subsets_is_traced_as_one(tmp_path):
    assert work(tmp_path, 2, subsets=(0, 1)).list(TRACES_FOLDER) == [trace_path("subsets")]


def test_profile_is_short_for_the_field_which_shapes_no_result():
    config = parse_config(["--profile", "3"])
    assert config.actors.profile == 3
    assert config.run_name() == Config().run_name()


def test_a_note_names_traces_by_uris_that_open_them(monkeypatch: pytest.MonkeyPatch) -> None:
    directory, notes = RunDirectory("s3://key:secret@bucket/a?region=x", "run"), list[str]()
    monkeypatch.setattr(directory, "list", lambda folder: [f"{folder}/trunk.json.gz"])
    config = Config().with_overrides({"actors.profile": 5})
    stages = SimpleNamespace(_config=config, _directory=directory, _tell=lambda event: notes.append(event.text))
    assert _Stages._traces(cast(Any, stages)) == {"traces": ["profiles/trunk.json.gz"]}
    assert notes == ["traces of 5 steps, for Perfetto: s3://bucket/a/run/profiles/trunk.json.gz?region=x"]
