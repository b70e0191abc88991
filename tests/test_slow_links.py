"""jobs/slow_links.py as far as it needs neither root nor a network: its cells, and what its table makes of them."""

import os
from typing import Any

import pytest

from jobs import slow_links
from jobs.slow_links import CELLS, NUM_NODES, PASSES, config_of, main, num_exchanges, table
from raysubset.run_directory.ledger import Work
from raysubset.training import Cost


def record(cell: str, mbit: float, **changes: Any) -> dict[str, Any]:
    return {
        "cell": cell,
        "mbit": mbit,
        "seed": 0,
        "load": [0.1, 2.0],
        "is_whole": True,
        "seconds": 64.0,
        "exchanges": 256,
        "all_exchanges": 256,
        "curve": [[128, 0.96], [192, 0.975], [256, 0.98]],
        "test": 0.98,
        "sent_bytes": [512_000_000, 1_536_000_000],
        "received_bytes": [1_536_000_000, 512_000_000],
        "ledger_bytes": 2_048_000_000,
        "advice": {"s_per_pass": 8.0, "wall_s": 48.0},
    } | changes


def test_every_cell_trains_for_the_same_passes_in_as_many_exchanges_as_its_name_says():
    whole = {cell: num_exchanges(config_of(cell, "x", "127.0.0.1:1")) for cell in CELLS}
    data_parallel = {"I": 256, "I-bf16": 256, "I-bf16-acc4": 64}
    rounds = (
        "rounds-16",
        "rounds-16-int8",
        "rounds-16-int8-overlap",
        "rounds-16-int8-b256",
        "rounds-64",
        "rounds-16-overlap",
        "rounds-64-overlap",
    )
    assert whole == data_parallel | {cell: int(cell.split("-")[1]) for cell in rounds}
    for cell in ("rounds-16", "rounds-64"):
        config = config_of(cell, "x", "127.0.0.1:1")
        assert config.rounds.num * config.minimize.epochs == PASSES  # of each worker's own half: as I, in total
        assert config.subsets.num == NUM_NODES
    accumulating = config_of("I-bf16-acc4", "x", "127.0.0.1:1").minimize
    assert (
        accumulating.batch_size // accumulating.accumulation == config_of("I", "x", "127.0.0.1:1").minimize.batch_size
    )


def test_a_cell_that_was_stopped_is_scaled_and_takes_its_quality_from_the_same_cell_elsewhere():
    stopped = record("I", 10.0, is_whole=False, seconds=100.0, exchanges=32, curve=[], test=None)
    head, whole, scaled = (line.split() for line in table([stopped, record("I", 1000.0)]))
    assert dict(zip(head, whole, strict=True)) == {
        "Mbit/s": "1000",
        "cell": "I",
        "seed": "0",
        "exchanges": "256/256",
        "s/exchange": "0.250",
        "s(all)": "64",
        "s(97%)": "48",
        "val%": "98.0",
        "out/in-MB/exchange": "4.00/4.00",
        "ledger": "4.00",
        "advise": "48",
        "advise/measured": "0.75",
        "load": "0.1–2.0",
    }
    told = dict(zip(head, scaled, strict=True))
    assert (told["s/exchange"], told["s(all)"], told["s(97%)"], told["val%"]) == ("3.125", "~800", "~600", "98.0")


def test_the_quality_of_a_stopped_cell_is_that_of_its_own_seed():
    stopped = record("I", 10.0, is_whole=False, seconds=100.0, exchanges=32, curve=[], seed=1)
    head, *rows = (line.split() for line in table([record("I", 1000.0), stopped]))
    assert [row[head.index("seed")] for row in rows] == ["0", "1"]
    assert [row[head.index("val%")] for row in rows] == ["98.0", "–"]


def test_seconds_and_bytes_of_training_are_the_ledgers():
    def work(stage: Any, number: int, subset: int | None, begin: float, end: float | None, **more: Any) -> Work:
        outcome = "running" if end is None else "done"
        return Work(stage, number, subset, 0, "node", "cpu", begin, ended_at=end, outcome=outcome, **more)

    rounds = [
        *(work("subsets", 0, subset, 10.0 + subset, 12.0, num_network_bytes=80) for subset in (0, 1)),
        work("aggregation", 0, None, 12.0, 15.0, num_network_bytes=50),
        work("subsets", 1, 0, 15.0, 17.0, num_network_bytes=80),
    ]
    config = config_of("rounds-16", "x", "127.0.0.1:1")
    assert slow_links._training(rounds, config) == (10.0, 5.0, 1, 210)
    stopped = work("conventional", 0, None, 10.0, None, num_workers=2, cost=Cost(0, 0, 7, 8.0), num_network_bytes=90)
    config = config_of("I-bf16", "x", "127.0.0.1:1")
    assert slow_links._training([stopped], config) == (10.0, 4.0, 7, 90)


def test_without_root_it_ends_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told == ("slow_links: network namespaces and limited links need root on Linux: run it there, with sudo -E\n")
