"""Peak memory of processes that train: as the system has it, in their records, and on the page."""

from unittest import mock

import psutil
import torch

from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.report import sections
from raysubset.run_directory import RunDirectory
from raysubset.training import devices, peak_bytes
from raysubset.work import Minimizer, Piece
from tests.test_report import a_record


def test_it_is_at_least_what_the_process_holds_and_stays_when_that_is_freed():
    held = torch.ones(64 * 2**20 // 4)
    resident, peak = psutil.Process().memory_info().rss, peak_bytes(torch.device("cpu"))
    assert set(peak) == {"host"}
    assert 0.95 * resident < peak["host"] < psutil.virtual_memory().total
    del held
    assert peak_bytes(torch.device("cpu"))["host"] > 0.99 * peak["host"]  # the kernel counts by the CPU, roughly


def test_where_proc_does_not_tell_it_the_systems_own_count_is_in_bytes_too():
    told = peak_bytes(torch.device("cpu"))["host"]
    with mock.patch.object(devices.Path, "read_text", return_value="VmRSS:\t1 kB\n"):
        counted = peak_bytes(torch.device("cpu"))["host"]
    assert 0.9 * told < counted < psutil.virtual_memory().total


def test_a_minimum_has_that_of_its_process(tmp_path):
    config = Config().with_overrides({"data.name": "iris", "storage_path": str(tmp_path), "minimize.epochs": 1})
    directory, full_set = RunDirectory(str(tmp_path), config.run_name()), load_full_set(*config.learned)
    piece = Piece(config, directory, "subsets", subset_id=0)
    Minimizer(lambda: full_set, num_gpus=0, node="n").minimize([piece], None, attempts=[0], waited_s=0.0)
    record = piece.record()
    assert record is not None
    assert record["peak_bytes"]["host"] > 2**24


def test_the_page_tells_the_most_of_all_and_nothing_of_records_of_before():
    record = a_record()
    assert not rows_of(record)
    record["stages"]["rounds"][0]["minima"][1]["peak_bytes"] = {"host": 4 * 10**8, "card": 2 * 10**9}
    record["stages"]["fine_tuning"]["peak_bytes"] = {"host": 5 * 10**8}
    assert rows_of(record) == {"peak memory, host": "500 MB", "peak memory, card": "2 GB"}


def rows_of(record) -> dict[str, str]:
    costs = next(section for section in sections(record) if section.title == "Costs")
    return {row[0]: row[1] for row in costs.rows if row[0].startswith("peak")}
